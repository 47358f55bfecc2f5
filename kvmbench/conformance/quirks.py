"""The table of known quirks: emulators', KVM's, and our own limits, each with its source.

Linux sources are named as of 6.1, the appliances' kernel. What was seen and not
traced to a line of source says so.
"""

from __future__ import annotations

from kvmbench.conformance.quirk import Cause, Quirk, Where, changed, instead, only

_PVM = Where(modules=("kvm_pvm",))
_INTEL = Where(modules=("kvm_intel",))
_HARDWARE = Where(modules=("kvm_amd", "kvm_intel"))
_EVERYWHERE = Where()
_QEMU = Where(modules=("kvm_amd",), emulator="QEMU")
_QEMU_DR7 = Where(modules=("kvm_amd",), emulator="QEMU", emulator_before=(9, 1))
_INTEL_FASTPATH = Where(modules=("kvm_intel",), kernel_before=(6, 12))

_X86_C = "Linux, arch/x86/kvm/x86.c"
_EMULATE = f"{_X86_C}, x86_emulate_instruction"
_ends = only("done")


def _step(where: str) -> str:
    return f"#DB at {where}, dr6 0xffff4ff0"


def _sti(where: str, handlers: int) -> str:
    return f"{_step(where)}, handler ran {handlers} times"


_EMULATOR_QUIRKS = (
    Quirk(
        "qemu-int3",
        Cause.EMULATOR,
        _QEMU,
        "INT3 is not intercepted: it goes into the guest, to its handler or to its death.",
        "QEMU, target/i386/tcg/excp_helper.c, raise_interrupt2: INT3 asks for the intercept of INT n only",
        {
            "kvm.int3.*": instead("SHUTDOWN"),
            "kvm.reinject-bp": only("done", "own handler ran 1 times"),
        },
    ),
    Quirk(
        "qemu-inject-bp",
        Cause.EMULATOR,
        _QEMU,
        "An injected #BP never gets to its handler.",
        "seen with QEMU 7.2.22 and nrips=0; whether QEMU or kvm_amd without nrips loses it was not traced",
        {"kvm.inject-bp": changed(("ran 1 times", "ran 0 times"))},
    ),
    Quirk(
        "qemu-dr7",
        Cause.EMULATOR,
        _QEMU_DR7,
        "VMRUN does not load DR7: the debug registers that KVM sets never fire, and one that a guest set itself stays "
        "in force, in the next guest too.",
        "docs/facts.md, The appliance: right with QEMU 10.0; docs/decisions/0005-self-check-not-versions.md",
        {
            "kvm.execute.*": _ends,
            "kvm.write.*": _ends,
            "kvm.access.*": _ends,
            "kvm.gd": _ends,
            "kvm.step.and-breakpoint": instead(_step("b"), _step("c")),
        },
    ),
    Quirk(
        "qemu-sti",
        Cause.EMULATOR,
        _QEMU,
        "A step over STI takes the next instruction along, as over MOV SS: the shadow holds off the trap as well.",
        "seen with QEMU 7.2.22; not traced. The selftest and Bochs have a stop behind STI",
        {
            "kvm.step.selftest": instead(
                *map(_step, ("ss_start", "s_cpuid", "s_mov", "s_wrmsr", "s_cli", "s_end", "done")),
                "handler ran 0 times",
            ),
            "kvm.step.sti-shadow": instead(_step("s2"), "shadow 0"),
            "kvm.blockirq.off": instead(_sti("s_sti", 0), _sti("s2", 0), _sti("s3", 1), _sti("s4", 1), _sti("done", 1)),
            "kvm.blockirq.released": changed((_step("s2"), _step("s3")), (_step("s1"), _step("s2"))),
            "kvmbench.step.selftest": instead(
                *(f"step at {at}" for at in ("ss_start", "s_cpuid", "s_mov", "s_wrmsr", "s_cli", "s_end", "end")),
                "handler ran 0 times",
            ),
            "kvmbench.step.sti-shadow": instead(
                "step at s_sti", "step at s2", "step at handler, entered 96", "step at handler+0x2"
            ),
        },
    ),
)

_KVM_QUIRKS = (
    Quirk(
        "tf-one-rip",
        Cause.KVM,
        _HARDWARE,
        "TF is set for the rip at the time of KVM_SET_GUEST_DEBUG only; after rip was written the guest runs on.",
        f"{_X86_C}, __kvm_set_rflags and singlestep_rip",
        {"kvm.step.moved": _ends},
    ),
    Quirk(
        "tf-hidden",
        Cause.KVM,
        _EVERYWHERE,
        "While KVM steps, KVM_GET_REGS hides TF, the guest's own too, and the guest has lost it afterwards.",
        f"{_X86_C}, kvm_get_rflags and kvm_arch_vcpu_ioctl_set_guest_debug",
        {"kvm.tf.hidden": instead("TF set", "stepped: TF clear", "afterwards: TF clear")},
    ),
    Quirk(
        "tf-pushed",
        Cause.KVM,
        _HARDWARE,
        "TF is in the real RFLAGS of the guest, so PUSHF stores it.",
        f"{_X86_C}, __kvm_set_rflags: the processor has no other way to step a guest without VMX's monitor trap",
        {"kvm.tf.pushf": changed(("TF clear", "TF set"))},
    ),
    Quirk(
        "tf-in-frames",
        Cause.KVM,
        _EVERYWHERE,
        "TF is in the real RFLAGS of the guest, so exceptions and interrupts push it, and IRET brings it back.",
        f"{_X86_C}, __kvm_set_rflags",
        {
            "kvm.tf.exception-frame": changed(("TF clear", "TF set")),
            "kvm.tf.interrupt-frame": changed(("TF clear", "TF set")),
        },
    ),
    Quirk(
        "tf-in-int-frames",
        Cause.KVM,
        _HARDWARE,
        "The same for INT n.",
        f"{_X86_C}, __kvm_set_rflags",
        {"kvm.tf.int-frame": changed(("TF clear", "TF set"))},
    ),
    Quirk(
        "vmx-sti-shadow",
        Cause.KVM,
        _INTEL,
        "KVM clears the shadows of STI and MOV SS before each entry while it steps, so an interrupt that waits comes "
        "one instruction early.",
        "Linux, arch/x86/kvm/vmx/vmx.c, vmx_vcpu_run, When single-stepping over STI and MOV SS",
        {
            "kvm.step.sti-shadow": changed(("shadow 2", "shadow 0")),
            "kvm.blockirq.off": changed((_sti("s2", 0), _sti("s2", 1))),
            "kvmbench.step.sti-shadow": instead(
                "step at s_sti", "step at s1", "step at handler, entered 96", "step at handler+0x2"
            ),
        },
    ),
    Quirk(
        "wrmsr-fastpath",
        Cause.KVM,
        _INTEL_FASTPATH,
        "A WRMSR to IA32_TSC_DEADLINE that KVM handles in its fast path, as it does where it has VMX's preemption "
        "timer, swallows the step: the next instruction is taken along.",
        'Linux 6.12, f7f39c50edb9 "KVM: x86: Exit to userspace if fastpath triggers one on instruction skip"',
        {
            "kvm.step.selftest": instead(
                *map(_step, ("ss_start", "s_xor", "s_cpuid", "s_mov", "s_wrmsr", "s_end", "done")),
                "handler ran 0 times",
            ),
            "kvmbench.step.selftest": instead(
                *(f"step at {at}" for at in ("ss_start", "s_xor", "s_cpuid", "s_mov", "s_wrmsr", "s_end", "end")),
                "handler ran 0 times",
            ),
        },
    ),
    Quirk(
        "hlt-irqchip-waits",
        Cause.KVM,
        _HARDWARE,
        "The step over HLT ends, and the vcpu goes on to wait in the kernel: the trap does not wake it.",
        f"{_X86_C}, kvm_emulate_halt: the wait is noted although the step has ended",
        {"kvm.exit.hlt-irqchip": changed((_step("h_end"), "no exit, rip at h_next"))},
    ),
    Quirk(
        "mmio-write-rip",
        Cause.KVM,
        _EVERYWHERE,
        "At the exit of an MMIO write rip is behind the instruction already.",
        f"{_EMULATE}: a write is written back before its exit",
        {
            "kvm.exit.mmio-write": changed(("0x40000000 at m_write", "0x40000000 at m_next")),
            "kvm.mmio-watchpoint": changed(("0x40000000 at m_write", "0x40000000 at m_next")),
        },
    ),
    Quirk(
        "mmio-write-step",
        Cause.KVM,
        _HARDWARE,
        "A step over an MMIO write is lost: its completion neither ends the step nor sets TF again.",
        f"{_EMULATE}, complete_emulated_mmio; test_an_access_outside_memory_is_one_step",
        {"kvm.exit.mmio-write": lambda expected: (*expected[:2], "done")},
    ),
    Quirk(
        "emulated-data",
        Cause.KVM,
        _EVERYWHERE,
        "KVM's instruction emulator looks at no data breakpoints.",
        f"{_X86_C}, kvm_vcpu_check_code_breakpoint; test_more_watchpoints_than_debug_registers_still_all_stop",
        {"kvm.mmio-watchpoint": lambda expected: (expected[0], "done")},
    ),
    Quirk(
        "translate-rights",
        Cause.KVM,
        _EVERYWHERE,
        "KVM_TRANSLATE says writeable and not usermode of every page.",
        f"{_X86_C}, kvm_arch_vcpu_ioctl_translate: both are constants",
        {"kvm.translate": instead("valid 1, writeable 1, usermode 0")},
    ),
)

_PVM_QUIRKS = (
    Quirk(
        "pvm-int-n",
        Cause.KVM,
        _PVM,
        "Code at CPL 0 is run by KVM's instruction emulator, which has no INT3 and no INT n outside real mode.",
        "Linux, arch/x86/kvm/emulate.c, emulate_int",
        {
            "kvm.int3.cpl0": instead("INTERNAL_ERROR at sw_bp"),
            "kvm.reinject-bp": instead("INTERNAL_ERROR at sw_bp", "own handler ran 0 times"),
            "kvm.tf.int-frame": changed(("OUT 0xf6", "INTERNAL_ERROR")),
            "kvmbench.step.enters.int": instead("error at enter"),
            "kvmbench.step.enters.bp": instead("error at enter"),
            "kvmbench.own.int3": instead("error at sw_bp", "own handler ran 0 times"),
        },
    ),
    Quirk(
        "pvm-user",
        Cause.KVM,
        _PVM,
        "Code at CPL 3 in long mode runs natively, and its #DB and #BP go into the guest, which dies of them.",
        "docs/support.md, the self-check; kvm_pvm is not in Linux, so no source is named",
        {
            "kvm.int3.cpl3": instead("SHUTDOWN"),
            "kvm.step.long.cpl3": instead("SHUTDOWN"),
            "kvm.execute.cpl3": _ends,
            "kvm.write.cpl3": _ends,
            "kvm.access.cpl3": _ends,
        },
    ),
    Quirk(
        "pvm-data",
        Cause.KVM,
        _PVM,
        "KVM's instruction emulator, which runs CPL 0 there, looks at execute breakpoints only, not at data or GD.",
        f"{_X86_C}, kvm_vcpu_check_code_breakpoint",
        {"kvm.write.dr?": _ends, "kvm.access.dr?": _ends, "kvm.gd": _ends},
    ),
    Quirk(
        "pvm-own-registers",
        Cause.KVM,
        _PVM,
        "The instruction emulator looks at the guest's own debug registers even while KVM_GUESTDBG_USE_HW_BP is on.",
        f"{_X86_C}, kvm_vcpu_check_code_breakpoint",
        {"kvm.guest-registers.replaced": changed(("ran 0 times", "ran 1 times"))},
    ),
    Quirk(
        "pvm-mov-ss",
        Cause.KVM,
        _PVM,
        "The instruction emulator ends a step after MOV SS too, so a program has more steps there.",
        f"{_EMULATE}; test_a_step_over_mov_ss_takes_the_next_instruction_along_in_hardware_only",
        {
            "kvm.step.mov-ss": instead(*map(_step, ("m_ss", "m_next", "m_then"))),
            "kvmbench.step.mov-ss": instead(*(f"step at {at}" for at in ("m_ss", "m_next", "m_then"))),
        },
    ),
    Quirk(
        "pvm-in-handlers",
        Cause.KVM,
        _PVM,
        "The instruction emulator ends a step after every instruction, whatever TF is: also after the first of a "
        "handler. TF in its frame then kills a guest without a handler for #DB.",
        _EMULATE,
        {
            "kvm.blockirq.off": lambda expected: (*expected[:3], _sti("handler+0x2", 1), _sti("handler+0x3", 1)),
            "kvm.blockirq.exceptions": instead(_step("fault"), _step("h2"), "SHUTDOWN"),
        },
    ),
    Quirk(
        "pvm-exit-rip",
        Cause.KVM,
        _PVM,
        "At the exit of an OUT or an MMIO write rip is behind the instruction, and the next KVM_RUN steps another.",
        f"{_EMULATE}; test_at_an_out_exit_rip_is_still_on_the_instruction_in_hardware_only",
        {
            "kvm.exit.out": instead(_step("p_out"), "OUT 0x3f8 at p_next", _step("p_end"), _step("done")),
            "kvm.exit.mmio-write": instead(
                _step("m_write"), "MMIO write 0x40000000 at m_next", _step("m_end"), _step("done")
            ),
            "kvm.exit.saved-early": instead("OUT 0x3f8 at p_next", "done"),
        },
    ),
    Quirk(
        "pvm-hlt",
        Cause.KVM,
        _PVM,
        "The debug exit of a step overwrites the HLT exit, or the wait.",
        f"{_EMULATE}; test_the_exit_of_a_stepped_hlt_is_lost_by_the_instruction_emulator_and_the_cause_is_not",
        {
            "kvm.exit.hlt": changed(("HLT at h_next", _step("h_next"))),
            "kvmbench.step.hlt-irqchip": changed(("deadline at next", "step at end")),
        },
    ),
    Quirk(
        "pvm-rep",
        Cause.KVM,
        _PVM,
        "The instruction emulator makes up to 1024 iterations in one step, and then a step that only leaves.",
        f"{_EMULATE}, EMULATION_RESTART",
        {
            "kvm.step.rep": instead(*(f"{_step(at)}, ecx 0" for at in ("rep", "r_next", "done"))),
            "kvmbench.step.rep": instead(
                *(f"step at {at}" for at in ("r1", "r2", "r3", "rep", "rep", "next", "end")), "halt at end+0x1"
            ),
        },
    ),
)

_OUR_QUIRKS = (
    Quirk(
        "byte-in-memory",
        Cause.OURS,
        _EVERYWHERE,
        "The byte of a breakpoint by INT3 or HLT is in memory while the guest runs: the guest reads it, and by "
        "overwriting it takes the breakpoint away until the next stop. mechanism='debug register' has neither.",
        "kvmbench/debug/mechanism.py",
        {
            "kvmbench.break.hidden-from-guest": changed(("0x90", "0xcc")),
            "kvmbench.break.overwritten": lambda expected: expected[1:],
        },
    ),
    Quirk(
        "byte-in-memory-hlt",
        Cause.OURS,
        _EVERYWHERE,
        "The same, where the byte is that of HLT.",
        "kvmbench/debug/mechanism.py",
        {"kvmbench.break.hidden-from-guest": changed(("0x90", "0xf4"))},
    ),
)

QUIRKS: tuple[Quirk, ...] = (*_EMULATOR_QUIRKS, *_KVM_QUIRKS, *_PVM_QUIRKS, *_OUR_QUIRKS)
