"""Where guests run: mode, width of code, privilege level, and the layout of memory that all of them share.

Guest-physical, below 64 KiB so that every width reaches it (in real mode all segments but FS and GS are 0):

    0x0000  real mode: the interrupt vectors
    0x1000  a GDT of our own, the IDT and the handlers; the same for all guests of a setting
    0x2000  the window: data (512 bytes, random), stack, and at its end what the handlers count; compared at the end
    0x2680  the guest's code, right behind, so that one message carries both
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from kvmbench.machine.boot import plan_boot
from kvmbench.machine.page_tables import PAGE_SIZE

FIXED, WINDOW = 0x1000, 0x2000
DATA, DATA_BYTES = WINDOW, 0x200
BASE = DATA + DATA_BYTES // 2  # what the base pointer holds throughout
STACK, STACK_BYTES = WINDOW + 0x200, 0x400
STACK_START = STACK + 0x280
INNER_STACK = STACK + STACK_BYTES  # for entries from CPL 3
COUNTS = WINDOW + 0x600  # a byte a vector, 64 of them
RESUME = WINDOW + 0x640  # where a handler returns to, 8 bytes
WINDOW_BYTES = 0x680
CODE = WINDOW + WINDOW_BYTES
CODE_END = 0x3400
FS_BASE, GS_BASE = 0x40, 0x80
MEMORY_BYTES = 2 << 20  # of machines outside real mode
PORTS = range(0x300, 0x340)
SHORT_PORTS = range(0x90, 0xA0)  # reached with an immediate byte
END_PORT = 0xA8  # an OUT there ends a guest at CPL 3


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to run a guest.

    Attributes:
        mode: of the machine: real, protected, pae or long.
        bits: width of the code: 16, 32 or 64.
        cpl: 0 or 3.
    """

    mode: str
    bits: int
    cpl: int

    @property
    def name(self) -> str:
        """``long64`` or ``long64-user``."""
        width = "" if self.mode == "real" else str(self.bits)
        return f"{self.mode}{width}" + ("-user" if self.cpl else "")

    @property
    def hole(self) -> int:
        """A guest-physical page without memory behind it, where a device answers."""
        return 0x90000 if self.mode == "real" else 0x20_0000

    @property
    def paged(self) -> bool:
        """Whether paging is on."""
        return self.mode in ("pae", "long")


SETTINGS = (
    Setting("real", 16, 0),
    Setting("protected", 32, 0),
    Setting("protected", 16, 0),
    Setting("pae", 32, 0),
    Setting("long", 64, 0),
    Setting("long", 32, 0),
    Setting("protected", 32, 3),
    Setting("pae", 32, 3),
    Setting("long", 64, 3),
    Setting("long", 32, 3),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


@cache
def leaf_entry(setting: Setting) -> tuple[int, int]:
    """Where the page-table entry lies that maps the first 2 MiB, and its lower half, for settings with paging."""
    mapped = [(setting.hole, 0x1000)]
    pages = plan_boot(setting.mode, MEMORY_BYTES, user=setting.cpl == 3, mapped=mapped).pages
    assert pages is not None
    tables = [(gpa, entries[0]) for gpa, entries in pages.tables.items() if entries[0] & PAGE_SIZE]
    (found,) = tables
    return found
