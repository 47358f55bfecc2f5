/*
 * The loops that run and step a vcpu.
 *
 * Facts about KVM that shape them, each shown by a test in tests/kvm:
 *  - A step ends in KVM_EXIT_DEBUG.  With KVM_CAP_SYNC_REGS its registers are
 *    in kvm_run, so a recorded step is one ioctl and one copy.
 *  - TF is armed by KVM_SET_GUEST_DEBUG and may be lost to some instructions:
 *    peek.c says after which the ioctl is due again.
 *  - An I/O or MMIO exit interrupts the step.  Where rip is still on the
 *    instruction, the next KVM_RUN completes it and ends the step; where rip
 *    has moved on already (KVM's instruction emulator: OUT, MMIO writes), the
 *    next KVM_RUN would run one instruction too many, so the exit is completed
 *    with immediate_exit and the step is over.
 */
#define _GNU_SOURCE
#include "job.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define DR6_STEP (1u << 14)
#define DR6_BREAKPOINTS 0xfu
#define MOST_STILL_STEPS 16
#define FLAGS_TF (UINT64_C(1) << 8)
#define FLAGS_RF (UINT64_C(1) << 16)

bool loop_repeats_still_steps;

/* Tells KVM what to debug, if that or the registers changed since last time. */
int job_arm(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    const struct kb_execute *request = job->request;
    struct kvm_guest_debug debug = {.control = request->debug_control};

    if (request->mode == KB_STEP)
        debug.control |= KVM_GUESTDBG_SINGLESTEP;
    if (debug.control)
        debug.control |= KVM_GUESTDBG_ENABLE;
    if (request->debug_control & KVM_GUESTDBG_USE_HW_BP)
        memcpy(debug.arch.debugreg, request->debugreg, sizeof(debug.arch.debugreg));
    bool same = vcpu->debug_known && memcmp(&debug, &vcpu->debug, sizeof(debug)) == 0;
    if (same && !(vcpu->rearm && request->mode == KB_STEP))
        return 0;
    if (ioctl(vcpu->object.fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
        return -errno;
    vcpu->debug = debug;
    vcpu->debug_known = true;
    vcpu->rearm = false;
    return 0;
}

int vcpu_fetch_regs(struct vcpu *vcpu)
{
    if (ioctl(vcpu->object.fd, KVM_GET_REGS, &vcpu->regs) < 0)
        return -errno;
    vcpu->regs_valid = true;
    return 0;
}

/* Registers after a KVM_RUN, whether it failed or not: a copy where KVM
 * synchronised them, else an ioctl. */
static int take_regs(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;

    vcpu->regs_valid = false;
    if (!job->stepping && !job->full)
        return 0;
    if (!vcpu->has_sync_regs)
        return vcpu_fetch_regs(vcpu);
    memcpy(&vcpu->regs, &vcpu->run->s.regs.regs, sizeof(vcpu->regs));
    vcpu->regs_valid = true;
    if (job->full) {
        const struct kvm_sregs *sregs = &vcpu->run->s.regs.sregs;
        translation_set(&vcpu->translation, sregs);
        vcpu->linear_pc = vcpu->regs.rip + (vcpu->translation.width == KB_WIDTH_BITS64 ? 0 : sregs->cs.base);
        job->synced = true;
    }
    return 0;
}

int vcpu_fetch_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs)
{
    if (ioctl(vcpu->object.fd, KVM_GET_SREGS, sregs) < 0)
        return -errno;
    translation_set(&vcpu->translation, sregs);
    return 0;
}

/* What is known before the first step: where it starts, and how to read code there. */
static int prepare_step(struct vcpu *vcpu)
{
    struct kvm_sregs sregs;
    int status = 0;

    if (!vcpu->translation.valid || !vcpu->regs_valid) {
        status = vcpu_fetch_sregs(vcpu, &sregs);
        if (status == 0)
            status = vcpu_fetch_regs(vcpu);
        vcpu->linear_pc = vcpu->regs.rip + (vcpu->translation.width == KB_WIDTH_BITS64 ? 0 : sregs.cs.base);
    }
    return status;
}

static void fail(struct job *job, int error)
{
    job->stop->cause = KB_CAUSE_ERROR;
    job->stop->error = error;
}

/* Why KVM_RUN was left early; 0: for nothing that stops the request. */
static uint32_t early_cause(struct vcpu *vcpu)
{
    if (atomic_load(&vcpu->kicked))
        return KB_CAUSE_KICK;
    if (atomic_load(&vcpu->expired))
        return KB_CAUSE_DEADLINE;
    if (!atomic_exchange(&vcpu->signalled, false))
        return KB_CAUSE_SIGNAL;
    /* The timer was left over from an earlier call, or the request is overdue. */
    uint64_t now = now_ns();
    vcpu->timer_ns = 0;
    vcpu_set_immediate_exit(vcpu, 0);
    if (atomic_load(&vcpu->kicked))
        return KB_CAUSE_KICK; /* it came between the two lines above */
    if (vcpu->overdue_ns && now >= vcpu->overdue_ns) {
        struct core *core = vcpu->object.core;
        vcpu->overdue_ns = 0;
        core->overdue(core->overdue_argument, vcpu->object.handle);
    }
    return vcpu_rearm_timer(vcpu, now) == 0 ? 0 : KB_CAUSE_DEADLINE;
}

/* Finishes the exit that the guest is in without running it further. */
static int complete_pending(struct vcpu *vcpu)
{
    vcpu_set_immediate_exit(vcpu, 1);
    int result = ioctl(vcpu->object.fd, KVM_RUN, 0);
    int error = result < 0 ? errno : 0;
    /* Cleared before the look, for a signal may come between any two lines; also if it only says that the
     * timer fired for nothing, for somebody has to set it again. */
    vcpu_set_immediate_exit(vcpu, 0);
    atomic_signal_fence(memory_order_seq_cst);
    if (atomic_load(&vcpu->kicked) || atomic_load(&vcpu->signalled))
        vcpu_set_immediate_exit(vcpu, 1);
    return error;
}

/* After a debug exit: true if the request goes on. */
static bool after_debug(struct job *job, uint32_t taint, enum peek peeked, uint64_t from_pc)
{
    struct vcpu *vcpu = job->vcpu;
    struct kb_stop *stop = job->stop;
    const struct kvm_debug_exit_arch *debug = &vcpu->run->debug.arch;
    uint32_t exit_reason = vcpu->pending ? vcpu->pending : KVM_EXIT_DEBUG;

    vcpu->pending = 0;
    vcpu->linear_pc = debug->pc;
    bool is_step = job->stepping && debug->exception == 1 && (debug->dr6 & DR6_STEP);
    bool is_break = debug->exception != 1 ||
                    (debug->dr6 & DR6_BREAKPOINTS &&
                     job->request->debug_control & KVM_GUESTDBG_USE_HW_BP);
    if (is_step) {
        /* Not one of the plain ones, or not where a plain one leads: something
         * was entered or left, and TF, mode and CR3 are what they are now. */
        bool plain = peeked == PEEK_PLAIN || peeked == PEEK_PUSHF;
        bool jumped = plain && debug->pc - from_pc > 15;
        if (jumped)
            taint |= KB_TAINT_JUMPED;
        if (peeked == PEEK_UNUSUAL || peeked == PEEK_HLT || jumped) {
            vcpu->rearm = true;
            if (!job->synced) {
                vcpu->translation.valid = false;
                int status = prepare_step(vcpu);
                if (status != 0) {
                    fail(job, -status);
                    return false;
                }
            }
        }
        report_step(job, exit_reason, taint);
        /* KVM's emulator sets KVM_EXIT_HLT and then overwrites it with the step's. */
        if (peeked == PEEK_HLT && !is_break && !atomic_load(&vcpu->object.vm->irqchip)) {
            stop->cause = KB_CAUSE_HLT;
            return false;
        }
    }
    if (is_break || !is_step) {
        stop->cause = KB_CAUSE_DEBUG;
        return false;
    }
    if (job->request->n_watches && watch_changed(job, &stop->index)) {
        stop->cause = KB_CAUSE_WATCH;
        return false;
    }
    if (job->request->n_stops && stop_at(job, vcpu->linear_pc, &stop->index)) {
        stop->cause = KB_CAUSE_STOP;
        return false;
    }
    return true;
}

/* A debug exit of a step that did nothing (core.h). */
static bool stood_still(const struct job *job, struct kvm_regs before, uint64_t from_pc)
{
    const struct kvm_debug_exit_arch *debug = &job->vcpu->run->debug.arch;
    struct kvm_regs after = job->vcpu->regs;

    before.rflags &= ~(FLAGS_TF | FLAGS_RF);
    after.rflags &= ~(FLAGS_TF | FLAGS_RF);
    return debug->exception == 1 && (debug->dr6 & (DR6_STEP | DR6_BREAKPOINTS)) == DR6_STEP &&
           debug->pc == from_pc && memcmp(&before, &after, sizeof(before)) == 0;
}

bool exit_is_answered(uint32_t reason)
{
    return reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO || reason == KVM_EXIT_HYPERCALL ||
           reason == KVM_EXIT_X86_RDMSR || reason == KVM_EXIT_X86_WRMSR;
}

/* After any other exit; the request ends here. */
static void after_exit(struct job *job, uint64_t from_rip, uint32_t taint)
{
    struct vcpu *vcpu = job->vcpu;
    uint32_t reason = vcpu->run->exit_reason;

    job->stop->cause = KB_CAUSE_EXIT;
    if (!exit_is_answered(reason)) {
        vcpu->pending = 0;
        /* HLT has retired when its exit comes. */
        if (reason == KVM_EXIT_HLT && job->stepping && vcpu->regs.rip != from_rip)
            report_step(job, reason, taint);
        return;
    }
    if (!vcpu->pending || !job->stepping) {
        vcpu->step_rip = from_rip;
        vcpu->step_taint = taint;
    }
    vcpu->pending = reason;
    vcpu->completed = vcpu->regs_valid && job->stepping && vcpu->regs.rip != vcpu->step_rip;
}

/* A step whose instruction retired with its exit is over once that is completed. */
static bool finish_retired_step(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    uint32_t reason = vcpu->pending;
    int error = complete_pending(vcpu);

    if (error == 0) { /* another piece of the same access */
        take_regs(job);
        after_exit(job, vcpu->step_rip, vcpu->step_taint);
        return false;
    }
    if (error != EINTR) {
        job->stop->cause = KB_CAUSE_ERROR;
        job->stop->error = error;
        return false;
    }
    vcpu->pending = 0;
    vcpu->completed = false;
    vcpu->rearm = true; /* KVM armed TF for the rip before */
    if (vcpu_fetch_regs(vcpu) != 0) {
        job->stop->cause = KB_CAUSE_ERROR;
        return false;
    }
    vcpu->translation.valid = false;
    if (prepare_step(vcpu) != 0) {
        job->stop->cause = KB_CAUSE_ERROR;
        return false;
    }
    report_step(job, reason, vcpu->step_taint);
    if (job->request->n_watches && watch_changed(job, &job->stop->index)) {
        job->stop->cause = KB_CAUSE_WATCH;
        return false;
    }
    if (job->request->n_stops && stop_at(job, vcpu->linear_pc, &job->stop->index)) {
        job->stop->cause = KB_CAUSE_STOP;
        return false;
    }
    return true;
}

void job_loop(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    struct kvm_run *run = vcpu->run;
    struct kb_stop *stop = job->stop;
    const struct kb_execute *request = job->request;
    uint64_t limit = job->stepping && request->steps ? request->steps : UINT64_MAX;

    if (request->flags & KB_RECORD && request->max_rows < limit)
        limit = request->max_rows;
    run->kvm_dirty_regs = 0;
    /* Running freely, most exits are I/O that needs no registers; the last stop fetches them. */
    run->kvm_valid_regs = !vcpu->has_sync_regs ? 0
                          : job->full     ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS
                          : job->stepping ? KVM_SYNC_X86_REGS
                                          : 0;
    if (request->flags & KB_COMPLETE) {
        int error = vcpu->pending ? complete_pending(vcpu) : EINTR;
        stop->cause = KB_CAUSE_STEPS;
        if (error == 0) {
            take_regs(job);
            after_exit(job, vcpu->regs.rip, 0);
        } else if (error == EINTR) {
            vcpu->pending = 0;
            vcpu->completed = false;
            vcpu->rearm = true;
            vcpu->translation.valid = false;
            if (vcpu_fetch_regs(vcpu) != 0)
                fail(job, EIO);
        } else {
            fail(job, error);
        }
        return;
    }
    if (job->stepping && vcpu->pending && vcpu->completed && !finish_retired_step(job))
        return;
    unsigned int still = 0;
    while (stop->steps < limit) {
        enum peek peeked = PEEK_PLAIN;
        uint32_t taint = 0;
        int status;
        struct kvm_regs before;

        if (job->stepping) {
            status = prepare_step(vcpu);
            if (status == 0 && (vcpu->rearm || !vcpu->debug_known))
                status = job_arm(job);
            if (status != 0) {
                fail(job, -status);
                return;
            }
            peeked = peek_instruction(vcpu, vcpu->linear_pc);
            taint = vcpu->pending ? vcpu->step_taint : peeked == PEEK_PUSHF ? KB_TAINT_PUSHF : 0;
        }
        uint64_t from_pc = vcpu->linear_pc;
        uint64_t from_rip = vcpu->regs.rip;
        if (job->stepping && loop_repeats_still_steps)
            before = vcpu->regs;
        if (ioctl(vcpu->object.fd, KVM_RUN, 0) < 0) {
            int error = errno;
            if (error != EINTR && error != EAGAIN) {
                fail(job, error);
                return;
            }
            if (take_regs(job) != 0) {
                fail(job, EIO);
                return;
            }
            /* KVM completes a pending exit before it looks for signals. */
            uint32_t pending = vcpu->pending;
            vcpu->pending = 0;
            vcpu->rearm = true;
            vcpu->translation.valid = job->synced;
            if (pending && job->stepping && vcpu->regs.rip != vcpu->step_rip)
                report_step(job, pending, vcpu->step_taint);
            stop->cause = error == EAGAIN ? 0 : early_cause(vcpu);
            if (stop->cause)
                return;
            continue;
        }
        status = take_regs(job);
        if (status != 0) {
            fail(job, -status);
            return;
        }
        if (run->exit_reason == KVM_EXIT_DEBUG) {
            if (job->stepping && loop_repeats_still_steps && !vcpu->pending &&
                still < MOST_STILL_STEPS && stood_still(job, before, from_pc)) {
                still++;
                continue;
            }
            still = 0;
            if (!after_debug(job, taint, peeked, from_pc))
                return;
            continue;
        }
        after_exit(job, from_rip, taint);
        vcpu->translation.valid = job->synced;
        return;
    }
    stop->cause = KB_CAUSE_STEPS;
}
