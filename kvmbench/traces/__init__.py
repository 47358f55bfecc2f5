"""Exit traces: what made KVM leave the guest, how often, how long.

`kvmbench.traces.live.trace` takes one (``kb.trace``). Data goes one way: pages of the kernel's ring buffer and rows
of the core's log (`collector`) become tables (`pages`, `event_table`, `run_log`), those become exits (`exits`), and
these are summarised, compared, drawn and written to files.
"""

from __future__ import annotations
