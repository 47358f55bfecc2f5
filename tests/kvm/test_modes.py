"""Boot modes: each runs code of its width, at the privilege asked for."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.errors import MisuseError, UnsupportedError

ADD = "mov eax, 0x12345678\nadd eax, 1\nmov ebx, eax\nhlt"
WIDTH = {"real": 16, "protected": 32, "pae": 32, "long": 64}
PAGING = {"real": "off", "protected": "off", "pae": "PAE", "long": "4-level"}


def make(host, **options):
    try:
        return kb.Machine(host, memory="2M", **options)
    except UnsupportedError as error:
        if host.info.module != "kvm_pvm":
            raise  # kvm_amd and kvm_intel run every mode
        pytest.skip(str(error))


@pytest.mark.parametrize("mode", WIDTH)
def test_each_mode_runs_code_of_its_width(host, mode):
    with make(host, mode=mode) as m:
        m.load_asm(ADD, at=0x1000)
        assert (m.cpu.mode.bits, m.cpu.mode.paging, m.cpu.mode.cpl) == (WIDTH[mode], PAGING[mode], 0)
        rips = [m.cpu.step().rip for _ in range(3)]
        # A 16-bit segment needs an operand size prefix for each 32-bit operation.
        assert rips == ([0x1006, 0x100A, 0x100D] if mode == "real" else [0x1005, 0x1008, 0x100A])
        assert m.cpu.regs.ebx == 0x12345679
        assert m.cpu.run(deadline_s=10).cause is kb.Cause.HALT


@pytest.mark.parametrize("mode", ["protected", "pae", "long"])
def test_user_code_steps_at_cpl_3(host, require, mode):
    require("step", 3)
    with make(host, mode=mode, user=True) as m:
        m.load_asm("mov eax, 5\nadd eax, 2\nnop\nspin: jmp spin", at=0x1000)
        assert m.cpu.mode.cpl == 3
        assert [m.cpu.step().rip for _ in range(3)] == [0x1005, 0x1008, 0x1009]
        assert m.cpu.regs.eax == 7
        assert m.cpu.mode.cpl == 3


def test_one_guest_goes_from_real_to_long_mode_and_says_so(host, guest):
    with kb.Machine(host, memory="2M", mode="real") as m:
        m.load_asm(guest("real_to_long.S"), at=0x1000)
        stop = m.cpu.run(deadline_s=20)
        assert stop.cause is kb.Cause.HALT, stop
        assert m.cpu.mode.name == "long"
        text = m.serial.text.lower()
        assert text.index("real") < text.index("protected") < text.index("long")


def test_the_way_to_long_mode_can_be_recorded_step_by_step(host, guest):
    with kb.Machine(host, memory="2M", mode="real") as m:
        m.load_asm(guest("real_to_long.S"), at=0x1000)
        rec = m.cpu.record(20_000)
        assert m.cpu.last_stop.cause is kb.Cause.HALT, m.cpu.last_stop
        assert m.cpu.mode.name == "long"
        widths = {int(flags) & 3 for flags in rec.flags}
        assert widths == {1, 2, 3}, "rows say which width runs next"
        assert "long" in m.serial.text.lower()


def test_a_mode_that_does_not_exist_is_refused(host):
    with pytest.raises(MisuseError, match=r"real.*protected.*pae.*long"):
        kb.Machine(host, mode="virtual")
