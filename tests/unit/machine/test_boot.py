"""Boot states: the bytes are decoded by an independent walk and compared with what was asked."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmbench.errors import AddressError, MisuseError
from kvmbench.kvm.segment import Segment
from kvmbench.machine import boot
from kvmbench.machine.boot import BootPlan, BootState, plan_boot

MIB = 1 << 20


def memory_of(plan: BootPlan) -> dict[int, bytes]:
    """Page number to page, of all that is placed."""
    pages: dict[int, bytearray] = {}
    for gpa, data in plan.placements:
        while data:
            offset = gpa & 0xFFF
            piece, data = data[: 4096 - offset], data[4096 - offset :]
            pages.setdefault(gpa >> 12, bytearray(4096))[offset : offset + len(piece)] = piece
            gpa += len(piece)
    return {number: bytes(page) for number, page in pages.items()}


def walk(pages: dict[int, bytes], cr3: int, linear: int, *, long: bool) -> tuple[int, bool, int] | None:
    """(physical address, user, page size) of a linear address, as the processor would find it."""

    def entry(table: int, index: int) -> int:
        page = pages.get(table >> 12, bytes(4096))
        return int(struct.unpack_from("<Q", page, (table & 0xFFF) + 8 * index)[0])

    user = True
    table = cr3
    for shift in (39, 30, 21, 12) if long else (30, 21, 12):
        index = linear >> shift & (511 if long or shift != 30 else 3)
        value = entry(table, index)
        if not value & 1:
            return None
        if not long and shift == 30:
            assert not value & 0x6, "bits 1 and 2 of a PAE page-directory pointer are reserved"
        else:
            assert value & 2, "not writable"
            user = user and bool(value & 4)
        frame = value & 0x000F_FFFF_FFFF_F000
        if shift == 12 or (shift == 21 and value & 0x80):
            size = 1 << shift
            assert frame % size == 0, "low bits of a large page's address are reserved"
            return frame | linear & (size - 1), user, size
        table = frame
    raise AssertionError("unreachable")


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["pae", "long"]),
    pages=st.integers(64, 16 * 1024),
    small=st.booleans(),
    user=st.booleans(),
    data=st.data(),
)
def test_all_memory_is_mapped_to_itself_and_nothing_else(
    mode: str, pages: int, small: bool, user: bool, data: st.DataObject
) -> None:
    size = pages * 4096
    page_bytes = 4096 if small else 2 * MIB
    plan = plan_boot(mode, size, user=user, page_bytes=page_bytes)
    cr3 = plan.state(0x1000).cr3
    memory = memory_of(plan)
    edge = -(-size // page_bytes) * page_bytes
    for linear in (0, 0x1000, size - 1, data.draw(st.integers(0, size - 1))):
        assert walk(memory, cr3, linear, long=mode == "long") == (linear, user, page_bytes)
    for linear in (edge, edge + data.draw(st.integers(0, 1 << 29)), (1 << 32) - 1):
        assert walk(memory, cr3, linear, long=mode == "long") is None


@settings(max_examples=100, deadline=None)
@given(
    mode=st.sampled_from(["protected", "pae", "long"]),
    pages=st.integers(1, 1 << 18),
    vcpus=st.integers(1, 64),
    small=st.booleans(),
)
def test_tables_and_stacks_lie_in_memory_and_apart(mode: str, pages: int, vcpus: int, small: bool) -> None:
    size = pages * 4096
    try:
        plan = plan_boot(mode, size, vcpus=vcpus, page_bytes=4096 if small else 2 * MIB)
    except AddressError:
        assert size < 4 * MIB, "this much memory holds the tables"
        return
    first, length = plan.tables
    assert first % 4096 == 0
    assert first + length <= size
    for gpa, data in plan.placements:
        assert first <= gpa
        assert gpa + len(data) <= first + length
    tops = [plan.stack(index) for index in range(vcpus)]
    assert all(top % 16 == 0 for top in tops)
    assert tops[0] <= first
    assert min(tops) - plan.stack_bytes >= 0x10000
    assert len(set(tops)) == vcpus


def test_the_usual_tables_are_at_the_documented_place() -> None:
    for mode in ("protected", "pae", "long"):
        plan = plan_boot(mode, 16 * MIB)
        assert plan.tables[0] == boot.TABLES_GPA
        assert sum(plan.tables) <= boot.TABLES_END_GPA
        assert not plan.overlaps(0x1000, 0x7F000)
        assert plan.overlaps(0x1000, 0x7F001)
        assert plan.overlaps(0x80010, 1)


def test_tables_that_are_too_many_lie_at_the_end_of_memory() -> None:
    plan = plan_boot("long", 1 << 30, page_bytes=4096)
    assert sum(plan.tables) == 1 << 30
    assert plan.tables[1] > 2 * MIB
    assert walk(memory_of(plan), plan.state(0x1000).cr3, 0x3FFF_FFFF, long=True) == (0x3FFF_FFFF, False, 4096)


def test_few_bytes_are_placed_for_a_small_machine() -> None:
    placed = sum(len(data) for _, data in plan_boot("long", 16 * MIB).placements)
    assert placed <= 4096 + 3 * 64, "a slow channel carries each of them"


def test_ranges_beyond_memory_are_mapped_when_asked_for() -> None:
    plan = plan_boot("long", 16 * MIB, mapped=[(0xFEE0_0000, 4096), (1 << 32, 4 * MIB)])
    memory, cr3 = memory_of(plan), plan.state(0x1000).cr3
    for linear in (0xFEE0_0010, (1 << 32) + 3 * MIB):
        found = walk(memory, cr3, linear, long=True)
        assert found is not None
        assert found[0] == linear
    assert walk(memory, cr3, 0xFEC0_0000, long=True) is None


# name of the mode -> CR0.PG, CR4.PAE, EFER.LMA, and L and D of CS
MODES = {
    "real": (0, 0, 0, 0, 0),
    "protected": (0, 0, 0, 0, 1),
    "pae": (1, 1, 0, 0, 1),
    "long": (1, 1, 1, 1, 0),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_control_bits_say_the_mode(mode: str) -> None:
    state = plan_boot(mode, 16 * MIB).state(0x1234)
    bits = (state.cr0 >> 31 & 1, state.cr4 >> 5 & 1, state.efer >> 10 & 1, state.cs.l, state.cs.db)
    assert bits == MODES[mode]
    assert state.cr0 & 1 == (mode != "real")
    assert state.rip == 0x1234
    assert state.rflags & 2
    assert not state.rflags & 0x200, "interrupts must be off: there is no IDT"
    assert state.cs.base == state.ss.base == 0


@pytest.mark.parametrize("mode", ["protected", "pae", "long"])
def test_user_code_starts_at_cpl_3_and_may_use_ports(mode: str) -> None:
    state = plan_boot(mode, 16 * MIB, user=True).state(0x1000)
    assert (state.cs.dpl, state.ss.dpl, state.cs.selector & 3, state.ss.selector & 3) == (3, 3, 3, 3)
    assert state.rflags >> 12 & 3 == 3


def test_user_pages_and_privilege_can_be_chosen_apart() -> None:
    plan = plan_boot("long", 16 * MIB, user=True, cpl=0)
    state = plan.state(0x1000)
    assert state.cs.dpl == 0
    assert walk(memory_of(plan), state.cr3, 0x1000, long=True) == (0x1000, True, 2 * MIB)


def decode_descriptor(raw: bytes) -> dict[str, int]:
    """A descriptor's fields, read bit by bit."""
    word = int.from_bytes(raw[:8], "little")
    limit = word & 0xFFFF | word >> 32 & 0xF0000
    base = word >> 16 & 0xFFFFFF | word >> 32 & 0xFF00_0000
    if len(raw) == 16:
        base |= int.from_bytes(raw[8:12], "little") << 32
    g = word >> 55 & 1
    return {
        "base": base, "limit": limit << 12 | 0xFFF if g else limit,
        "type": word >> 40 & 15, "s": word >> 44 & 1, "dpl": word >> 45 & 3, "present": word >> 47 & 1,
        "avl": word >> 52 & 1, "l": word >> 53 & 1, "db": word >> 54 & 1, "g": g,
    }  # fmt: skip


def gdt_entry(plan: BootPlan, state: BootState, selector: int, size: int = 8) -> bytes:
    memory = memory_of(plan)
    gpa = state.gdt.base + (selector & ~7)
    assert (selector & ~7) + size - 1 <= state.gdt.limit, "outside the GDT"
    return memory[gpa >> 12][gpa & 0xFFF : (gpa & 0xFFF) + size]


@pytest.mark.parametrize("mode", ["protected", "pae", "long"])
@pytest.mark.parametrize("user", [False, True])
@pytest.mark.parametrize("vcpu", [0, 17])
def test_every_segment_register_agrees_with_its_descriptor(mode: str, user: bool, vcpu: int) -> None:
    plan = plan_boot(mode, 16 * MIB, vcpus=18, user=user)
    state = plan.state(0x1000, vcpu=vcpu)
    for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr"):
        segment: Segment = getattr(state, name)
        size = 16 if name == "tr" and mode == "long" else 8
        decoded = decode_descriptor(gdt_entry(plan, state, segment.selector, size))
        assert decoded == {field: getattr(segment, field) for field in decoded}, name


@pytest.mark.parametrize("mode", ["protected", "long"])
def test_the_tss_holds_a_stack_for_entries_from_user_code(mode: str) -> None:
    plan = plan_boot(mode, 16 * MIB, user=True)
    state = plan.state(0x1000)
    page = memory_of(plan)[state.tr.base >> 12]
    at = state.tr.base & 0xFFF
    inner = int.from_bytes(page[at + 4 : at + (12 if mode == "long" else 8)], "little")
    assert state.rsp - plan.stack_bytes < inner < state.rsp
    if mode == "protected":
        assert int.from_bytes(page[at + 8 : at + 10], "little") == boot.DATA


@pytest.mark.parametrize("vcpus", [1, 40])
def test_the_io_bitmap_allows_every_port_to_user_code_and_is_absent_else(vcpus: int) -> None:
    for user in (False, True):
        plan = plan_boot("long", 16 * MIB, vcpus=vcpus, user=user)
        pages = memory_of(plan)
        for vcpu in (0, vcpus - 1):
            tr = plan.state(0x1000, vcpu=vcpu).tr
            raw = b"".join(pages.get((tr.base >> 12) + n, bytes(4096)) for n in range(8))
            tss = raw[tr.base & 0xFFF :][: tr.limit + 1]
            first = int.from_bytes(tss[102:104], "little")
            if not user:
                assert first > tr.limit
                continue
            assert tss[first : first + 8192] == bytes(8192), "a bit that is set forbids its port"
            assert tss[first + 8192 :] == b"\xff", "the manual wants a byte of ones at the end"


def test_descriptors_are_in_the_order_syscall_and_sysret_want() -> None:
    # SYSCALL loads CS and SS from STAR[47:32] and +8; SYSRET from STAR[63:48] + 16 and + 8.
    assert boot.DATA == boot.CODE64 + 8
    assert boot.USER_DATA == boot.USER_CODE32 + 8
    assert boot.USER_CODE64 == boot.USER_CODE32 + 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "virtual"}, "choose one of real, protected, pae, long"),
        ({"mode": "real", "user": True}, "no user code"),
        ({"mode": "long", "cpl": 3}, "add user=True"),
        ({"mode": "long", "cpl": 1}, "CPL 0 or 3"),
        ({"mode": "long", "page_bytes": 8192}, "page_bytes=8192"),
        ({"mode": "long", "vcpus": 0}, "vcpus=0"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(MisuseError, match=words):
        plan_boot(memory_bytes=16 * MIB, **options)  # type: ignore[arg-type]


def test_memory_that_cannot_hold_the_tables_is_refused() -> None:
    with pytest.raises(AddressError, match="more memory"):
        plan_boot("long", 0x4000)
    with pytest.raises(AddressError, match="64K"):
        plan_boot("real", 0x8000)
    with pytest.raises(AddressError, match="pae mode"):
        plan_boot("pae", 16 * MIB, mapped=[(1 << 32, 4096)])


@pytest.mark.parametrize(
    ("mode", "entry", "bits", "words"),
    [
        ("real", 0x1_0000, None, "0x10000 is out of reach"),
        ("real", 0x1000, 32, "cannot start in 32-bit code"),
        ("protected", 1 << 32, None, "out of reach"),
        ("pae", 0x1000, 64, "cannot start in 64-bit code"),
        ("long", 0x1000, 16, "cannot start in 16-bit code"),
        ("long", 1 << 47, None, "out of reach"),
    ],
)
def test_an_entry_that_the_mode_cannot_reach_is_refused(
    mode: str, entry: int, bits: int | None, words: str
) -> None:
    with pytest.raises(MisuseError, match=words):
        plan_boot(mode, 16 * MIB).state(entry, bits=bits)


def test_long_mode_can_start_in_compatibility_mode() -> None:
    state = plan_boot("long", 16 * MIB).state(0x1000, bits=32)
    assert (state.cs.l, state.cs.db, state.efer >> 10 & 1) == (0, 1, 1)
