/*
 * The loops that benchmarks compare with: KVM_RUN, the copy of a row, and
 * nothing else.  No deadline, no stops, no look at the instruction: what a
 * person would write who needs only this.  A signal ends them.
 */
#define _GNU_SOURCE
#include "handlers.h"
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define RAW_ROWS 65536u

/* True if what came was the timer that an earlier call left armed. */
static bool old_timer(struct vcpu *vcpu)
{
    if (atomic_load(&vcpu->kicked) || !atomic_exchange(&vcpu->signalled, false))
        return false;
    vcpu->timer_ns = 0;
    vcpu_set_immediate_exit(vcpu, 0);
    return true;
}

static int raw_steps(struct vcpu *vcpu, struct kb_row *rows, uint64_t wanted, uint64_t *done)
{
    struct kvm_guest_debug debug = {.control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP};
    int status = 0;

    if (ioctl(vcpu->object.fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
        status = -errno;
    vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    while (status == 0 && *done < wanted) {
        if (ioctl(vcpu->object.fd, KVM_RUN, 0) < 0) {
            status = errno == EINTR ? 0 : -errno;
            if (status == 0 && old_timer(vcpu))
                continue;
            break;
        }
        if (vcpu->run->exit_reason != KVM_EXIT_DEBUG)
            break;
        memcpy(&rows[*done % RAW_ROWS], &vcpu->run->s.regs.regs, sizeof(struct kvm_regs));
        ++*done;
    }
    return status;
}

static int raw_exits(struct vcpu *vcpu, uint64_t wanted, uint64_t *done)
{
    struct kvm_guest_debug debug = {0};

    if (ioctl(vcpu->object.fd, KVM_SET_GUEST_DEBUG, &debug) < 0)
        return -errno;
    vcpu->run->kvm_valid_regs = 0;
    while (*done < wanted) {
        if (ioctl(vcpu->object.fd, KVM_RUN, 0) < 0) {
            if (errno != EINTR)
                return -errno;
            if (!old_timer(vcpu))
                return 0;
            continue;
        }
        if (vcpu->run->exit_reason != KVM_EXIT_IO && vcpu->run->exit_reason != KVM_EXIT_MMIO)
            break;
        ++*done;
    }
    return 0;
}

int vcpu_raw_loop(struct exchange *x)
{
    const struct kb_raw_loop *request = (const struct kb_raw_loop *)x->request;
    struct kb_raw_loop_reply *reply = (struct kb_raw_loop_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    if (request->sort != KB_RAW_STEPS && request->sort != KB_RAW_EXITS)
        return KB_BAD_VALUE;
    uint64_t wanted = request->count;
    struct vcpu *vcpu = (struct vcpu *)object_get(x->core, request->vcpu, SORT_VCPU);
    if (!vcpu)
        return KB_BAD_HANDLE;
    if (pthread_mutex_trylock(&vcpu->busy) != 0) {
        object_put(&vcpu->object);
        return KB_BUSY;
    }
    uint64_t done = 0;
    bool steps = request->sort == KB_RAW_STEPS;
    struct kb_row *rows = steps ? malloc(RAW_ROWS * sizeof(*rows)) : NULL;
    int status = rows || !steps ? vcpu_enter(vcpu, 0, 0) : KB_NO_MEMORY;
    if (rows)
        memset(rows, 0, RAW_ROWS * sizeof(*rows)); /* page faults are not the loop's */
    uint64_t start = now_ns();
    if (status == 0) {
        handlers_vcpu_begins(vcpu);
        status = steps ? raw_steps(vcpu, rows, wanted, &done) : raw_exits(vcpu, wanted, &done);
        handlers_vcpu_ends(vcpu);
        vcpu_leave(vcpu);
    }
    reply->count = done;
    reply->elapsed_ns = now_ns() - start;
    free(rows);
    x->reply_bytes = sizeof(*reply);
    vcpu->debug_known = false;
    vcpu->rearm = true;
    vcpu->regs_valid = false;
    vcpu->translation.valid = false;
    vcpu->pending = 0;
    pthread_mutex_unlock(&vcpu->busy);
    object_put(&vcpu->object);
    return status;
}
