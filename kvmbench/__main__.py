"""``python -m kvmbench`` is the `kvmbench` command."""

from __future__ import annotations

import sys

from kvmbench.cli import main

sys.exit(main())
