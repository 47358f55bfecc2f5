#define _GNU_SOURCE
#include "step.h"

#include <errno.h>
#include <sys/ioctl.h>

uint32_t arrive_enter(struct job *job, const struct step *step, const struct handler *at)
{
    struct vcpu *vcpu = job->vcpu;
    struct handlers *h = vcpu->handlers;
    int soft = step->instruction.vector;
    bool called = soft >= 0 && h->entry[soft] == at->linear;
    uint32_t vector = called ? (uint32_t)soft : at->vector;
    bool shared = at->shared && !called;
    struct frame frame = trap_flag_mend_frame(vcpu, at->slot_bytes, (int)vector, called, step->cs);

    vcpu->guest_tf = false;
    vcpu->regs.rflags &= ~FLAGS_TF;
    h->history[h->entered++ % KB_HISTORY] =
        (struct kb_entry){.from_pc = step->pc, .vector = vector, .shared = shared};
    if (job->request->flags & KB_OVER_HANDLERS && !vcpu->over.inside && frame.found) {
        vcpu->over.inside = true;
        vcpu->over.rsp = step->rsp;
        vcpu->over.from_pc = step->pc;
    }
    return KB_TAINT_ENTERED | (shared ? KB_TAINT_SHARED : 0) | (frame.found ? 0 : KB_TAINT_PUSHF) |
           vector << KB_VECTOR_SHIFT;
}

bool arrive_leave(struct job *job, const struct step *step, bool *again)
{
    struct vcpu *vcpu = job->vcpu;

    if (!vcpu->over.inside || step->instruction.kind != PEEK_IRET || vcpu->regs.rsp != vcpu->over.rsp)
        return false;
    vcpu->over.inside = false;
    *again = vcpu->linear_pc == vcpu->over.from_pc;
    return true;
}

static bool is_marked(const struct vcpu *vcpu, uint64_t linear)
{
    return handlers_at(vcpu, linear) || (vcpu->handlers->target && vcpu->handlers->target == linear);
}

/* The vcpu is at a mark, a handler's or the target of this instruction: ends the step; whether the request goes on. */
static bool arrive(struct job *job, struct step *step, uint32_t exit_reason)
{
    struct vcpu *vcpu = job->vcpu;
    const struct handler *handler = handlers_at(vcpu, vcpu->linear_pc);
    uint32_t taint = step->taint;
    bool again = false;

    if (handler) {
        taint |= arrive_enter(job, step, handler);
    } else if (step->instruction.kind == PEEK_SYSCALL) {
        vcpu->guest_tf = false; /* by IA32_FMASK, or the step would have been seen */
        vcpu->regs.rflags &= ~FLAGS_TF;
        if (!step->guest_tf)
            vcpu->regs.r11 &= ~FLAGS_TF;
    } else {
        vcpu->guest_tf = step->loaded_tf;
        job_show_guest_tf(vcpu);
    }
    if (ioctl(vcpu->object.fd, KVM_SET_REGS, &vcpu->regs) < 0) {
        job_fail(job, errno);
        return false;
    }
    vcpu->rearm = true;
    job->synced = false; /* what is in kvm_run is another rip */
    if (!handler && arrive_leave(job, step, &again))
        taint |= KB_TAINT_OVER;
    return again || step_finish(job, exit_reason, taint);
}

int arrive_by_mark(struct job *job, struct step *step)
{
    struct vcpu *vcpu = job->vcpu;
    const struct kvm_run *run = vcpu->run;
    struct handlers *h = vcpu->handlers;
    struct kvm_sregs sregs;

    if (!h || !h->here || run->exit_reason != KVM_EXIT_IO || run->io.port > 0xff ||
        run->io.direction != KVM_EXIT_IO_OUT || run->io.size != 1 || run->io.count != 1)
        return -1;
    int status = vcpu_fetch_sregs(vcpu, &sregs); /* a gate may have changed CS and SS */
    if (status == 0)
        status = vcpu_fetch_regs(vcpu);
    if (status != 0) {
        job_fail(job, -status);
        return 0;
    }
    /* On the OUT, or behind it where KVM's instruction emulator made it. */
    uint64_t at = vcpu_linear(vcpu, vcpu->regs.rip), behind = vcpu_linear(vcpu, vcpu->regs.rip - 2);
    bool own = step->instruction.writes_port && at - step->pc <= 3;
    if (own || (!handlers_is_set(vcpu, at) && !handlers_is_set(vcpu, behind)))
        return -1;
    int error = vcpu_complete_pending(vcpu);
    status = error == 0 || error == EINTR ? vcpu_fetch_regs(vcpu) : -error;
    if (status != 0) {
        job_fail(job, -status);
        return 0;
    }
    uint32_t reason = vcpu->pending ? vcpu->pending : KVM_EXIT_DEBUG;
    vcpu->pending = 0;
    vcpu->completed = false;
    vcpu->regs.rip -= 2;
    vcpu->linear_pc = vcpu_linear(vcpu, vcpu->regs.rip);
    return arrive(job, step, reason) ? 1 : 0;
}

bool arrive_after_old_halt(struct job *job, const struct step *step)
{
    struct vcpu *vcpu = job->vcpu;
    uint32_t taint = step->taint;
    bool again = false;

    vcpu->halt_left = false;
    if (vcpu->regs.rip == step->rip)
        return true;
    vcpu->guest_tf = step->loaded_tf;
    vcpu->rearm = true;
    vcpu->translation.valid = false;
    int status = step_prepare(vcpu);
    if (status != 0) {
        job_fail(job, -status);
        return false;
    }
    job->synced = false;
    if (arrive_leave(job, step, &again))
        taint |= KB_TAINT_OVER;
    return again || step_finish(job, KVM_EXIT_DEBUG, taint);
}

bool arrive_unseen(struct job *job, struct step *step)
{
    struct vcpu *vcpu = job->vcpu;
    struct handlers *h = vcpu->handlers;

    if (!h || !h->here || vcpu->regs.rip == step->rip)
        return true;
    vcpu->translation.valid = false;
    int status = step_prepare(vcpu);
    if (status != 0) {
        job_fail(job, -status);
        return false;
    }
    return !is_marked(vcpu, vcpu->linear_pc) || arrive(job, step, KVM_EXIT_DEBUG);
}
