"""The Registers panel, without a page."""

from __future__ import annotations

import csv
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import kvmbench as kb
import kvmbench_widgets as kw
from kvmbench.errors import HostUnavailable, KvmIoctlError, MisuseError
from kvmbench_widgets.registers import SECTIONS

AVX = """
start:  mov rax, cr4
        or rax, 0x40600
        mov cr4, rax
        vpcmpeqd ymm3, ymm3, ymm3
        mov eax, 0x12345678
        vmovd xmm4, eax
        hlt
"""


def rows(panel: Any) -> dict[str, Any]:
    return {row["name"]: row for section in panel.view["rows"].values() for row in section}


def test_what_a_step_changed_is_marked_with_what_it_was(machine: Any, send: Callable[..., None]) -> None:
    panel, controls = kw.Registers(machine), kw.Controls(machine)
    assert "was" not in rows(panel)["rax"]
    send(controls, "step")
    send(controls, "step")
    assert rows(panel)["rax"] == {"name": "rax", "hex": f"{3:016x}", "was": f"{1:016x}"}
    assert "was" not in rows(panel)["rbx"]
    flags = {bit["name"]: (bit["set"], bit["changed"]) for bit in rows(panel)["rflags"]["bits"]}
    assert flags["PF"] == (1, 1), "3 has an even number of bits"


def test_all_64_bits_are_kept(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Registers(machine)
    send(panel, "set", name="rbx", value="0xfedcba9876543211")
    assert panel.error == ""
    assert machine.cpu.regs.rbx == 0xFEDCBA9876543211
    assert rows(panel)["rbx"]["hex"] == "fedcba9876543211"


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("rax", "loop", lambda cpu: cpu.regs.rax == 0x1007),
        ("eax", "0x12", lambda cpu: cpu.regs.rax == 0x12),
        ("cs.limit", "0xfffff", lambda cpu: cpu.regs.cs.limit == 0xFFFFF),
        ("dr0", "0x1234", lambda cpu: cpu.vcpu.get_debugregs().db[0] == 0x1234),
        ("xmm3", "0x1122334455667788aa", lambda cpu: bytes(cpu.vcpu.get_fpu().xmm[3])[:2] == b"\xaa\x88"),
        ("IA32_LSTAR", "0x1234", lambda cpu: cpu.vcpu.get_msrs([0xC0000082]) == {0xC0000082: 0x1234}),
    ],
)
def test_every_kind_of_register_can_be_written(
    machine: Any, send: Callable[..., None], name: str, value: str, found: Callable[[Any], bool]
) -> None:
    panel = kw.Registers(machine, sections=list(SECTIONS))
    send(panel, "set", name=name, value=value)
    assert panel.error == ""
    assert found(machine.cpu)


def test_a_click_on_a_bit_flips_it(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Registers(machine)
    send(panel, "flip", name="rflags", bit="CF")
    assert machine.cpu.regs.rflags.CF
    send(panel, "flip", name="rflags", bit="CF")
    assert not machine.cpu.regs.rflags.CF


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"do": "set", "name": "rxx", "value": "1"}, "rxx"),
        ({"do": "set", "name": "rax", "value": "nowhere"}, "nowhere"),
        ({"do": "set", "name": "rax", "value": "0x10000000000000000"}, "0x10000000000000000"),
        ({"do": "set", "name": "xmm1", "value": "x"}, "xmm1 = 'x'"),
        ({"do": "set", "name": "cs.colour", "value": "1"}, "no field 'colour'"),
        ({"do": "set", "name": 3, "value": "1"}, "not 3"),
        ({"do": "set"}, "missing"),
        ({"do": "flip", "name": "rflags", "bit": "QQ"}, "no bit 'QQ'"),
        ({"do": "set", "name": "xmm\u0663", "value": "1"}, "xmm\u0663"),
        (
            {"do": "set", "name": "ymm3", "value": "1"},
            "ymm3 is not shown: AVX is not enabled in the guest's XCR0, which is 0x1",
        ),
        ({"do": "flip", "name": "dr7", "bit": "L0"}, "unfold"),
        ({"do": "make_view"}, "cannot do 'make_view'"),
        ({"do": "__init__"}, "cannot do"),
        ({"do": ["x"]}, "cannot do"),
        ({}, "cannot do None"),
    ],
)
def test_what_a_page_must_not_send_is_told_in_words(machine: Any, message: dict[str, Any], words: str) -> None:
    panel = kw.Registers(machine)
    panel._receive(None, message, [])
    assert words in panel.error
    panel._receive(None, "no mapping", [])


def test_sections_that_cost_an_ioctl_are_asked_for_only_when_unfolded(machine: Any) -> None:
    panel = kw.Registers(machine)
    assert set(panel.view["rows"]) == {"general", "flags", "segments", "control"}
    panel.sections = ["general", "debug", "msrs", "vector"]
    assert rows(panel)["dr7"]["hex"] == f"{0x400:016x}"
    assert "IA32_LSTAR" in rows(panel)
    assert len(rows(panel)["xmm0"]["hex"]) == 32


def test_ymm_registers_are_shown_and_written_once_the_guest_has_enabled_avx(
    machine: Any, send: Callable[..., None]
) -> None:
    panel, vcpu = kw.Registers(machine, sections=["vector"]), machine.cpu.vcpu
    assert rows(panel)["ymm"]["note"] == "not shown: AVX is not enabled in the guest's XCR0, which is 0x1 by KVM"
    assert "AVX is not enabled" in panel.text()
    assert not any(name.startswith("ymm") and name != "ymm" for name in rows(panel))
    xcrs = vcpu.get_xcrs()
    xcrs.xcrs[0].value = 7
    try:
        vcpu.set_xcrs(xcrs)
    except KvmIoctlError as error:
        pytest.skip(f"no AVX on this host: {error}")
    panel.refresh()
    assert "ymm" not in rows(panel)
    assert "xmm3" not in rows(panel)
    assert rows(panel)["ymm3"]["hex"] == "0" * 64
    value = int("fedcba9876543210" * 3 + "0123456789abcdef", 16)
    send(panel, "set", name="ymm3", value=hex(value))
    assert panel.error == ""
    assert rows(panel)["ymm3"]["hex"] == f"{value:064x}"
    # KVM's own view of the lower half, and a write of that alone.
    assert bytes(vcpu.get_fpu().xmm[3]) == value.to_bytes(32, "little")[:16]
    send(panel, "set", name="xmm3", value="0x1")
    assert rows(panel)["ymm3"]["hex"] == f"{value >> 128:032x}{1:032x}"
    assert rows(panel)["ymm4"]["hex"] == "0" * 64
    send(panel, "set", name="ymm3", value="-1")
    assert "does not fit its 256 bits" in panel.error


def test_what_a_guest_puts_into_ymm_registers_is_shown() -> None:
    # On the appliance: kvm_pvm's emulator knows no AVX. XCR0 is set from here: after an XSETBV of the guest's own
    # KVM_GET_XCRS still says 1 there (QEMU 7.2), while AVX works.
    try:
        host = kb.connect("appliance", quiet=True)
    except HostUnavailable as error:
        pytest.skip(f"no appliance: {error}")
    with host, kb.Machine(host, mode="long") as machine:
        machine.load_asm(AVX, at=0x1000)
        panel = kw.Registers(machine, sections=["vector"])
        assert "ymm" in rows(panel)
        xcrs = machine.cpu.vcpu.get_xcrs()
        xcrs.xcrs[0].value = 7
        machine.cpu.vcpu.set_xcrs(xcrs)
        assert machine.cpu.run(deadline_s=20).cause == "halt"
        panel.refresh()
        assert rows(panel)["ymm3"]["hex"] == "f" * 64
        assert rows(panel)["ymm4"]["hex"] == "0" * 56 + "12345678"


def test_without_a_page_it_prints_a_summary(machine: Any, send: Callable[..., None]) -> None:
    panel = kw.Registers(machine)
    send(kw.Controls(machine), "step")
    text = panel.text()
    assert text.startswith("Registers: ")
    assert "rax  0000000000000001*" in text
    assert panel._repr_mimebundle_()[0]["text/plain"] == text


def test_it_saves_its_data_and_its_picture_with_where_they_came_from(machine: Any, tmp_path: Path) -> None:
    panel = kw.Registers(machine)
    where = str(machine.host.provenance)
    panel.save(tmp_path / "r.csv")
    head, data = (tmp_path / "r.csv").read_text().split("section,", 1)
    assert where in head
    found = {row[1]: row[2] for row in csv.reader(data.splitlines()[1:])}
    assert found["rip"] == "0x0000000000001000"
    panel.save(tmp_path / "r.svg")
    assert (
        "rsp" in "".join(ElementTree.parse(tmp_path / "r.svg").getroot().itertext())
        or where in (tmp_path / "r.svg").read_text()
    )
    panel.save(tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(MisuseError, match=r"\.csv, \.txt, \.svg or \.png"):
        panel.save(tmp_path / "r.docx")


@pytest.mark.parametrize("target", [None, 5, "m"])
def test_a_panel_of_something_else_is_refused(target: Any) -> None:
    with pytest.raises(MisuseError, match="shows a vcpu"):
        kw.Registers(target)
