"""Build hook: compiles the C core into ``kvmbench.core._core`` through cffi.

Everything else about the distribution is in pyproject.toml. The extension is
optional so that a machine without a compiler or ``<linux/kvm.h>`` (macOS, a
bare container) still installs kvmbench and drives the appliance and ssh hosts;
only the `local` host needs it. With ``KVMBENCH_REQUIRE_CORE=1`` in the
environment a core that does not compile is an error instead.
"""

from __future__ import annotations

import os
import sys

from setuptools import setup
from setuptools.command.build_ext import build_ext


class BuildCore(build_ext):
    """Marks the extensions optional unless the caller insists on the core."""

    def finalize_options(self) -> None:
        super().finalize_options()
        required = os.environ.get("KVMBENCH_REQUIRE_CORE") == "1"
        for extension in self.extensions or []:
            extension.optional = not required


# KVM exists on Linux only: elsewhere there is nothing the core could talk to.
CORE = ["kvmbench/core/build.py:ffibuilder"] if sys.platform.startswith("linux") else []

setup(cffi_modules=CORE, cmdclass={"build_ext": BuildCore})
