"""Several vcpus: each with its own state, running at once."""

from __future__ import annotations

import kvmbench as kb

COUNT = """
again:  lock inc qword ptr [0x3000]
        jmp again
"""


def test_each_vcpu_steps_by_itself(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov eax, 1\nmov eax, 2\nmov eax, 3\nhlt", at=0x1000)
        first, second = m.cpus
        second.regs.rip = 0x1005
        first.step()
        second.step(2)
        assert (first.regs.eax, second.regs.eax) == (1, 3)
        assert (first.regs.rip, second.regs.rip) == (0x1005, 0x100F)


def test_two_vcpus_run_at_once_and_one_stop_stops_both(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("waiting: cmp qword ptr [0x3000], 0\nje waiting\nhlt", at=0x1000)
        m.load_asm("mov qword ptr [0x3000], 1\nspin: jmp spin", at=0x2000)
        m.cpus[0].regs.rip = 0x1000
        m.cpus[1].regs.rip = 0x2000
        stops = m.run(deadline_s=60)
        assert stops[0].cause is kb.Cause.HALT, "the other vcpu let it go"
        assert stops[1].cause is kb.Cause.INTERRUPTED
        assert stops[1].vcpu == 1
        assert m.cpus[1].step().cause is kb.Cause.STEP


def test_a_deadline_stops_all_vcpus(host):
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm(COUNT, at=0x1000)
        for cpu in m.cpus:
            cpu.regs.rip = 0x1000
        stops = m.run(deadline_s=0.3)
        assert {stop.cause for stop in stops} <= {kb.Cause.DEADLINE, kb.Cause.INTERRUPTED}
        assert kb.Cause.DEADLINE in {stop.cause for stop in stops}
        assert m.memory.read_u64(0x3000) > 0


def test_two_machines_in_one_host_do_not_meet(host):
    with kb.Machine(host, memory="2M") as a, kb.Machine(host, memory="2M") as b:
        for m, value in ((a, 1), (b, 2)):
            m.load_asm(f"mov eax, {value}\nmov [0x3000], eax\nhlt", at=0x1000)
        a.cpu.step()
        b.cpu.run(deadline_s=10)
        a.cpu.run(deadline_s=10)
        assert (a.memory.read_u32(0x3000), b.memory.read_u32(0x3000)) == (1, 2)


def test_a_watchpoint_of_one_vcpu_loses_nothing_that_another_writes_or_reads(host, require):
    require("readonly_slot")
    require("no_slot")
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("mov dword ptr [0x3000], 7\nmov eax, [0x4000]\nhlt", at=0x1000)
        m.memory.write_u32(0x4000, 99)
        first, second = m.cpus
        first.breakpoints.watch(0x3010, 8, "w", mechanism="read-only slot")
        first.breakpoints.watch(0x4010, 8, "rw", mechanism="absent slot")
        assert second.run(deadline_s=10).cause is kb.Cause.HALT
        assert (second.regs.eax, m.memory.read_u32(0x3000), m.bus.unclaimed) == (99, 7, {})


def test_a_page_stays_protected_until_the_last_vcpu_s_watchpoint_is_gone(host, require):
    require("readonly_slot")
    with kb.Machine(host, memory="2M", vcpus=2) as m:
        m.load_asm("again: inc dword ptr [0x3000]\njmp again", at=0x1000)
        first, second = m.cpus
        mine = first.breakpoints.watch(0x3000, 4, "w", mechanism="read-only slot")
        other = second.breakpoints.watch(0x3000, 4, "w", mechanism="read-only slot")
        first.breakpoints.remove(mine)
        stop = second.run(deadline_s=10)
        assert (stop.cause, stop.breakpoint) == (kb.Cause.WATCHPOINT, other)
        second.breakpoints.clear()
        assert m.protected == {}
