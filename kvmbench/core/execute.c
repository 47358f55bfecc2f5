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
#include "internal.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define IO_ROOM 4104u /* KVM_EXIT_IO data, at most a page, and the padding after masks */
#define DR6_STEP (1u << 14)
#define DR6_BREAKPOINTS 0xfu

_Static_assert(sizeof(struct kvm_regs) == sizeof(((struct kb_stop *)0)->regs), "kvm_regs");
_Static_assert(sizeof(struct kvm_sregs) == sizeof(((struct kb_stop *)0)->sregs), "kvm_sregs");
_Static_assert(sizeof(struct kvm_vcpu_events) == sizeof(((struct kb_stop *)0)->events), "events");
_Static_assert(offsetof(struct kvm_run, kvm_valid_regs) <= KB_RUN_BYTES, "exit union");
_Static_assert(sizeof(struct kb_row) == sizeof(struct kvm_regs) + 8, "a row is kvm_regs and more");

struct job {
    struct exchange *x;
    struct vcpu *vcpu;
    const struct kb_execute *request;
    const uint8_t *io;
    const uint8_t *stops;   /* u64 each, unaligned */
    const uint8_t *watches; /* struct kb_watch each, unaligned */
    struct region *regions[KB_MAX_WATCHES];
    struct kb_watch watch[KB_MAX_WATCHES];
    const uint8_t *live[KB_MAX_WATCHES];
    uint8_t *before;        /* bytes of all watches, as last seen */
    struct kb_stop *stop;
    struct kb_row *rows;
    uint32_t *masks;        /* KB_PACK: instead of rows, */
    uint64_t *values;       /* where the next value goes, */
    struct kb_row last;     /* and the row that it differs from */
    bool stepping;
    bool full;              /* sregs come with every KVM_RUN */
    bool synced;            /* and did with the last one */
};

size_t vcpu_execute_room(const struct kb_execute *request)
{
    size_t rows = request->flags & KB_RECORD ? request->max_rows : 0;
    size_t row_bytes = request->flags & KB_PACK ? KB_PACKED_ROW_BYTES : sizeof(struct kb_row);

    if (rows > KB_MAX_STEPS_ROWS)
        rows = 0; /* will be refused */
    return sizeof(struct kb_stop) + rows * row_bytes + IO_ROOM;
}

static int check(struct job *job)
{
    const struct kb_execute *request = job->request;
    uint64_t payload = job->x->request_bytes - sizeof(*request);
    const uint8_t *bytes = job->x->request + sizeof(*request);

    if (request->n_stops > KB_MAX_STOPS || request->n_watches > KB_MAX_WATCHES ||
        request->max_rows > KB_MAX_STEPS_ROWS)
        return KB_BAD_VALUE;
    if (payload != (uint64_t)request->io_bytes + 8ull * request->n_stops +
                       sizeof(struct kb_watch) * (uint64_t)request->n_watches)
        return KB_BAD_LENGTH;
    if (request->mode > KB_STEP ||
        request->flags & ~(uint32_t)(KB_RECORD | KB_FULL_SYNC | KB_COMPLETE | KB_PACK) ||
        request->debug_control & (KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP))
        return KB_BAD_VALUE;
    job->stepping = request->mode == KB_STEP;
    if (!job->stepping && (request->flags & KB_RECORD || request->n_stops || request->n_watches))
        return KB_BAD_VALUE;
    if (request->flags & KB_RECORD && request->max_rows == 0)
        return KB_BAD_VALUE;
    if (job->x->capacity < vcpu_execute_room(request))
        return KB_TOO_LARGE;
    job->io = bytes;
    job->stops = bytes + request->io_bytes;
    job->watches = job->stops + 8ull * request->n_stops;
    return 0;
}

/* Holds the watched regions; each must belong to the vcpu's VM. */
static int open_watches(struct job *job, uint8_t *before, size_t room)
{
    job->before = before;
    for (uint32_t n = 0; n < job->request->n_watches; n++) {
        struct kb_watch *watch = &job->watch[n];
        memcpy(watch, job->watches + n * sizeof(*watch), sizeof(*watch));
        struct region *region =
            (struct region *)object_get(job->x->core, watch->region, SORT_REGION);
        job->regions[n] = region;
        if (!region || region->object.vm != job->vcpu->object.vm)
            return KB_BAD_HANDLE;
        if (watch->length_bytes == 0 || watch->length_bytes > KB_MAX_WATCH_BYTES)
            return KB_BAD_VALUE;
        if (watch->offset > region->size_bytes ||
            watch->length_bytes > region->size_bytes - watch->offset)
            return KB_BAD_RANGE;
        if (watch->length_bytes > room)
            return KB_TOO_LARGE;
        room -= watch->length_bytes;
        job->live[n] = region->mapping->address + watch->offset;
        memcpy(before, job->live[n], watch->length_bytes);
        before += watch->length_bytes;
    }
    return 0;
}

static void close_watches(struct job *job)
{
    for (uint32_t n = 0; n < KB_MAX_WATCHES && job->regions[n]; n++)
        object_put(&job->regions[n]->object);
}

static bool watch_changed(struct job *job, uint32_t *index)
{
    uint8_t *before = job->before;
    bool changed = false;

    for (uint32_t n = 0; n < job->request->n_watches; n++) {
        size_t length = job->watch[n].length_bytes;
        if (memcmp(before, job->live[n], length) != 0) {
            memcpy(before, job->live[n], length);
            if (!changed)
                *index = n;
            changed = true;
        }
        before += length;
    }
    return changed;
}

static bool stop_at(const struct job *job, uint64_t linear_pc, uint32_t *index)
{
    for (uint32_t n = 0; n < job->request->n_stops; n++) {
        uint64_t stop;
        memcpy(&stop, job->stops + 8ull * n, sizeof(stop));
        if (stop == linear_pc) {
            *index = n;
            return true;
        }
    }
    return false;
}

/* Puts the caller's answer to the last exit where KVM looks for it. */
static int answer_exit(struct vcpu *vcpu, const uint8_t *data, size_t bytes)
{
    struct kvm_run *run = vcpu->run;

    switch (vcpu->pending) {
    case KVM_EXIT_IO: {
        size_t size = (size_t)run->io.size * run->io.count;
        if (run->io.direction != KVM_EXIT_IO_IN)
            return bytes ? KB_BAD_LENGTH : 0;
        if (run->io.data_offset > vcpu->run_bytes || size > vcpu->run_bytes - run->io.data_offset)
            return KB_BAD_RANGE;
        uint8_t *to = (uint8_t *)run + run->io.data_offset;
        if (bytes == 0)
            memset(to, 0xff, size); /* nobody answered: an empty bus reads ones */
        else if (bytes == size)
            memcpy(to, data, bytes);
        else
            return KB_BAD_LENGTH;
        return 0;
    }
    case KVM_EXIT_MMIO:
        if (run->mmio.is_write)
            return bytes ? KB_BAD_LENGTH : 0;
        if (bytes != 0 && bytes != run->mmio.len)
            return KB_BAD_LENGTH;
        memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
        if (bytes <= sizeof(run->mmio.data))
            memcpy(run->mmio.data, data, bytes);
        return 0;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        /* The value; none means #GP in the guest. */
        if (bytes != 0 && bytes != 8)
            return KB_BAD_LENGTH;
        run->msr.error = bytes == 0;
        if (bytes == 8)
            memcpy(&run->msr.data, data, 8);
        return 0;
    case KVM_EXIT_HYPERCALL:
        if (bytes != 0 && bytes != 8)
            return KB_BAD_LENGTH;
        if (bytes == 8)
            memcpy(&run->hypercall.ret, data, 8);
        return 0;
    default:
        return bytes ? KB_BAD_LENGTH : 0;
    }
}

/* Tells KVM what to debug, if that or the registers changed since last time. */
static int arm(struct vcpu *vcpu, const struct kb_execute *request)
{
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

static int fetch_regs(struct vcpu *vcpu)
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
        return fetch_regs(vcpu);
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

static int fetch_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs)
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
        status = fetch_sregs(vcpu, &sregs);
        if (status == 0)
            status = fetch_regs(vcpu);
        vcpu->linear_pc = vcpu->regs.rip + (vcpu->translation.width == KB_WIDTH_BITS64 ? 0 : sregs.cs.base);
    }
    return status;
}

static void pack_row(struct job *job, const struct kb_row *row)
{
    const uint64_t *now = (const uint64_t *)row;
    uint64_t *before = (uint64_t *)&job->last;
    uint32_t mask = 0;

    for (int column = 0; column < KB_COLUMNS; column++)
        if (now[column] != before[column]) {
            mask |= 1u << column;
            *job->values++ = before[column] = now[column];
        }
    *job->masks++ = mask;
}

static void end_step(struct job *job, uint32_t exit_reason, uint32_t taint)
{
    struct kb_stop *stop = job->stop;

    if (job->request->flags & KB_RECORD) {
        struct kb_row packed;
        bool pack = job->request->flags & KB_PACK;
        struct kb_row *row = pack ? &packed : &job->rows[stop->n_rows];
        memcpy(row, &job->vcpu->regs, sizeof(job->vcpu->regs));
        row->exit = exit_reason;
        row->flags = taint | job->vcpu->translation.width;
        if (pack)
            pack_row(job, row);
        stop->n_rows++;
    }
    stop->steps++;
    stop->tainted |= taint;
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
    /* The timer was left over from an earlier call. */
    vcpu->timer_ns = 0;
    vcpu->run->immediate_exit = 0;
    if (atomic_load(&vcpu->kicked))
        return KB_CAUSE_KICK; /* it came between the two lines above */
    return vcpu_rearm_timer(vcpu, now_ns()) == 0 ? 0 : KB_CAUSE_DEADLINE;
}

/* Finishes the exit that the guest is in without running it further. */
static int complete_pending(struct vcpu *vcpu)
{
    vcpu->run->immediate_exit = 1;
    int result = ioctl(vcpu->object.fd, KVM_RUN, 0);
    int error = result < 0 ? errno : 0;
    vcpu->run->immediate_exit = atomic_load(&vcpu->kicked) || atomic_load(&vcpu->expired);
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
        end_step(job, exit_reason, taint);
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

static bool is_user_space_io(uint32_t reason)
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
    if (!is_user_space_io(reason)) {
        vcpu->pending = 0;
        /* HLT has retired when its exit comes. */
        if (reason == KVM_EXIT_HLT && job->stepping && vcpu->regs.rip != from_rip)
            end_step(job, reason, taint);
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
    if (fetch_regs(vcpu) != 0) {
        job->stop->cause = KB_CAUSE_ERROR;
        return false;
    }
    vcpu->translation.valid = false;
    if (prepare_step(vcpu) != 0) {
        job->stop->cause = KB_CAUSE_ERROR;
        return false;
    }
    end_step(job, reason, vcpu->step_taint);
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

static void loop(struct job *job)
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
            if (fetch_regs(vcpu) != 0)
                fail(job, EIO);
        } else {
            fail(job, error);
        }
        return;
    }
    if (job->stepping && vcpu->pending && vcpu->completed && !finish_retired_step(job))
        return;
    while (stop->steps < limit) {
        enum peek peeked = PEEK_PLAIN;
        uint32_t taint = 0;
        int status;

        if (job->stepping) {
            status = prepare_step(vcpu);
            if (status == 0 && (vcpu->rearm || !vcpu->debug_known))
                status = arm(vcpu, request);
            if (status != 0) {
                fail(job, -status);
                return;
            }
            peeked = peek_instruction(vcpu, vcpu->linear_pc);
            taint = vcpu->pending ? vcpu->step_taint : peeked == PEEK_PUSHF ? KB_TAINT_PUSHF : 0;
        }
        uint64_t from_pc = vcpu->linear_pc;
        uint64_t from_rip = vcpu->regs.rip;
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
                end_step(job, pending, vcpu->step_taint);
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

static size_t packed_values_offset(const struct kb_execute *request)
{
    return (request->max_rows * sizeof(uint32_t) + 7) & ~7ul;
}

/* Copies the state into the reply. */
static void report(struct job *job)
{
    struct vcpu *vcpu = job->vcpu;
    struct kvm_run *run = vcpu->run;
    struct kb_stop *stop = job->stop;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;

    bool left_early = stop->cause == KB_CAUSE_DEADLINE || stop->cause == KB_CAUSE_KICK ||
                      stop->cause == KB_CAUSE_SIGNAL;
    stop->exit_reason = left_early ? KVM_EXIT_INTR : run->exit_reason;
    memcpy(stop->run, run, KB_RUN_BYTES);
    bool io = stop->cause == KB_CAUSE_EXIT && is_user_space_io(run->exit_reason);
    if (vcpu->regs_valid || (!io && fetch_regs(vcpu) == 0)) {
        memcpy(stop->regs, &vcpu->regs, sizeof(vcpu->regs));
        stop->valid |= KB_VALID_REGS;
    }
    if (job->synced) {
        memcpy(stop->sregs, &run->s.regs.sregs, sizeof(stop->sregs));
        stop->valid |= KB_VALID_SREGS;
    } else if (!io || job->request->flags & KB_FULL_SYNC) {
        if (fetch_sregs(vcpu, &sregs) == 0) {
            memcpy(stop->sregs, &sregs, sizeof(sregs));
            stop->valid |= KB_VALID_SREGS;
            vcpu->linear_pc = vcpu->regs.rip + (vcpu->translation.width == KB_WIDTH_BITS64 ? 0 : sregs.cs.base);
        }
    }
    if (job->request->flags & KB_FULL_SYNC &&
        ioctl(vcpu->object.fd, KVM_GET_VCPU_EVENTS, &events) == 0) {
        memcpy(stop->events, &events, sizeof(events));
        stop->valid |= KB_VALID_EVENTS;
    }
    if (stop->exit_reason == KVM_EXIT_DEBUG) {
        stop->debug_pc = run->debug.arch.pc;
        stop->debug_dr6 = run->debug.arch.dr6;
        stop->debug_dr7 = run->debug.arch.dr7;
        stop->debug_exception = run->debug.arch.exception;
    }
    stop->completed = vcpu->pending && vcpu->completed;
    stop->plain = stop->cause == KB_CAUSE_STEPS && stop->tainted == 0;
    if (stop->valid & KB_VALID_SREGS)
        stop->code_bytes =
            (uint32_t)peek_code(vcpu, vcpu->linear_pc, stop->code, sizeof(stop->code));
    uint8_t *tail = (uint8_t *)(stop + 1);
    if (job->request->flags & KB_RECORD && job->request->flags & KB_PACK) {
        /* The values follow the room for max_rows masks; close the gap. */
        size_t masks = (stop->n_rows * sizeof(uint32_t) + 7) & ~7ul;
        uint8_t *values = (uint8_t *)(stop + 1) + packed_values_offset(job->request);
        size_t bytes = (size_t)((uint8_t *)job->values - values);
        memmove(tail + masks, values, bytes);
        stop->rows_bytes = (uint32_t)(masks + bytes);
    } else {
        stop->rows_bytes = (uint32_t)(stop->n_rows * sizeof(struct kb_row));
    }
    tail += stop->rows_bytes;
    if (io && run->exit_reason == KVM_EXIT_IO) {
        size_t bytes = (size_t)run->io.size * run->io.count;
        if (run->io.data_offset <= vcpu->run_bytes &&
            bytes <= vcpu->run_bytes - run->io.data_offset && bytes <= 4096) {
            const uint8_t *data = (const uint8_t *)run + run->io.data_offset;
            memcpy(tail, data, bytes);
            memcpy(&stop->value, data, bytes < 8 ? bytes : 8);
            stop->io_offset = (uint32_t)(tail - (uint8_t *)stop);
            stop->io_bytes = (uint32_t)bytes;
            tail += bytes;
        }
        stop->io_port = run->io.port;
        stop->io_size = run->io.size;
        stop->io_count = run->io.count;
        stop->io_is_out = run->io.direction == KVM_EXIT_IO_OUT;
        if (run->io.count == 1)
            stop->quick = 1u << 31 | stop->io_is_out << 30 | (uint32_t)run->io.size << 16 | run->io.port;
    } else if (io && run->exit_reason == KVM_EXIT_MMIO) {
        stop->mmio_gpa = run->mmio.phys_addr;
        stop->mmio_size = run->mmio.len;
        stop->mmio_is_write = run->mmio.is_write;
        memcpy(&stop->value, run->mmio.data, 8);
    }
    job->x->reply_bytes = (size_t)(tail - (uint8_t *)stop);
}

int vcpu_execute(struct exchange *x)
{
    struct job job = {.x = x, .request = (const struct kb_execute *)x->request};
    uint8_t before[KB_MAX_WATCH_BYTES];
    int status = check(&job);

    if (status != 0)
        return status;
    job.vcpu = (struct vcpu *)object_get(x->core, job.request->vcpu, SORT_VCPU);
    if (!job.vcpu)
        return KB_BAD_HANDLE;
    if (pthread_mutex_trylock(&job.vcpu->busy) != 0) {
        object_put(&job.vcpu->object);
        return KB_BUSY;
    }
    uint64_t start = now_ns();
    status = open_watches(&job, before, sizeof(before));
    if (status == 0)
        status = answer_exit(job.vcpu, job.io, job.request->io_bytes);
    if (status == 0)
        status = vcpu_enter(job.vcpu, job.request->deadline_ns, start);
    if (status == 0) {
        job.stop = (struct kb_stop *)x->reply;
        memset((uint8_t *)job.stop + sizeof(struct kb_header), 0,
               sizeof(*job.stop) - sizeof(struct kb_header));
        job.stop->rows_offset = sizeof(*job.stop);
        job.rows = (struct kb_row *)(job.stop + 1);
        job.masks = (uint32_t *)(job.stop + 1);
        job.values = (uint64_t *)((uint8_t *)(job.stop + 1) + packed_values_offset(job.request));
        job.full = job.request->flags & KB_FULL_SYNC ||
                   (job.stepping && job.request->steps == 1);
        status = arm(job.vcpu, job.request);
        if (status == 0) {
            loop(&job);
            vcpu_leave(job.vcpu);
            report(&job);
            job.stop->elapsed_ns = now_ns() - start;
            job.vcpu->total_ns += job.stop->elapsed_ns;
            job.stop->total_ns = job.vcpu->total_ns;
        } else {
            vcpu_leave(job.vcpu);
        }
    }
    close_watches(&job);
    pthread_mutex_unlock(&job.vcpu->busy);
    object_put(&job.vcpu->object);
    return status;
}
