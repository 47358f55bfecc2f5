"""A guest that halts for ever with interrupt controllers in the kernel: KVM_RUN itself does not come back."""

from __future__ import annotations

import threading
import time

import kvmbench as kb


def test_the_deadline_stops_a_halted_guest_and_it_stays_usable(host):
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm("mov eax, 1\nhlt\nmov eax, 2\nhlt", at=0x1000)
        start = time.monotonic()
        stop = m.cpu.run(deadline_s=0.2)
        assert stop.cause is kb.Cause.DEADLINE
        assert time.monotonic() - start < 10
        assert (m.cpu.regs.eax, m.cpu.regs.rip) == (1, 0x1006)
        # It is still halted: nothing woke it.
        assert m.cpu.run(deadline_s=0.1).cause is kb.Cause.DEADLINE
        assert m.cpu.regs.eax == 1
        m.load_asm("mov eax, 3\nout 0xf4, al\nhlt", at=0x1000)
        stop = m.cpu.run(deadline_s=10)
        assert (stop.cause, m.cpu.regs.eax) == (kb.Cause.GUEST_EXIT, 3)


def test_a_step_onto_hlt_with_an_irqchip_comes_back(host):
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm("mov eax, 1\nhlt\nmov eax, 2\nhlt", at=0x1000)
        assert m.cpu.step().cause is kb.Cause.STEP
        causes = [m.cpu.step(deadline_s=0.2).cause for _ in range(2)]
        assert set(causes) <= {kb.Cause.STEP, kb.Cause.HALT, kb.Cause.DEADLINE}
        assert m.cpu.regs.rip >= 0x1006


def test_interrupt_stops_a_halted_guest(host):
    with kb.Machine(host, memory="2M", irqchip=True) as m:
        m.load_asm("hlt", at=0x1000)
        stops: list[kb.Stop] = []
        thread = threading.Thread(target=lambda: stops.append(m.cpu.run(deadline_s=60)))
        thread.start()
        while thread.is_alive():
            m.cpu.interrupt()
            thread.join(0.01)
        assert stops[0].cause is kb.Cause.INTERRUPTED


def test_a_halted_guest_does_not_hold_up_the_end_of_its_host(fresh_host):
    m = kb.Machine(fresh_host, memory="2M", irqchip=True)
    m.load_asm("mov byte ptr [0x3000], 1\nhlt", at=0x1000)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            m.cpu.run()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    while m.memory.read(0x3000, 1) != b"\x01":
        assert thread.is_alive(), errors
    start = time.monotonic()
    fresh_host.close()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - start < 5
    assert all(isinstance(error, (kb.errors.ClosedError, kb.errors.HostError)) for error in errors)


def test_a_halt_where_the_caller_has_moved_the_vcpu_is_one_in_lock_step_too(host):
    """With interrupt controllers kvm_pvm leaves a vcpu that stepped a HLT running; lock-step halts it."""
    with kb.Machine(host, memory="2M", vcpus=2, irqchip=True) as m:
        m.load_asm("start: hlt\nnop\nnop\nelsewhere: nop\nnop\n", at=0x1000)
        m.cpu.regs.rip = m.symbols["elsewhere"]
        m.cpu.step()
        m.cpu.regs.rip = m.symbols["start"]
        record = m.lockstep(4, cpus=[0])
        assert record.rip.tolist() == [m.symbols["start"] + 1]
