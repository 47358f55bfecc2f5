/*
 * What running and stepping a vcpu share: what KVM is told to debug, the state
 * after KVM_RUN, exits that wait for an answer; and the loop that runs freely.
 * step.c has the loop that steps.
 */
#define _GNU_SOURCE
#include "job.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define DR6_STEP (1u << 14)
#define OPCODE_HLT 0xf4

/* KVM_SET_GUEST_DEBUG without SINGLESTEP clears the guest's own TF, which it hides while it steps. */
static int restore_guest_tf(struct vcpu *vcpu)
{
    vcpu->owes_tf = false;
    if (ioctl(vcpu->object.fd, KVM_GET_REGS, &vcpu->regs) < 0)
        return -errno;
    vcpu->regs.rflags |= FLAGS_TF;
    vcpu->guest_tf = true;
    return ioctl(vcpu->object.fd, KVM_SET_REGS, &vcpu->regs) < 0 ? -errno : 0;
}

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
    bool stepped = vcpu->debug_known && vcpu->debug.control & KVM_GUESTDBG_SINGLESTEP;
    /* The guest's own TF is told only now. */
    if (request->mode == KB_STEP && !stepped && vcpu_fetch_regs(vcpu) != 0)
        return -EIO;
    if (ioctl(vcpu->object.fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
        return -errno;
    vcpu->debug = debug;
    vcpu->debug_known = true;
    vcpu->rearm = false;
    if (request->mode == KB_RUN && stepped && vcpu->guest_tf && !(request->flags & KB_BARE)) {
        vcpu->owes_tf = true;
        if (!vcpu->pending)
            return restore_guest_tf(vcpu);
    }
    return 0;
}

int vcpu_fetch_regs(struct vcpu *vcpu)
{
    if (ioctl(vcpu->object.fd, KVM_GET_REGS, &vcpu->regs) < 0)
        return -errno;
    vcpu->regs_valid = true;
    if (vcpu->owes_tf || (vcpu->debug_known && vcpu->debug.control & KVM_GUESTDBG_SINGLESTEP))
        job_show_guest_tf(vcpu);
    else
        vcpu->guest_tf = vcpu->regs.rflags & FLAGS_TF;
    return 0;
}

/* Registers after a KVM_RUN, whether it failed or not: a copy where KVM
 * synchronised them, else an ioctl. */
int job_take_regs(struct job *job)
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
        vcpu->linear_pc = vcpu_linear(vcpu, vcpu->regs.rip);
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

void job_fail(struct job *job, int error)
{
    job->stop->cause = KB_CAUSE_ERROR;
    job->stop->error = error;
}

uint32_t job_early_cause(struct vcpu *vcpu)
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

int vcpu_complete_pending(struct vcpu *vcpu)
{
    vcpu_set_immediate_exit(vcpu, 1);
    int result = vcpu_kvm_run(vcpu);
    int error = result < 0 ? errno : 0;
    /* Cleared before the look, for a signal may come between any two lines; also if it only says that the
     * timer fired for nothing, for somebody has to set it again. */
    vcpu_set_immediate_exit(vcpu, 0);
    atomic_signal_fence(memory_order_seq_cst);
    if (atomic_load(&vcpu->kicked) || atomic_load(&vcpu->signalled))
        vcpu_set_immediate_exit(vcpu, 1);
    /* The instruction is done, and with it the step: MOV SS had held off its trap until here
     * (test_an_out_in_the_shadow_of_mov_ss_ends_the_step). */
    if (error == 0 && vcpu->run->exit_reason == KVM_EXIT_DEBUG)
        error = EINTR;
    return error;
}

bool exit_is_answered(uint32_t reason)
{
    return reason == KVM_EXIT_IO || reason == KVM_EXIT_MMIO || reason == KVM_EXIT_HYPERCALL ||
           reason == KVM_EXIT_X86_RDMSR || reason == KVM_EXIT_X86_WRMSR;
}

void job_after_exit(struct job *job, uint64_t from_rip, uint32_t taint)
{
    struct vcpu *vcpu = job->vcpu;
    uint32_t reason = vcpu->run->exit_reason;

    job->stop->cause = KB_CAUSE_EXIT;
    if (!exit_is_answered(reason)) {
        vcpu->pending = 0;
        /* HLT has retired when its exit comes. */
        if (reason == KVM_EXIT_HLT && job->stepping && vcpu->regs.rip != from_rip && !vcpu->over.inside)
            report_step(job, reason, taint);
        return;
    }
    if (!vcpu->pending || !job->stepping) {
        vcpu->step_rip = from_rip;
        vcpu->step_taint = taint;
    }
    vcpu->pending = reason;
    /* KVM's emulator, which completes it, keeps TF only at the rip where it was armed. */
    vcpu->rearm = true;
    vcpu->completed = vcpu->regs_valid && job->stepping && vcpu->regs.rip != vcpu->step_rip;
}

/* KVM's halt_request, left over from a stepped HLT (step.c): rip is not behind a HLT. */
static bool is_old_halt(struct vcpu *vcpu)
{
    struct kvm_sregs sregs;
    uint8_t before = 0;

    vcpu->halt_left = false;
    if (vcpu_fetch_sregs(vcpu, &sregs) != 0 || vcpu_fetch_regs(vcpu) != 0)
        return false;
    return peek_code(vcpu, vcpu_linear(vcpu, vcpu->regs.rip - 1), &before, 1) == 1 && before != OPCODE_HLT;
}

static void run_loop(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    struct kvm_run *run = vcpu->run;

    vcpu->over.inside = false;
    for (;;) {
        uint64_t from_rip = vcpu->regs.rip;
        if (vcpu_kvm_run(vcpu) < 0) {
            int error = errno;
            if (error != EINTR && error != EAGAIN) {
                job_fail(job, error);
                return;
            }
            if (job_take_regs(job) != 0) {
                job_fail(job, EIO);
                return;
            }
            /* KVM completes a pending exit before it looks for signals. */
            vcpu->pending = 0;
            vcpu->rearm = true;
            vcpu->translation.valid = job->synced;
            job->stop->cause = error == EAGAIN ? 0 : job_early_cause(vcpu);
            if (job->stop->cause)
                return;
            continue;
        }
        int status = job_take_regs(job);
        if (status != 0) {
            job_fail(job, -status);
            return;
        }
        vcpu->translation.valid = job->synced;
        if (run->exit_reason == KVM_EXIT_HLT && vcpu->halt_left && is_old_halt(vcpu))
            continue;
        if (run->exit_reason == KVM_EXIT_DEBUG) {
            vcpu->pending = 0;
            vcpu->linear_pc = run->debug.arch.pc;
            job->stop->cause = KB_CAUSE_DEBUG;
            status = job->request->flags & KB_BARE ? 0 : trap_flag_hand_on(vcpu, &job->request->debugreg[7]);
            if (status > 0)
                continue;
            if (status < 0)
                job_fail(job, -status);
        } else {
            job_after_exit(job, from_rip, 0);
        }
        return;
    }
}

/* The exit under the guest's own TF is completed: its TF again, and the #DB behind the instruction. */
static int settle_tf(struct vcpu *vcpu)
{
    int status = restore_guest_tf(vcpu);

    return status != 0 ? status : trap_flag_inject(vcpu, DR6_STEP);
}

static void complete_only(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    int error = vcpu->pending ? vcpu_complete_pending(vcpu) : EINTR;

    job->stop->cause = KB_CAUSE_STEPS;
    if (error == 0) { /* another piece of the same access */
        job_take_regs(job);
        job_after_exit(job, vcpu->regs.rip, 0);
    } else if (error == EINTR) {
        vcpu->pending = 0;
        vcpu->completed = false;
        vcpu->rearm = true;
        vcpu->translation.valid = false;
        int status = vcpu->owes_tf ? settle_tf(vcpu) : vcpu_fetch_regs(vcpu);
        if (status != 0)
            job_fail(job, -status);
    } else {
        job_fail(job, error);
    }
}

void job_loop(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    struct kvm_run *run = vcpu->run;

    run->kvm_dirty_regs = 0;
    /* Running freely, most exits are I/O that needs no registers; the last stop fetches them. */
    run->kvm_valid_regs = !vcpu->has_sync_regs ? 0
                          : job->full     ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS
                          : job->stepping ? KVM_SYNC_X86_REGS
                                          : 0;
    if (job->request->flags & KB_COMPLETE) {
        complete_only(job);
    } else if (!job->stepping && vcpu->owes_tf && vcpu->pending) {
        complete_only(job); /* or the instruction's own #DB would be lost */
        if (job->stop->cause != KB_CAUSE_STEPS)
            return;
        job->stop->cause = 0;
        run_loop(job);
    } else if (job->stepping) {
        step_loop(job);
    } else {
        run_loop(job);
    }
}
