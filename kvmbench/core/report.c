/* What a request brings back: a row a step, packed or not, and the stop. */
#define _GNU_SOURCE
#include "job.h"

#include <string.h>
#include <sys/ioctl.h>

#define IO_ROOM 4104u /* KVM_EXIT_IO data, at most a page, and the padding after masks */

_Static_assert(sizeof(struct kvm_regs) == sizeof(((struct kb_stop *)0)->regs), "kvm_regs");
_Static_assert(sizeof(struct kvm_sregs) == sizeof(((struct kb_stop *)0)->sregs), "kvm_sregs");
_Static_assert(sizeof(struct kvm_vcpu_events) == sizeof(((struct kb_stop *)0)->events), "events");
_Static_assert(offsetof(struct kvm_run, kvm_valid_regs) <= KB_RUN_BYTES, "exit union");
_Static_assert(sizeof(struct kb_row) == sizeof(struct kvm_regs) + 8, "a row is kvm_regs and more");

size_t vcpu_execute_room(const struct kb_execute *request)
{
    size_t rows = request->flags & KB_RECORD ? request->max_rows : 0;
    size_t row_bytes = request->flags & KB_PACK ? KB_PACKED_ROW_BYTES : sizeof(struct kb_row);

    if (rows > KB_MAX_STEPS_ROWS)
        rows = 0; /* will be refused */
    return sizeof(struct kb_stop) + rows * row_bytes + IO_ROOM + sizeof(struct kb_history);
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

void report_step(struct job *job, uint32_t exit_reason, uint32_t taint)
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
    /* Whether this is a handler's beginning is what the last step says; an image of our TF stays. */
    stop->tainted &= ~(uint32_t)(KB_TAINT_JUMPED | KB_TAINT_ENTERED | KB_TAINT_SHARED);
    stop->tainted |= taint & ~(0xffu << KB_VECTOR_SHIFT);
    if (taint & KB_TAINT_ENTERED)
        stop->vector = taint >> KB_VECTOR_SHIFT & 0xff;
}

static size_t packed_values_offset(const struct kb_execute *request)
{
    return (request->max_rows * sizeof(uint32_t) + 7) & ~7ul;
}

void report_start(struct job *job)
{
    job->stop = (struct kb_stop *)job->x->reply;
    memset((uint8_t *)job->stop + sizeof(struct kb_header), 0,
           sizeof(*job->stop) - sizeof(struct kb_header));
    job->stop->rows_offset = sizeof(*job->stop);
    job->rows = (struct kb_row *)(job->stop + 1);
    job->masks = (uint32_t *)(job->stop + 1);
    job->values = (uint64_t *)((uint8_t *)(job->stop + 1) + packed_values_offset(job->request));
}

/* Bits of DR6 that name a debug register which we have not armed: B0 to B3 may be set for any whose address was met
 * (SDM volume 3, "Debug Status Register (DR6)"), under QEMU for those that another guest left, too. */
static uint64_t stray_bits(const struct job *job)
{
    const struct kb_execute *request = job->request;
    uint64_t stray = 0;

    if (request->flags & KB_BARE)
        return 0;
    uint64_t dr7 = request->debug_control & KVM_GUESTDBG_USE_HW_BP ? request->debugreg[7] : 0;
    for (int n = 0; n < 4; n++)
        if (!(dr7 >> 2 * n & 3))
            stray |= 1u << n;
    return stray;
}

/* Copies the state into the reply. */
void report_stop(struct job *job)
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
    bool io = stop->cause == KB_CAUSE_EXIT && exit_is_answered(run->exit_reason);
    if (vcpu->regs_valid || (!io && vcpu_fetch_regs(vcpu) == 0)) {
        memcpy(stop->regs, &vcpu->regs, sizeof(vcpu->regs));
        stop->valid |= KB_VALID_REGS;
    }
    if (job->synced) {
        memcpy(stop->sregs, &run->s.regs.sregs, sizeof(stop->sregs));
        stop->valid |= KB_VALID_SREGS;
    } else if (!io || job->request->flags & KB_FULL_SYNC) {
        if (vcpu_fetch_sregs(vcpu, &sregs) == 0) {
            memcpy(stop->sregs, &sregs, sizeof(sregs));
            stop->valid |= KB_VALID_SREGS;
            vcpu->linear_pc = vcpu_linear(vcpu, vcpu->regs.rip);
        }
    }
    if (job->request->flags & KB_FULL_SYNC &&
        ioctl(vcpu->object.fd, KVM_GET_VCPU_EVENTS, &events) == 0) {
        memcpy(stop->events, &events, sizeof(events));
        stop->valid |= KB_VALID_EVENTS;
    }
    if (stop->exit_reason == KVM_EXIT_DEBUG) {
        stop->debug_pc = run->debug.arch.pc;
        stop->debug_dr6 = run->debug.arch.dr6 & ~stray_bits(job);
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
    if (job->has_history) {
        memcpy(tail, &job->history, sizeof(job->history));
        stop->history_offset = (uint32_t)(tail - (uint8_t *)stop);
        tail += sizeof(job->history);
    }
    job->x->reply_bytes = (size_t)(tail - (uint8_t *)stop);
}
