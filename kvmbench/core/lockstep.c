/*
 * Several vcpus of one VM stepped on one thread, turn by turn, in a given order.
 *
 * Facts:
 *  - A vcpu's KVM_RUN may be called by any thread, one at a time; KVM then moves the vcpu (and before Linux 6.14 waits
 *    for an RCU grace period), so a request should be thousands of turns.
 *  - With controllers in the kernel KVM_RUN of a vcpu that halted, or that waits for INIT or SIPI, does not come back.
 *    KVM_GET_MP_STATE says which one that is, and takes pending INITs and SIPIs on the way; but a halted vcpu with an
 *    interrupt pending is called halted until its next KVM_RUN.  A KVM_RUN with a signal pending already wakes it if
 *    anything can, and runs nothing: that is the probe below.  So which turns are passed depends on what the guest did
 *    and on nothing else.
 *  - An INIT moves a vcpu that is not running; so where there are controllers, nothing is taken as known from its
 *    last turn.
 */
#define _GNU_SOURCE
#include "step.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ALIGN8(size) (((size) + 7) & ~(size_t)7)
/* struct kvm_signal_mask with the kernel's set, which is shorter than the C library's. */
#define KERNEL_SIGNALS_BYTES 8
#define OPCODE_HLT 0xf4

struct lane {
    struct job job;
    struct exchange x;
    struct kb_execute execute; /* its steps grow turn by turn */
    uint8_t before[KB_MAX_WATCH_BYTES];
    bool busy;    /* its vcpu is ours, */
    bool entered; /* and is marked as running */
};

struct lockstep {
    struct exchange *x;
    const struct kb_lockstep *request;
    const uint8_t *turns;
    uint8_t *made; /* of each turn: whether a step was made */
    uint64_t gone;
    uint32_t last;
    bool completed;
    uint64_t deadline_ns;
    struct lane *lanes;
};

/* The n-th kb_execute of a request, or NULL where the bytes do not hold one; `offset` is moved behind it. */
static const uint8_t *next_execute(const uint8_t *request, size_t request_bytes, size_t *offset, size_t *bytes)
{
    struct kb_header header;

    if (*offset > request_bytes || request_bytes - *offset < sizeof(struct kb_execute))
        return NULL;
    memcpy(&header, request + *offset, sizeof(header));
    if (header.size_bytes < sizeof(struct kb_execute) || ALIGN8((size_t)header.size_bytes) > request_bytes - *offset)
        return NULL;
    const uint8_t *found = request + *offset;
    *bytes = header.size_bytes;
    *offset += ALIGN8((size_t)header.size_bytes);
    return found;
}

size_t vcpu_lockstep_room(const uint8_t *bytes, size_t request_bytes)
{
    struct kb_lockstep request;
    size_t offset = sizeof(request), size;

    memcpy(&request, bytes, sizeof(request));
    uint64_t room = sizeof(struct kb_lockstep_reply);
    if (request.n_vcpus > KB_MAX_LOCKSTEP_VCPUS || request.n_turns > KB_MAX_STEPS_ROWS)
        return sizeof(struct kb_header);
    for (uint32_t n = 0; n < request.n_vcpus; n++) {
        struct kb_execute execute;
        const uint8_t *one = next_execute(bytes, request_bytes, &offset, &size);
        if (!one)
            return sizeof(struct kb_header);
        memcpy(&execute, one, sizeof(execute));
        room += ALIGN8(vcpu_execute_room(&execute));
    }
    room += request.n_turns;
    return room <= KB_MAX_MESSAGE_BYTES ? (size_t)room : sizeof(struct kb_header);
}

/* Takes the request apart; each lane gets its part of the reply's room. */
static int check(struct lockstep *l)
{
    const uint8_t *bytes = l->x->request;
    size_t offset = sizeof(*l->request), size;
    size_t room = sizeof(struct kb_lockstep_reply);
    uint32_t wanted[KB_MAX_LOCKSTEP_VCPUS] = {0};

    for (uint32_t n = 0; n < l->request->n_vcpus; n++) {
        struct lane *lane = &l->lanes[n];
        const uint8_t *one = next_execute(bytes, l->x->request_bytes, &offset, &size);
        if (!one)
            return KB_BAD_LENGTH;
        memcpy(&lane->execute, one, sizeof(lane->execute));
        size_t part = ALIGN8(vcpu_execute_room(&lane->execute));
        if (l->x->capacity < room || part > l->x->capacity - room)
            return KB_TOO_LARGE;
        lane->x = (struct exchange){l->x->core, one, size, l->x->reply + room, part, sizeof(struct kb_header)};
        room += part;
        lane->job.x = &lane->x;
        lane->job.request = &lane->execute;
        int status = job_check(&lane->job);
        if (status != 0)
            return status;
        if (lane->execute.header.kind != KB_EXECUTE || lane->execute.mode != KB_STEP ||
            lane->execute.flags & KB_COMPLETE || (n == 0 && lane->execute.vcpu != l->request->vcpu))
            return KB_BAD_VALUE;
        lane->execute.steps = 0;
    }
    if (offset > l->x->request_bytes || l->request->n_turns != l->x->request_bytes - offset)
        return KB_BAD_LENGTH;
    if (room > l->x->capacity || l->request->n_turns > l->x->capacity - room)
        return KB_TOO_LARGE;
    l->turns = bytes + offset;
    l->made = l->x->reply + room;
    for (uint64_t turn = 0; turn < l->request->n_turns; turn++) {
        if (l->turns[turn] >= l->request->n_vcpus)
            return KB_BAD_VALUE;
        wanted[l->turns[turn]]++;
    }
    for (uint32_t n = 0; n < l->request->n_vcpus; n++)
        if (l->lanes[n].execute.flags & KB_RECORD && l->lanes[n].execute.max_rows < wanted[n])
            return KB_BAD_VALUE;
    return 0;
}

/* Takes hold of the vcpu and of what its steps are compared with. */
static int lane_open(struct lockstep *l, struct lane *lane)
{
    struct job *job = &lane->job;

    job->vcpu = (struct vcpu *)object_get(l->x->core, lane->execute.vcpu, SORT_VCPU);
    if (!job->vcpu || job->vcpu->object.vm != l->lanes[0].job.vcpu->object.vm)
        return KB_BAD_HANDLE;
    if (pthread_mutex_trylock(&job->vcpu->busy) != 0)
        return KB_BUSY; /* also for a vcpu that is in the list twice */
    lane->busy = true;
    int status = watches_open(job, lane->before, sizeof(lane->before));
    return status != 0 ? status : job_answer(job->vcpu, job->io, lane->execute.io_bytes);
}

static void lane_close(struct lane *lane)
{
    if (lane->busy) {
        watches_close(&lane->job);
        pthread_mutex_unlock(&lane->job.vcpu->busy);
    }
    if (lane->job.vcpu)
        object_put(&lane->job.vcpu->object);
}

/* Has KVM wake a halted vcpu if there is something to wake it for; it runs no instruction. */
static void probe(struct vcpu *vcpu)
{
    _Alignas(struct kvm_signal_mask) uint8_t room[sizeof(struct kvm_signal_mask) + KERNEL_SIGNALS_BYTES];
    struct kvm_signal_mask *mask = (struct kvm_signal_mask *)room;
    sigset_t ours, old;

    sigemptyset(&ours);
    sigaddset(&ours, KB_SIGNAL);
    pthread_sigmask(SIG_BLOCK, &ours, &old);
    sigdelset(&old, KB_SIGNAL);
    mask->len = KERNEL_SIGNALS_BYTES;
    memcpy(mask->sigset, &old, KERNEL_SIGNALS_BYTES);
    if (ioctl(vcpu->object.fd, KVM_SET_SIGNAL_MASK, mask) == 0) {
        vcpu_set_immediate_exit(vcpu, 0); /* or KVM would not look at the vcpu at all */
        syscall(SYS_tgkill, getpid(), (pid_t)syscall(SYS_gettid), KB_SIGNAL);
        ioctl(vcpu->object.fd, KVM_RUN, 0);
        ioctl(vcpu->object.fd, KVM_SET_SIGNAL_MASK, NULL);
        sigtimedwait(&ours, NULL, &(struct timespec){0, 0});
    }
    pthread_sigmask(SIG_SETMASK, &old, NULL);
}

/* Whether the vcpu's KVM_RUN would wait in the kernel. */
static bool waits(struct vcpu *vcpu)
{
    struct kvm_mp_state state = {KVM_MP_STATE_RUNNABLE};

    /* An exit under way is finished first, whatever came meanwhile. */
    if (vcpu->pending || ioctl(vcpu->object.fd, KVM_GET_MP_STATE, &state) < 0)
        return false;
    if (state.mp_state == KVM_MP_STATE_HALTED) {
        probe(vcpu);
        if (ioctl(vcpu->object.fd, KVM_GET_MP_STATE, &state) < 0)
            return false;
    }
    return state.mp_state != KVM_MP_STATE_RUNNABLE;
}

/* With controllers in the kernel a stepped HLT leaves the vcpu halted, but not on kvm_pvm, whose emulator makes it. */
static void halt_as_stepped(struct vcpu *vcpu, uint64_t from_rip)
{
    struct kvm_mp_state state = {KVM_MP_STATE_HALTED};
    uint8_t opcode;

    if (vcpu->regs_valid && vcpu->regs.rip == from_rip + 1 &&
        peek_code(vcpu, vcpu->linear_pc - 1, &opcode, 1) == 1 && opcode == OPCODE_HLT)
        ioctl(vcpu->object.fd, KVM_SET_MP_STATE, &state);
}

/* Why the turns end although the last one went well, or 0. */
static uint32_t interruption(struct lockstep *l)
{
    for (uint32_t n = 0; n < l->request->n_vcpus; n++)
        if (atomic_load(&l->lanes[n].job.vcpu->kicked))
            return KB_CAUSE_KICK;
    return l->deadline_ns && now_ns() >= l->deadline_ns ? KB_CAUSE_DEADLINE : 0;
}

/* Leaves the vcpu that had the last turn begun; see handlers.h. */
static void go_through(struct lockstep *l)
{
    uint64_t n_turns = l->request->n_turns;
    bool irqchip = atomic_load(&l->lanes[0].job.vcpu->object.vm->irqchip);
    struct lane *before = NULL;

    while (l->gone < n_turns) {
        uint8_t index = l->turns[l->gone];
        struct lane *lane = &l->lanes[index];
        struct job *job = &lane->job;
        l->last = index;
        vcpu_switch(job->vcpu);
        if (lane != before) {
            /* One at a time, so each has its marks in memory while it steps, and finds nobody else's. */
            if (before)
                handlers_vcpu_ends(before->job.vcpu);
            handlers_vcpu_begins(job->vcpu);
            watches_forget(job); /* what another vcpu wrote meanwhile is not this one's doing */
        }
        before = lane;
        if (irqchip) {
            job->vcpu->regs_valid = job->vcpu->translation.valid = false;
            job->vcpu->rearm = true;
        }
        l->completed = false;
        if (irqchip && waits(job->vcpu)) {
            l->made[l->gone++] = 0;
        } else {
            /* Or from_rip would be that of the last turn, from where INIT or the caller may have moved it; that it
             * fails is told by the step. */
            if (irqchip)
                step_prepare(job->vcpu);
            uint64_t from_rip = job->vcpu->regs.rip;
            lane->execute.steps = job->stop->steps + 1;
            job->stop->cause = 0;
            job_loop(job);
            l->completed = job->stop->steps == lane->execute.steps;
            if (l->completed)
                l->made[l->gone++] = 1;
            if (irqchip && l->completed)
                halt_as_stepped(job->vcpu, from_rip);
            if (job->stop->cause != KB_CAUSE_STEPS)
                return;
        }
        uint32_t cause = interruption(l);
        if (cause != 0 && l->gone < n_turns) {
            job->stop->cause = cause;
            return;
        }
    }
}

/* Puts the parts together where they belong, without the room they did not need. */
static void reply(struct lockstep *l)
{
    struct kb_lockstep_reply *out = (struct kb_lockstep_reply *)l->x->reply;
    uint8_t *to = (uint8_t *)(out + 1);

    out->n_vcpus = l->request->n_vcpus;
    out->last = l->last;
    out->turns = l->gone;
    out->completed = l->completed;
    out->reserved = 0;
    for (uint32_t n = 0; n < l->request->n_vcpus; n++) {
        struct lane *lane = &l->lanes[n];
        struct kb_header *header = (struct kb_header *)lane->x.reply;
        size_t bytes = lane->x.reply_bytes;
        *header = (struct kb_header){(uint32_t)bytes, l->request->header.id, KB_EXECUTE, 0};
        memmove(to, lane->x.reply, bytes);
        memset(to + bytes, 0, ALIGN8(bytes) - bytes);
        to += ALIGN8(bytes);
    }
    memmove(to, l->made, l->gone);
    l->x->reply_bytes = (size_t)(to - l->x->reply) + l->gone;
}

int vcpu_lockstep(struct exchange *x)
{
    struct lockstep l = {.x = x, .request = (const struct kb_lockstep *)x->request};
    uint32_t n_vcpus = l.request->n_vcpus, open = 0;

    if (n_vcpus == 0 || n_vcpus > KB_MAX_LOCKSTEP_VCPUS || l.request->n_turns == 0 ||
        l.request->n_turns > KB_MAX_STEPS_ROWS)
        return KB_BAD_VALUE;
    if (x->capacity < sizeof(struct kb_lockstep_reply))
        return KB_TOO_LARGE;
    l.lanes = calloc(n_vcpus, sizeof(*l.lanes));
    if (!l.lanes)
        return KB_NO_MEMORY;
    uint64_t start = now_ns();
    int status = check(&l);
    while (status == 0 && open < n_vcpus)
        status = lane_open(&l, &l.lanes[open++]);
    if (l.request->deadline_ns)
        l.deadline_ns = l.request->deadline_ns > UINT64_MAX / 2 - start ? UINT64_MAX / 2 : start + l.request->deadline_ns;
    for (uint32_t n = 0; status == 0 && n < n_vcpus; n++) {
        struct job *job = &l.lanes[n].job;
        status = vcpu_enter(job->vcpu, l.request->deadline_ns, start);
        l.lanes[n].entered = status == 0;
        if (status == 0) {
            report_start(job);
            status = job_arm(job);
        }
    }
    if (status == 0) {
        go_through(&l);
        handlers_vcpu_ends(l.lanes[l.last].job.vcpu);
    }
    uint64_t elapsed = now_ns() - start;
    for (uint32_t n = 0; n < n_vcpus; n++) {
        struct lane *lane = &l.lanes[n];
        struct job *job = &lane->job;
        if (lane->entered)
            vcpu_leave(job->vcpu);
        if (status != 0)
            continue;
        if (job->stop->steps || n == l.last) {
            report_stop(job);
            job->stop->elapsed_ns = elapsed;
            job->stop->total_ns = job->vcpu->total_ns;
        } else {
            lane->x.reply_bytes = sizeof(*job->stop); /* it had no turn: all zero */
        }
    }
    if (status == 0)
        reply(&l);
    for (uint32_t n = 0; n < open; n++)
        lane_close(&l.lanes[n]);
    free(l.lanes);
    return status;
}
