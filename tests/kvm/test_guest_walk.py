"""What `cpu.walk` says beforehand is what the guest then does: random tables, every access, both privilege levels.

Where a host does otherwise than the manual, a quirk of it says what and why; each must show itself in the test at the
end, and nothing else may differ. More than the suite tries: ``KVMBENCH_WALKS=200 KVMBENCH_SEED=7 pytest -k random``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest

import kvmbench as kb
from kvmbench.errors import AddressError, BusyError, MisuseError, UnsupportedError
from kvmbench.machine.device import Device
from kvmbench.machine.memory import Memory
from kvmbench.mmu.access import ERROR_BITS
from kvmbench.mmu.entry import Entry
from kvmbench.mmu.guest_walk import End, GuestWalk, walk_tables

from .random_tables import DATA_END, DATA_GPA, MODES, NEW_VALUE, Controls, Draw, Features, Guest, Probe, Seen

SEED = int(os.environ.get("KVMBENCH_SEED", "60001"))
PROBES = 40
P, RSVD = ERROR_BITS["P"], ERROR_BITS["RSVD"]
ACCESSED, DIRTY = 1 << 5, 1 << 6


@dataclass(frozen=True)
class Difference:
    """Something that a walk said and the guest did otherwise.

    Attributes:
        kind: "outcome", "value", "bits" (of an entry afterwards) or "translate" (KVM_TRANSLATE).
        bits: those of `entry` that are otherwise than said.
    """

    kind: str
    what: str
    guest: str
    probe: Probe
    walk: GuestWalk
    said: Seen
    seen: Seen
    entry: Entry | None = None
    bits: int = 0
    memory: Memory | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.what}\n{self.guest}\n{self.probe}\nsaid {self.said}\nseen {self.seen}\n{self.walk}"


@dataclass(frozen=True)
class Quirk:
    """What a host does otherwise than the manuals; `why` names the source."""

    name: str
    why: str
    here: Callable[[kb.Host], bool]
    explains: Callable[[Difference], bool]


def _nested_on_amd(host: kb.Host) -> bool:
    return host.info.parameters.get("kvm_amd.npt") in ("Y", "1")


def _nested_on_qemu(host: kb.Host) -> bool:
    return _nested_on_amd(host) and "QEMU" in str(host.info.emulator)


def _above_36_bits(d: Difference) -> bool:
    by_kvm = d.kind == "translate" or (d.kind == "outcome" and d.seen.vector == 14 and bool(d.seen.error_code & RSVD))
    return by_kvm and d.walk.paging.mode == "32-bit" and d.walk.gpa is not None and bool(d.walk.gpa >> 36)


def _shadow(host: kb.Host) -> bool:
    parameters = host.info.parameters
    return parameters.get("kvm_amd.npt") in ("N", "0") or parameters.get("kvm_intel.ept") in ("N", "0")


def _converted(d: Difference) -> bool:
    paging, walk = d.walk.paging, d.walk
    if d.kind != "outcome" or paging.wp or not paging.smap or paging.ac or d.probe.user or walk.end is not End.PAGE:
        return False
    # Nothing but SMAP is in the way, and R/W is clear somewhere.
    with_ac = replace(walk, paging=replace(paging, ac=True))
    writable = all(entry.raw & 2 for entry in walk.entries if entry.has_rights)
    said = replace(with_ac, access=with_ac.can(d.probe.access))
    return not writable and bool(said.access) and replace(expected(said, d.probe), value=d.seen.value) == d.seen


def _in_slot_256(d: Difference) -> bool:
    return (
        d.kind == "outcome"
        and d.probe.user
        and d.probe.gva >> 39 == 0xFFFF_8000_0000_0000 >> 39
        and d.seen == Seen(14, d.seen.error_code | ERROR_BITS["U"], d.probe.gva)
    )


def _as_on_intel(d: Difference) -> bool:
    # What the guest saw is what it would see if bit 8 of PML4Es meant nothing.
    if d.kind != "outcome" or d.walk.end is not End.RESERVED or d.walk.entries[-1].reserved != 1 << 8:
        return False
    paging = replace(d.walk.paging, processor=replace(d.walk.paging.processor, amd=False))
    walk = walk_tables(d.memory, paging, d.probe.gva)
    said = expected(replace(walk, access=walk.can(d.probe.access)), d.probe)
    if walk.end is End.RESERVED:
        said = replace(said, error_code=said.error_code & ~P)
    return d.seen in (said, replace(said, value=d.seen.value))


QUIRKS = (
    Quirk(
        "qemu-rsvd-without-p",
        "QEMU, target/i386/tcg/sysemu/excp_helper.c, mmu_translate: do_fault_rsvd leaves P clear, which SDM volume 3, "
        "'Page-Fault Exceptions' has set for reserved bits",
        _nested_on_qemu,
        lambda d: (
            d.kind == "outcome"
            and d.walk.end is End.RESERVED
            and d.seen == Seen(14, d.said.error_code & ~P, d.probe.gva)
        ),
    ),
    Quirk(
        "qemu-accessed-pdpte",
        "QEMU, the same: it sets the accessed flag in PDPTEs of PAE, where SDM volume 3, 'PAE Paging' has none",
        _nested_on_qemu,
        lambda d: (
            d.kind == "bits"
            and d.walk.paging.mode == "PAE"
            and d.entry is not None
            and d.entry.level == "PDPTE"
            and d.bits == ACCESSED
        ),
    ),
    Quirk(
        "qemu-pml4e-bit-8",
        "QEMU, the same: bit 8 of PML4Es is ignored, as on Intel; APM volume 2, 'Page Translation and Protection' has "
        "it reserved, and the guest's CPUID says AMD",
        _nested_on_qemu,
        _as_on_intel,
    ),
    Quirk(
        "kvm-wp-0-smap",
        "Linux, arch/x86/kvm/mmu/paging_tmpl.h, FNAME(page_fault): with CR0.WP clear a supervisor's write to a "
        "read-only user page makes it a supervisor's in the shadow tables; from then on SMAP does not see it",
        _shadow,
        _converted,
    ),
    Quirk(
        "kvm-fetch-without-pae",
        "Linux, arch/x86/kvm/mmu/paging_tmpl.h, FNAME(walk_addr_generic): KVM tells of a fetch in error codes wherever "
        "EFER.NXE is set; SDM volume 3, 'Page-Fault Exceptions' asks for CR4.PAE too",
        _shadow,
        lambda d: (
            d.kind == "outcome"
            and d.walk.paging.mode == "32-bit"
            and d.probe.access == "execute"
            and d.seen == replace(d.said, error_code=d.said.error_code | ERROR_BITS["I"])
        ),
    ),
    Quirk(
        "pvm-slot-256",
        "kvm_pvm, seen with Linux 6.18 and not traced: what CPL 3 does in the 512 GiB from 0xffff800000000000 on "
        "always faults, with error codes of tables that are not the guest's",
        lambda host: host.info.module == "kvm_pvm",
        _in_slot_256,
    ),
    Quirk(
        "kvm-pse-36",
        "Linux, arch/x86/kvm/mmu/mmu.c, __reset_rsvds_bits_mask: KVM's own walks take bits 17 to 21 of a PDE of 4 MiB "
        "for reserved, whatever MAXPHYADDR; they serve KVM_TRANSLATE, and the guest with shadow paging",
        lambda host: True,
        _above_36_bits,
    ),
)


def expected(walk: GuestWalk, probe: Probe) -> Seen:
    """What a walk says the guest will see."""
    verdict = walk.access
    if not verdict:
        return Seen(verdict.vector, verdict.error_code, probe.gva if verdict.vector == 14 else 0)
    if walk.gpa >= DATA_END:
        return Seen(mmio_gpa=walk.gpa)
    if probe.access == "read" and probe.gpa is not None and walk.gpa >= DATA_GPA:
        return Seen(value=walk.gpa & ~0xF)
    return Seen()


def differences(guest: Guest, probe: Probe, name: str, tally: Counter[str]) -> Iterator[Difference]:
    """Says what a probe will do, has the guest make it, and compares."""
    cpu, memory = guest.machine.cpu, guest.machine.memory
    guest.prepare(probe)
    walk = cpu.walk(probe.gva, probe.access)
    # Tables outside memory are up to KVM; what is fetched from devices is up to its emulator.
    unforeseen = walk.access and probe.access == "execute" and (probe.gpa is None or walk.gpa >= DATA_END)
    if walk.end is End.OUTSIDE or unforeseen:
        tally["not tried"] += 1
        return
    said = expected(walk, probe)

    def differs(kind: str, what: str, seen: Seen, entry: Entry | None = None, bits: int = 0) -> Difference:
        return Difference(kind, what, name, probe, walk, said, seen, entry, bits, memory)

    # KVM_TRANSLATE asks for a read by a supervisor, and does not look whether an address is canonical.
    readable = walk.gpa if walk.can("read", user=False) else None
    if walk.end is not End.NOT_CANONICAL and (by_kvm := cpu.translate(probe.gva)) != readable:
        yield differs("translate", f"KVM_TRANSLATE says {by_kvm}", Seen())
    if walk.access and probe.gpa is not None and walk.gpa != probe.gpa:
        yield differs("value", f"it was drawn for gpa {probe.gpa:#x}", Seen())
    seen = guest.make(probe)
    tally[walk.access.exception or ("MMIO" if said.mmio_gpa else f"{probe.access}s")] += 1
    # What is read where nobody said what is there, is not compared.
    told = replace(seen, value=None) if said.value is None else seen
    if said != told:
        yield differs("outcome", "another outcome", seen)
        return
    if said.mmio_gpa is not None:
        return
    if walk.access and probe.access == "write" and memory.read_u32(walk.gpa) != NEW_VALUE:
        yield differs("value", "what was written is not where the walk leads", seen)
    sets = [(entry.gpa, ACCESSED if flag == "accessed" else DIRTY) for entry, flag in walk.access.sets]
    for entry in walk.entries:
        now = int.from_bytes(memory.read(entry.gpa, walk.paging.entry_bytes), "little")
        # An access that faults may set accessed flags on its way (SDM volume 3, "Accessed and Dirty Flags").
        wrong = now ^ (entry.raw | sum(bit for gpa, bit in sets if gpa == entry.gpa))
        if wrong & ~(0 if walk.access or not entry.has_rights else ACCESSED):
            yield differs("bits", f"the {entry.where} became {now:#x}", seen, entry, wrong)


def tried(host: kb.Host, mode: str, guests: int, seed: int) -> tuple[list[Difference], Counter[str]]:
    """Puts as many guests to their probes; what no quirk explains, and how often there was what."""
    has, found, tally = Features.of(host), [], Counter()
    if mode == "5-level" and "la57" not in has.names:
        pytest.skip(f"{host.info.module} has no 5-level paging here")
    for n in range(guests):
        rng = random.Random(f"{seed} {mode} {n}")
        controls = Controls.draw(rng, mode, has)
        draw = Draw(rng, controls, has)
        with open_guest(host, controls, draw) as guest:
            for probe in draw.probes(PROBES):
                for one in differences(guest, probe, f"seed {seed}, {mode}, guest {n}: {controls}", tally):
                    by = explained(host, one)
                    if by:
                        tally[by] += 1
                    else:
                        found.append(one)
    return found, tally


def open_guest(host: kb.Host, controls: Controls, draw: Draw) -> Guest:
    try:
        return Guest(host, controls, draw.drawn)
    except UnsupportedError as error:
        pytest.skip(str(error))


def explained(host: kb.Host, difference: Difference) -> str:
    """The name of the quirk that explains a difference, or ""."""
    return next((one.name for one in QUIRKS if one.here(host) and one.explains(difference)), "")


def guests_for(host: kb.Host, request: pytest.FixtureRequest) -> int:
    # The agents have the same KVM as local.
    few = {"local": 40, "npt1": 8, "npt0": 8, "intel": 4, "intel0": 4}
    return int(os.environ.get("KVMBENCH_WALKS", 0)) or few.get(request.node.callspec.params["host"], 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_walk_of_random_tables_says_what_the_guest_then_does(host, request, mode):
    found, tally = tried(host, mode, guests_for(host, request), SEED)
    assert not found, f"{len(found)} differences; the first:\n{found[0]}"
    assert tally["reads"] + tally["writes"] + tally["executes"] > 5
    assert sum(count for name, count in tally.items() if name.startswith("#PF")) > 5


# The least that shows a quirk: mode, control bits, entry bits to flip by level, probe (gva and gpa of no page of ours).
GVA = {"32-bit": 0x40_0000 * 9, "PAE": 0x4000_0000, "4-level": 1 << 40, "5-level": 1 << 50}
DATA_PAGE = 0x30_0000
SHOWN = {
    "qemu-rsvd-without-p": ("4-level", {}, {3: 1 << 45}, [("read", False, False)]),
    "qemu-accessed-pdpte": ("PAE", {}, {}, [("read", False, False)]),
    "qemu-pml4e-bit-8": ("4-level", {}, {0: 1 << 8}, [("read", False, False)]),
    "kvm-wp-0-smap": ("4-level", {"smap": True, "wp": False}, {3: 2}, [("write", False, True), ("read", False, False)]),
    "kvm-fetch-without-pae": ("32-bit", {"nxe": True}, {1: 1}, [("execute", False, False)]),
    "pvm-slot-256": ("4-level", {}, {}, [("read", True, False)]),
    "kvm-pse-36": ("32-bit", {"pse": True}, {0: 0x80}, [("read", False, False)]),
}


@pytest.mark.parametrize("name", SHOWN)
def test_each_quirk_shows_itself_where_it_is_said_to_be_and_nowhere_else(host, name):
    mode, options, change, accesses = SHOWN[name]
    has = Features.of(host)
    if missing := {"smap"} & options.keys() - has.names:
        pytest.skip(f"{host.info.module} has no {', '.join(missing)} here")
    quirk = next(one for one in QUIRKS if one.name == name)
    controls = Controls(
        mode, **{**dict.fromkeys(("wp", "pge", "smep", "smap", "nxe", "pse", "pku"), False), "pkru": 0, **options}
    )
    draw = Draw(random.Random(0), controls, has, paths=0)
    gva = 0xFFFF_8000_0000_0000 if name == "pvm-slot-256" else GVA[mode]
    draw.lead(gva, DATA_PAGE, change=change)
    seen = []
    with open_guest(host, controls, draw) as guest:
        for access, user, ac in accesses:
            probe = Probe(gva + 4, access, user, ac, None)
            seen += [explained(host, one) or str(one) for one in differences(guest, probe, name, Counter())]
    assert set(seen) == ({name} if quirk.here(host) else set())


def test_a_pdpte_that_leads_outside_of_memory_ends_a_guest_with_shadow_paging(host):
    # Linux, arch/x86/kvm/mmu/mmu.c, mmu_alloc_shadow_roots: mmu_check_root asks for a triple fault.
    controls = Controls("PAE", *(False,) * 7, pkru=0)
    draw = Draw(random.Random(0), controls, Features.of(host), paths=0)
    draw.drawn.tables[draw.drawn.root][3] = 0x7000_0001
    with open_guest(host, controls, draw) as guest:
        probe = Probe(0x20_0000, "read", False, False, None)
        guest.prepare(probe)
        assert guest.machine.cpu.walk(0xC000_0000).end is End.OUTSIDE
        seen = guest.make(probe)
        assert ("shutdown" in seen.other) == _shadow(host)
        assert (seen.vector == 14) == (not _shadow(host))


def test_pdptes_are_those_that_the_processor_uses_and_not_those_in_memory_by_now(host):
    controls = Controls("PAE", *(False,) * 7, pkru=0)
    draw = Draw(random.Random(0), controls, Features.of(host), paths=0)
    draw.lead(0x4000_0000, DATA_PAGE)
    with open_guest(host, controls, draw) as guest:
        memory, cpu = guest.machine.memory, guest.machine.cpu
        at, probe = draw.drawn.root + 8, Probe(0x4000_0004, "read", False, False, DATA_PAGE + 4)
        guest.prepare(probe)
        assert guest.make(probe) == Seen(value=DATA_PAGE)
        memory.write_u64(at, 0)
        guest.prepare(probe)
        walk = cpu.walk(probe.gva, "read")
        assert walk.paging.pdptes_from == ("memory" if _nested_on_amd(host) else "registers")
        assert guest.make(probe) == expected(walk, probe)
        # Another CR3, though it is the same, is loaded from memory.
        assert cpu.walk(probe.gva, cr3=draw.drawn.root).end is End.NOT_PRESENT


def test_a_walk_and_a_map_hide_the_bytes_of_breakpoints(host, written):
    with kb.Machine(host, memory="4M", vcpus=2) as m:
        m.load_asm("spin: jmp spin", at=0x1000)
        cpu = m.cpu
        entry = cpu.walk(0x20_0000).leaf
        m.cpus[1].breakpoints.add(entry.gpa, mechanism=written)
        with m.others_running(cpu):
            assert cpu.walk(0x20_0000).leaf.raw == entry.raw
            assert cpu.address_space().find(0x20_0000).rights == "rwx supervisor"


def test_a_vcpu_that_runs_is_not_walked(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("spin: jmp spin", at=0x1000)
        with m.others_running(m.cpu):
            for ask in (lambda: m.cpus[1].walk(0x1000), m.cpus[1].address_space):
                with pytest.raises(BusyError, match=r"vcpu 1 is running; cpu\.interrupt\(\) stops it"):
                    ask()
            assert m.cpu.walk(0x1000).gpa == 0x1000
        assert m.cpus[1].walk(0x1000, "execute").access


def test_a_device_may_walk_the_vcpu_that_asks_it(host, machine):
    class Asker(Device):
        ports = (range(0x500, 0x501),)
        walk = None

        def port_out(self, port, value, size_bytes):
            self.walk = machine.cpu.walk(0x1000)

    asker = Asker()
    machine.attach(asker)
    machine.load_asm("mov dx, 0x500; out dx, al; hlt", at=0x1000)
    machine.cpu.run(deadline_s=10)
    assert asker.walk.gpa == 0x1000


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda cpu: cpu.walk(0, "wirte"), MisuseError, "access='wirte': did you mean 'write'"),
        (lambda cpu: cpu.walk("nowhere"), MisuseError, "nowhere"),
        (lambda cpu: cpu.walk(1.5), MisuseError, "1.5"),
        (lambda cpu: cpu.walk(0, cr3=-1), MisuseError, "cr3=-1: give at least 0"),
        (lambda cpu: cpu.walk(0, cr3=0x7000_0000), AddressError,
         "cr3=0x70000000: its table at gpa 0x70000000 is not guest memory; there is 0x0 to 0x1fffff"),
        (lambda cpu: cpu.address_space(cr3=0x7000_0000), AddressError, "cr3=0x70000000: its table"),
        (lambda cpu: cpu.walk(0, acess="read"), MisuseError, "has no option 'acess'; did you mean 'access'"),
    ],
)  # fmt: skip
def test_a_wrong_question_is_answered_with_what_would_be_right(machine, ask, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        ask(machine.cpu)
    assert machine.cpu.walk(0x1000).gpa == 0x1000


def test_a_wild_cr3_of_the_guest_s_own_is_told_and_no_error(machine):
    machine.cpu.regs.cr3 = 0x7000_0000
    walk = machine.cpu.walk(0x1000, "read")
    assert (walk.end, walk.access.vector) == (End.OUTSIDE, None)
    assert "CR3 leads there" in walk.why
    assert machine.cpu.address_space().warnings == (
        "the table at gpa 0x70000000, where CR3 points, is not guest memory",
    )


def test_with_paging_off_a_linear_address_is_its_gpa(host):
    with kb.Machine(host, memory="2M", mode="protected") as m:
        walk = m.cpu.walk(0x1234, "write", user=True)
        assert (walk.gpa, walk.entries, bool(walk.access)) == (0x1234, (), True)
        assert repr(walk).startswith("gva 0x1234 -> gpa 0x1234, paging is off")
        with pytest.raises(MisuseError, match="gva=0x100000000: linear addresses have 32 bits with off paging"):
            m.cpu.walk(1 << 32)
        with pytest.raises(MisuseError, match="paging is off"):
            m.cpu.address_space()


def test_a_symbol_is_walked_too(machine):
    machine.load_asm("nop; there: hlt", at=0x1000)
    assert machine.cpu.walk("there").gpa == 0x1001
