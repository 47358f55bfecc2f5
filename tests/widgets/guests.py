"""Cells that make a machine, for the notebooks of the browser tests."""

from ..panel_guests import LOOP, SPIN

# This machine's KVM where it can step, else the appliance: what panels need, both have.
_EITHER = """
try:
    host = kb.connect("local", quiet=True)
    if 0 not in host.mechanisms.step:
        raise HostUnavailable("no single step")
except HostUnavailable:
    host = kb.connect("appliance", quiet=True)
"""
_CELL = """
import kvmbench as kb, kvmbench_widgets as kw
from kvmbench.errors import HostUnavailable
{connect}
m = kb.Machine(host, mode="long")
m.load_asm('''{program}''', at=0x1000)
cpu = m.cpu
"""
MACHINE = _CELL.format(connect=_EITHER, program=LOOP + SPIN)
APPLIANCE = _CELL.format(connect='host = kb.connect("appliance", quiet=True)', program=LOOP + SPIN)
