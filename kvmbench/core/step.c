/*
 * The loop that steps.
 *
 * Facts about KVM that shape it, each shown by a test in tests/kvm:
 *  - A step ends in KVM_EXIT_DEBUG.  With KVM_CAP_SYNC_REGS its registers are
 *    in kvm_run, so a recorded step is one ioctl and one copy.
 *  - TF is armed by KVM_SET_GUEST_DEBUG and may be lost to some instructions:
 *    peek.c says after which the ioctl is due again.
 *  - It is lost to exceptions and interrupts without a word: handlers.h.
 *  - It is seen by the guest where RFLAGS are stored: trap_flag.h.
 *  - An I/O or MMIO exit interrupts the step.  Where rip is still on the
 *    instruction, the next KVM_RUN completes it and ends the step; where rip
 *    has moved on already (KVM's instruction emulator: OUT, MMIO writes), the
 *    next KVM_RUN would run one instruction too many, so the exit is completed
 *    with immediate_exit and the step is over.
 */
#define _GNU_SOURCE
#include "step.h"

#include <cpuid.h>
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define DR6_STEP (1u << 14)
#define DR6_BREAKPOINTS 0xfu
#define LONGEST_INSTRUCTION 15

/* Some step was the processor's: where all are KVM's emulator's (kvm_pvm at CPL 0), TF does not matter. */
static atomic_bool hardware_steps;

int step_prepare(struct vcpu *vcpu)
{
    struct kvm_sregs sregs;
    int status = 0;

    if (!vcpu->translation.valid || !vcpu->regs_valid) {
        status = vcpu_fetch_sregs(vcpu, &sregs);
        if (status == 0)
            status = vcpu_fetch_regs(vcpu);
        vcpu->linear_pc = vcpu_linear(vcpu, vcpu->regs.rip);
    }
    return status;
}

bool step_finish(struct job *job, uint32_t exit_reason, uint32_t taint)
{
    struct vcpu *vcpu = job->vcpu;

    if (!vcpu->over.inside) /* a handler's own steps are a part of the one that entered it */
        report_step(job, exit_reason, taint);
    if (job->request->n_watches && vcpu->handlers)
        handlers_unmark(vcpu); /* marks are no change; begin() sets them again */
    if (job->request->n_watches && watch_changed(job, &job->stop->index))
        job->stop->cause = KB_CAUSE_WATCH;
    else if (job->request->n_stops && stop_at(job, vcpu->linear_pc, &job->stop->index))
        job->stop->cause = KB_CAUSE_STOP;
    else
        return true;
    vcpu->over.inside = false; /* who stops in a handler steps in it */
    return false;
}

/* After a debug exit: true if the request goes on. */
static bool after_debug(struct job *job, struct step *step)
{
    struct vcpu *vcpu = job->vcpu;
    struct kb_stop *stop = job->stop;
    const struct kvm_debug_exit_arch *debug = &vcpu->run->debug.arch;
    bool went_on = vcpu->step_exit && step->rip == vcpu->step_rip;
    uint32_t exit_reason = vcpu->pending ? vcpu->pending : went_on ? vcpu->step_exit : KVM_EXIT_DEBUG;
    enum peek kind = step->instruction.kind;
    uint32_t taint = step->taint;
    bool hardware = job->request->debug_control & KVM_GUESTDBG_USE_HW_BP;

    /* Nothing has run: the trap of the step before once more, as kvm_intel tells it of MOV SS and an OUT behind it. */
    if (kind == PEEK_PLAIN && !step->instruction.repeats && !vcpu->pending && debug->pc == step->pc &&
        debug->exception == 1 && (debug->dr6 & (DR6_STEP | DR6_BREAKPOINTS)) == DR6_STEP) {
        vcpu->rearm = true;
        return true;
    }
    vcpu->step_exit = 0;
    /* KVM's emulator made the step, and TF is gone: it says nothing of DR7, in which the processor always has bit 10. */
    if (debug->dr7 != 0)
        hardware_steps = true;
    if (vcpu->pending || (debug->dr7 == 0 && hardware_steps))
        vcpu->rearm = true;
    vcpu->pending = 0;
    vcpu->linear_pc = debug->pc;
    bool is_step = debug->exception == 1 && (debug->dr6 & DR6_STEP);
    bool is_break = debug->exception != 1 || (debug->dr6 & DR6_BREAKPOINTS && hardware);
    /* What the guest would be told if nobody stepped it. */
    uint64_t own = is_step && step->guest_tf ? DR6_STEP : 0;
    if (debug->exception == 1 && !hardware && debug->dr6 & DR6_BREAKPOINTS)
        own |= trap_flag_guest_breakpoints(vcpu, debug->dr6);
    /* KVM's emulator sets KVM_EXIT_HLT and then overwrites it with the step's; the exit would have come first. */
    bool halts = is_step && kind == PEEK_HLT && !is_break && !atomic_load(&vcpu->object.vm->irqchip);
    if (halts)
        own = 0;
    if (is_step) {
        /* Not one of the plain ones, or not where a plain one leads: something
         * was entered or left, and TF, mode and CR3 are what they are now. */
        bool plain = kind == PEEK_PLAIN || kind == PEEK_PUSHF;
        bool jumped = plain && debug->pc - step->pc > LONGEST_INSTRUCTION;
        if (jumped)
            taint |= KB_TAINT_JUMPED;
        vcpu->guest_tf = step->loaded_tf;
        /* KVM's instruction emulator, completing MMIO, sets TF for no other rip. */
        if (kind >= PEEK_HLT || jumped || exit_reason == KVM_EXIT_MMIO) {
            vcpu->rearm = true;
            if (!job->synced) {
                vcpu->translation.valid = false;
                int status = step_prepare(vcpu);
                if (status != 0) {
                    job_fail(job, -status);
                    return false;
                }
            }
        }
        /* INT n in KVM's instruction emulator. */
        const struct handler *handler =
            step->instruction.vector >= 0 && vcpu->handlers && vcpu->handlers->here
                ? handlers_at(vcpu, debug->pc)
                : NULL;
        if (handler && vcpu->handlers->entry[step->instruction.vector] == debug->pc)
            taint |= arrive_enter(job, step, handler);
        job_show_guest_tf(vcpu);
        bool along = step->along.kind == PEEK_PUSHF && debug->pc - step->pc > step->instruction.shadow_bytes;
        if (along && !trap_flag_mend_push(vcpu, step->along.operand_bytes))
            taint |= KB_TAINT_PUSHF;
        if (kind == PEEK_PUSHF && !jumped && !trap_flag_mend_push(vcpu, step->instruction.operand_bytes))
            taint |= KB_TAINT_PUSHF;
        bool again = job->request->flags & KB_WHOLE_REP && step->instruction.repeats && debug->pc == step->pc;
        if (arrive_leave(job, step, &again))
            taint |= KB_TAINT_OVER;
        if (own) {
            /* The step ends in the handler of #DB, or dies on the way there. */
        } else if (!again && !step_finish(job, exit_reason, taint)) {
            return false;
        } else if (halts) {
            stop->cause = KB_CAUSE_HLT;
            vcpu->halt_left = true;
            return false;
        }
    }
    if (!is_step) {
        /* Delivery cleared TF, and perhaps a debug register was met by the frame that it wrote, or by the handler's
         * first instruction: then KVM leaves the guest before the mark is run. */
        vcpu->rearm = true;
        bool marked = debug->exception == 1 && vcpu->handlers && vcpu->handlers->here && debug->pc != step->pc;
        const struct handler *met = marked ? handlers_at(vcpu, debug->pc) : NULL;
        if (met) {
            vcpu->translation.valid = job->synced;
            int status = step_prepare(vcpu);
            if (status != 0) {
                job_fail(job, -status);
                return false;
            }
            taint |= arrive_enter(job, step, met);
            if (!own && !step_finish(job, exit_reason, taint))
                return false;
        }
    }
    if (own) {
        int status = trap_flag_inject(vcpu, own);
        if (status != 0) {
            job_fail(job, -status);
            return false;
        }
        return true;
    }
    if (!is_step && !is_break) { /* INT1, say */
        int status = trap_flag_hand_on(vcpu, &job->request->debugreg[7]);
        if (status < 0)
            job_fail(job, -status);
        return status > 0;
    }
    if (is_break) {
        vcpu->over.inside = false;
        stop->cause = KB_CAUSE_DEBUG;
        return false;
    }
    return true;
}

/* A step whose instruction retired with its exit is over once that is completed. */
static bool finish_retired_step(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    uint32_t reason = vcpu->pending;
    int error = vcpu_complete_pending(vcpu);

    /* A debug exit: rip had moved only by the instruction before, which took this one along (STI, MOV SS). */
    if (error == 0 && vcpu->run->exit_reason != KVM_EXIT_DEBUG) { /* another piece of the same access */
        job_take_regs(job);
        job_after_exit(job, vcpu->step_rip, vcpu->step_taint);
        return false;
    }
    if (error != 0 && error != EINTR) {
        job_fail(job, error);
        return false;
    }
    vcpu->pending = 0;
    vcpu->completed = false;
    vcpu->rearm = true; /* KVM armed TF for the rip before */
    vcpu->translation.valid = false;
    int status = step_prepare(vcpu);
    if (status != 0) {
        job_fail(job, -status);
        return false;
    }
    if (!vcpu->guest_tf)
        return step_finish(job, reason, vcpu->step_taint);
    status = trap_flag_inject(vcpu, DR6_STEP); /* the step ends in the handler of the guest's own #DB */
    if (status != 0)
        job_fail(job, -status);
    return status == 0;
}

/* The guest has died, and its registers may be gone with it: where it was. */
static void note_history(struct job *job, const struct step *step)
{
    struct vcpu *vcpu = job->vcpu;
    struct kb_history *history = &job->history;
    uint32_t reason = vcpu->run->exit_reason;

    if (reason != KVM_EXIT_SHUTDOWN && reason != KVM_EXIT_INTERNAL_ERROR && reason != KVM_EXIT_FAIL_ENTRY)
        return;
    history->rip = step->rip;
    history->pc = step->pc;
    history->width = step->width;
    history->code_bytes = step->instruction.n_bytes;
    memcpy(history->code, step->instruction.bytes, sizeof(history->code));
    job->has_history = true;
    const struct handlers *h = vcpu->handlers;
    uint32_t kept = !h ? 0 : h->entered < KB_HISTORY ? h->entered : KB_HISTORY;
    for (uint32_t n = 0; n < kept; n++)
        history->entry[n] = h->history[(h->entered - kept + n) % KB_HISTORY];
    history->entries = kept;
}

/* r11, which SYSCALL stores RFLAGS in and SYSRET loads them from, as the guest knows it; 0 or -errno. */
static int mend_r11(struct vcpu *vcpu, struct step *step)
{
    bool stored = step->instruction.kind == PEEK_SYSCALL && !step->guest_tf && vcpu->regs.rip != step->rip;

    if (!(stored || step->lent_tf) || !(vcpu->regs.r11 & FLAGS_TF))
        return 0;
    step->lent_tf = false;
    vcpu->regs.r11 &= ~FLAGS_TF;
    vcpu->rearm = true;
    return ioctl(vcpu->object.fd, KVM_SET_REGS, &vcpu->regs) < 0 ? -errno : 0;
}

static bool is_amd(void)
{
    unsigned int most, ebx = 0, ecx, edx;

    return __get_cpuid(0, &most, &ebx, &ecx, &edx) && ebx == signature_AMD_ebx;
}

/* A step over SYSRET ends by the TF that it loads on AMD (seen in QEMU), by the TF before it on Intel (seen in Bochs, which
 * takes the next instruction along otherwise); 0 or -errno. */
static int lend_tf(struct vcpu *vcpu, struct step *step)
{
    step->lent_tf = step->instruction.kind == PEEK_SYSRET && !(vcpu->regs.r11 & FLAGS_TF) && hardware_steps && is_amd();
    if (!step->lent_tf)
        return 0;
    vcpu->regs.r11 |= FLAGS_TF;
    int status = ioctl(vcpu->object.fd, KVM_SET_REGS, &vcpu->regs) < 0 ? -errno : 0;
    vcpu->regs.r11 &= ~FLAGS_TF;
    return status;
}

/* Readies marks and peeks; 0 or -errno. */
static int begin(struct job *job, struct step *step, bool *aside)
{
    struct vcpu *vcpu = job->vcpu;
    bool marks = job->request->flags & KB_HANDLERS;
    int status = step_prepare(vcpu);

    if (status == 0 && (vcpu->rearm || !vcpu->debug_known))
        status = job_arm(job);
    if (status != 0)
        return status;
    if (marks) {
        bool alone = atomic_load(&vcpu->object.vm->executing) == 1;
        bool here = vcpu->handlers && vcpu->handlers->here;
        /* `step` is still the one before. */
        if (here != alone || step->instruction.kind >= PEEK_HLT ||
            (step->instruction.stores && here && handlers_changed(vcpu)))
            handlers_mark(vcpu);
    }
    step->instruction = peek_instruction(vcpu, vcpu->linear_pc);
    if (marks && vcpu->handlers && vcpu->handlers->here && step->instruction.n_bytes &&
        step->instruction.bytes[0] == KB_MARK) {
        *aside = handlers_step_aside(vcpu, vcpu->linear_pc);
        if (*aside)
            step->instruction = peek_instruction(vcpu, vcpu->linear_pc);
    }
    step->along.kind = PEEK_PLAIN;
    if (step->instruction.shadow_bytes)
        step->along = peek_instruction(vcpu, vcpu->linear_pc + step->instruction.shadow_bytes);
    step->rip = vcpu->regs.rip;
    step->pc = vcpu->linear_pc;
    step->rsp = vcpu->regs.rsp;
    step->cs = vcpu->translation.cs;
    step->width = vcpu->translation.width;
    step->guest_tf = vcpu->guest_tf;
    step->loaded_tf = trap_flag_loaded(vcpu, &step->instruction);
    step->taint = vcpu->pending ? vcpu->step_taint : 0;
    if (marks && vcpu->handlers && vcpu->handlers->here) {
        uint64_t target = 0;
        if (step->instruction.kind == PEEK_SYSCALL)
            target = handlers_syscall_entry(vcpu);
        else if (step->instruction.kind == PEEK_IRET)
            target = trap_flag_return(vcpu, &step->instruction);
        if (target + 1 - step->pc > 3) /* no mark on the instruction itself */
            handlers_mark_target(vcpu, target);
    }
    return lend_tf(vcpu, step);
}

void step_loop(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    struct kvm_run *run = vcpu->run;
    struct kb_stop *stop = job->stop;
    const struct kb_execute *request = job->request;
    uint64_t limit = request->steps ? request->steps : UINT64_MAX;
    struct step step = {.instruction = {.kind = PEEK_UNUSUAL}};

    if (request->flags & KB_RECORD && request->max_rows < limit)
        limit = request->max_rows;
    if (!(request->flags & KB_OVER_HANDLERS))
        vcpu->over.inside = false;
    if (vcpu->pending && vcpu->completed && !finish_retired_step(job))
        return;
    while (stop->steps < limit) {
        bool aside = false;
        int status = begin(job, &step, &aside);
        if (status != 0) {
            job_fail(job, -status);
            return;
        }
        if (!vcpu->pending)
            run->debug.arch.dr7 = 0; /* see after_debug() */
        int result = vcpu_kvm_run(vcpu);
        int error = errno;
        if (aside)
            handlers_step_back(vcpu);
        if (result < 0) {
            if (error != EINTR && error != EAGAIN) {
                if (step.lent_tf && vcpu_fetch_regs(vcpu) == 0)
                    mend_r11(vcpu, &step);
                job_fail(job, error);
                return;
            }
            if (job_take_regs(job) != 0 || mend_r11(vcpu, &step) != 0) {
                job_fail(job, EIO);
                return;
            }
            /* KVM completes a pending exit before it looks for signals. */
            uint32_t pending = vcpu->pending;
            vcpu->pending = 0;
            vcpu->rearm = true;
            vcpu->translation.valid = job->synced;
            if (pending)
                vcpu->step_exit = vcpu->regs.rip == vcpu->step_rip ? pending : 0;
            bool goes_on = pending && vcpu->regs.rip != vcpu->step_rip ? step_finish(job, pending, vcpu->step_taint)
                                                                     : arrive_unseen(job, &step);
            if (!goes_on)
                return;
            stop->cause = error == EAGAIN ? 0 : job_early_cause(vcpu);
            if (stop->cause)
                return;
            continue;
        }
        status = job_take_regs(job);
        if (status == 0 && vcpu->regs_valid)
            status = mend_r11(vcpu, &step);
        if (status != 0) {
            job_fail(job, -status);
            return;
        }
        if (run->exit_reason == KVM_EXIT_DEBUG) {
            if (step.instruction.vector == 1 && run->debug.arch.exception == 1 && run->debug.arch.pc == step.pc) {
                status = trap_flag_int1(vcpu); /* intercepted before it has run; BS may be set nevertheless */
                if (status == 0)
                    continue;
                job_fail(job, -status);
                return;
            }
            if (!after_debug(job, &step))
                return;
            continue;
        }
        if (run->exit_reason == KVM_EXIT_HLT && vcpu->halt_left && step.instruction.kind != PEEK_HLT) {
            if (!arrive_after_old_halt(job, &step))
                return;
            continue;
        }
        int in_handler = arrive_by_mark(job, &step);
        if (in_handler > 0)
            continue;
        if (in_handler < 0) {
            job_after_exit(job, step.rip, step.taint);
            note_history(job, &step);
            vcpu->translation.valid = job->synced;
        }
        return;
    }
    stop->cause = KB_CAUSE_STEPS;
}
