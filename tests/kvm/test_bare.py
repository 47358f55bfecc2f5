"""KVM_RUN with nothing of ours around it, which conformance compares kvmbench with."""

from __future__ import annotations

import pytest

import kvmbench as kb
from kvmbench.conformance.bare import BLOCKIRQ, DONE, STEP, Bare
from kvmbench.core import wire
from kvmbench.errors import MisuseError


def test_a_bare_run_is_one_kvm_run_and_tells_where_it_led(host: kb.Host, require):
    require("step")
    with Bare(host, f"nop\nhere: nop\nthere: nop\n{DONE}") as guest:
        guest.debug(STEP)
        assert guest.run() == "#DB at here, dr6 0xffff4ff0"
        assert guest.step(BLOCKIRQ) == "#DB at there, dr6 0xffff4ff0"
        guest.debug()
        assert guest.run() == "done"


def test_what_a_bare_run_leaves_undone_is_not_mended(host: kb.Host):
    # A step that enters a handler ends at its first instruction in kvmbench, and nowhere in KVM.
    source = f"nop\nud2\nafter: nop\nend: nop\n{DONE}handler: add qword ptr [rsp], 2\nlast: iretq\n"
    with Bare(host, source, handlers={6: "handler"}) as guest:
        told = list(guest.steps(2))[-1]
    assert "at handler" not in told
    assert "at last" in told or "at end" in told


@pytest.mark.parametrize(("mode", "flags"), [(wire.KB_RUN, 0), (wire.KB_STEP, 0), (wire.KB_STEP, wire.KB_BARE)])
def test_kvm_s_own_step_is_for_bare_runs_only(host: kb.Host, mode: int, flags: int):
    with Bare(host, f"nop\n{DONE}") as guest:
        request = guest.execution.request
        request.mode, request.flags = mode, flags
        request.steps = 1 if mode == wire.KB_STEP else 0
        guest.debug(STEP)
        with pytest.raises(MisuseError):
            guest.run()
