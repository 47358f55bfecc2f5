"""Each rule of access rights, and the error code that the processor pushes where it is broken."""

from __future__ import annotations

import pytest

from kvmbench.mmu.guest_walk import walk_tables

NX = 1 << 63
P, W, U, RSVD, FETCH, PK = 1, 2, 4, 8, 16, 32
SUPERVISOR, USER = False, True
RW_USER = {0x1000: 0x2027, 0x2000: 0x3027, 0x3000: 0x4027, 0x4028: 0x9067}


def page(**levels):
    """Tables of one page at 0x5000; a level's entry may be changed: PTE=clear W."""
    at = {"PML4E": 0x1000, "PDPTE": 0x2000, "PDE": 0x3000, "PTE": 0x4028}
    entries = dict(RW_USER)
    for level, change in levels.items():
        entries[at[level]] = change(entries[at[level]])
    return entries


def without(bit):
    return lambda entry: entry & ~bit


def with_bits(bits):
    return lambda entry: entry | bits


@pytest.fixture
def verdict(pages, make_paging):
    def ask(entries, access, user, gva=0x5123, **options):
        implicit = options.pop("implicit", False)
        walk = walk_tables(pages.put(entries), make_paging(**options), gva)
        return walk.can(access, user=user, implicit=implicit)

    return ask


# Tables, access, user, options: goes through.
@pytest.mark.parametrize(
    ("entries", "access", "user", "options"),
    [
        (page(), "read", USER, {}),
        (page(), "write", USER, {}),
        (page(), "execute", USER, {"nxe": True}),
        (page(PTE=without(W)), "read", USER, {"wp": True}),
        (page(PTE=without(W)), "write", SUPERVISOR, {}),
        (page(PTE=without(U)), "execute", SUPERVISOR, {"smep": True}),
        (page(), "execute", SUPERVISOR, {"smap": True}),
        (page(), "read", SUPERVISOR, {"smep": True}),
        (page(), "write", SUPERVISOR, {"smap": True, "ac": True, "wp": True}),
        (page(PTE=with_bits(NX)), "read", USER, {"nxe": True}),
        (page(PTE=with_bits(3 << 59)), "execute", USER, {"pke": True, "pkru": 0xFFFF_FFFF}),
        (page(PTE=with_bits(3 << 59)), "read", USER, {"pke": True, "pkru": 2 << 6}),
        (page(PTE=with_bits(3 << 59)), "write", SUPERVISOR, {"pke": True, "pkru": 2 << 6}),
        (page(PTE=with_bits(3 << 59)), "read", USER, {"pkru": 1 << 6}),
        (page(PTE=with_bits(3 << 59)), "read", USER, {"pks": True, "pkrs": 1 << 6}),
    ],
)
def test_an_access_with_all_rights_goes_through(verdict, entries, access, user, options):
    found = verdict(entries, access, user, **options)
    assert found
    assert (found.why, found.vector, found.error_code, found.exception) == ("", None, None, "")


@pytest.mark.parametrize(
    ("entries", "access", "user", "options", "code", "why"),
    [
        (page(PTE=without(P)), "read", SUPERVISOR, {}, 0, "P is clear in the PTE at gpa 0x4028"),
        (page(PDE=without(P)), "write", USER, {}, W | U, "P is clear in the PDE at gpa 0x3000"),
        (page(PTE=without(P)), "execute", USER, {}, U, "P is clear"),
        (page(PTE=without(P)), "execute", USER, {"fetch_told": True}, U | FETCH, "P is clear"),
        (page(PDE=with_bits(1 << 45)), "write", USER, {}, P | W | U | RSVD, "reserved bits of the PDE at gpa 0x3000"),
        (page(PTE=with_bits(NX)), "read", SUPERVISOR, {}, P | RSVD, "are set: 63"),
        (page(PDPTE=without(U)), "read", USER, {}, P | U, "U/S is clear in the PDPTE at gpa 0x2000"),
        (page(PML4E=without(W)), "write", USER, {}, P | W | U, "R/W is clear in the PML4E at gpa 0x1000"),
        (page(PTE=without(W)), "write", SUPERVISOR, {"wp": True}, P | W,
         "R/W is clear in the PTE at gpa 0x4028, and CR0.WP is set"),
        (page(), "execute", SUPERVISOR, {"smep": True, "fetch_told": True}, P | FETCH,
         "CR4.SMEP is set, and U/S is set in all entries"),
        (page(), "read", SUPERVISOR, {"smap": True}, P,
         "CR4.SMAP is set, RFLAGS.AC is clear, and U/S is set in all entries"),
        (page(), "write", SUPERVISOR, {"smap": True, "ac": True, "implicit": True}, P | W, "the access is implicit"),
        (page(PDE=with_bits(NX)), "execute", USER, {"nxe": True, "fetch_told": True}, P | U | FETCH,
         "XD is set in the PDE at gpa 0x3000, and EFER.NXE is set"),
        (page(PTE=with_bits(3 << 59)), "read", USER, {"pke": True, "pkru": 1 << 6}, P | U | PK,
         "PKRU.AD3 is set, CR4.PKE is set, and the PTE at gpa 0x4028 has protection key 3"),
        (page(PTE=with_bits(3 << 59)), "read", SUPERVISOR, {"pke": True, "pkru": 1 << 6}, P | PK, "PKRU.AD3"),
        (page(PTE=with_bits(3 << 59)), "write", USER, {"pke": True, "pkru": 2 << 6}, P | W | U | PK, "PKRU.WD3"),
        (page(PTE=with_bits(3 << 59)), "write", SUPERVISOR, {"pke": True, "pkru": 2 << 6, "wp": True}, P | W | PK,
         "PKRU.WD3 is set, CR4.PKE is set, CR0.WP is set, and"),
        (page(PTE=lambda one: one & ~U | 3 << 59), "read", SUPERVISOR, {"pks": True, "pkrs": 1 << 6}, P | PK,
         "IA32_PKRS.AD3 is set, CR4.PKS is set"),
        (page(PTE=lambda one: one & ~W | 3 << 59), "write", USER, {"pke": True, "pkru": 1 << 6}, P | W | U | PK,
         "R/W is clear in the PTE at gpa 0x4028; PKRU.AD3 is set"),
    ],
)  # fmt: skip
def test_an_access_that_faults_has_an_error_code_and_a_reason(verdict, entries, access, user, options, code, why):
    found = verdict(entries, access, user, **options)
    assert not found
    assert (found.vector, found.error_code) == (14, code)
    assert why in found.why


def test_a_fault_is_named_with_its_bits(verdict):
    assert verdict(page(PTE=without(U)), "write", USER).exception == "#PF(P W U)"
    assert verdict(page(PTE=without(P)), "read", SUPERVISOR).exception == "#PF(0)"
    assert str(verdict(page(PTE=without(U)), "read", USER)) == (
        "user read: #PF(P U): U/S is clear in the PTE at gpa 0x4028"
    )


def test_an_address_that_is_not_canonical_raises_gp_or_through_the_stack_ss(pages, make_paging):
    walk = walk_tables(pages.put(page()), make_paging(), 1 << 47)
    assert (walk.can("read").vector, walk.can("read").exception) == (13, "#GP(0)")
    assert walk.can("write", stack=True).exception == "#SS(0)"


def test_a_pdpte_of_pae_with_reserved_bits_is_a_matter_of_mov_cr3(pages, make_paging):
    paging = make_paging("PAE", pdptes=(0x3003, 0, 0, 0), pdptes_from="memory")
    verdict = walk_tables(pages, paging, 0x5000).can("read")
    assert verdict.vector is None
    assert verdict.why.endswith("are set: 1; a MOV to CR3 with it raises #GP")
    walked = make_paging("PAE", pdptes=(0x3003, 0, 0, 0), pdptes_from="memory", pdptes_kept=False)
    assert walk_tables(pages, walked, 0x5000).can("read").error_code == P | RSVD


@pytest.mark.parametrize(
    ("access", "entries", "sets"),
    [
        ("read", page(), []),
        ("read", page(PTE=without(0x60), PDE=without(0x20)), [("PDE", "accessed"), ("PTE", "accessed")]),
        ("write", page(PTE=without(0x60)), [("PTE", "accessed"), ("PTE", "dirty")]),
        ("write", page(PTE=without(0x40)), [("PTE", "dirty")]),
        ("execute", page(PML4E=without(0x20), PTE=without(0x40)), [("PML4E", "accessed")]),
    ],
)
def test_a_verdict_says_which_flags_the_access_sets(verdict, access, entries, sets):
    assert [(one.level, flag) for one, flag in verdict(entries, access, USER).sets] == sets


def test_pdptes_of_pae_have_no_rights_and_no_flags(pages, make_paging):
    paging = make_paging("PAE", pdptes=(0x3001, 0, 0, 0), pdptes_from="registers", wp=True)
    walk = walk_tables(pages.put({0x3000: 0x4007, 0x4028: 0x9007}), paging, 0x5123)
    found = walk.can("write", user=True)
    assert found
    assert [(one.level, flag) for one, flag in found.sets] == [
        ("PDE", "accessed"),
        ("PTE", "accessed"),
        ("PTE", "dirty"),
    ]


def test_without_paging_everything_goes_through(pages, make_paging):
    walk = walk_tables(pages, make_paging("off"), 0x5123)
    assert walk.can("write", user=True)
    assert walk.rights(user=True) == "rwx"
