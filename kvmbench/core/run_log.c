/* A row for each KVM_RUN.  See run_log.h. */
#define _GNU_SOURCE
#include "run_log.h"
#include "trace.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#define WRITE_SHIFT 8
#define COUNT_SHIFT 16
#define COUNT_MAX 0xffffu

void run_log_put(struct run_log *log)
{
    if (log && atomic_fetch_sub(&log->users, 1) == 1)
        free(log);
}

/* What the exit was about, from the union in kvm_run. */
static void note_exit(const struct vcpu *vcpu, struct kb_log_row *row)
{
    const struct kvm_run *run = vcpu->run;

    switch (run->exit_reason) {
    case KVM_EXIT_IO: {
        size_t bytes = (size_t)run->io.size * run->io.count;
        uint64_t offset = run->io.data_offset;
        bool out = run->io.direction == KVM_EXIT_IO_OUT;
        row->where = run->io.port;
        row->detail = run->io.size | (uint32_t)out << WRITE_SHIFT |
                      (run->io.count < COUNT_MAX ? run->io.count : COUNT_MAX) << COUNT_SHIFT;
        if (out && offset <= vcpu->run_bytes && bytes <= vcpu->run_bytes - offset)
            memcpy(&row->value, (const uint8_t *)run + offset, bytes < 8 ? bytes : 8);
        break;
    }
    case KVM_EXIT_MMIO:
        row->where = run->mmio.phys_addr;
        row->detail = (run->mmio.len & 0xff) | (uint32_t)(run->mmio.is_write != 0) << WRITE_SHIFT | 1u << COUNT_SHIFT;
        if (run->mmio.is_write)
            memcpy(&row->value, run->mmio.data, run->mmio.len < 8 ? run->mmio.len : 8);
        break;
    case KVM_EXIT_DEBUG:
        row->where = run->debug.arch.pc;
        row->value = run->debug.arch.dr6;
        break;
    case KVM_EXIT_HYPERCALL:
        row->where = run->hypercall.nr;
        break;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        row->where = run->msr.index;
        row->value = run->msr.data;
        row->detail = 8 | (uint32_t)(run->exit_reason == KVM_EXIT_X86_WRMSR) << WRITE_SHIFT;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        row->where = run->internal.suberror;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        row->where = run->fail_entry.hardware_entry_failure_reason;
        break;
    default:
        break;
    }
    if (run->kvm_valid_regs & KVM_SYNC_X86_REGS)
        row->rip = run->s.regs.regs.rip;
}

static void run_log_add(struct run_log *log, const struct kb_log_row *row)
{
    uint64_t head = atomic_load_explicit(&log->head, memory_order_relaxed);
    uint64_t tail = atomic_load_explicit(&log->tail, memory_order_acquire);

    /* Once a row is lost so are those behind it, until the reader was told: the hole is where the reader thinks. */
    if (head - tail >= log->rows || atomic_load_explicit(&log->lost, memory_order_relaxed)) {
        atomic_fetch_add_explicit(&log->lost, 1, memory_order_release);
        return;
    }
    log->row[head & (log->rows - 1)] = *row;
    atomic_store_explicit(&log->head, head + 1, memory_order_release);
}

size_t run_log_take(struct run_log *log, uint8_t *bytes, size_t room, uint64_t *lost, bool *more)
{
    /* Read first: if that KVM_RUN ends meanwhile, its row is among those that follow. */
    uint64_t entered = atomic_load_explicit(&log->entered_ns, memory_order_acquire);
    /* Likewise: if there is a hole, `head` stands still until it is told. */
    bool hole = atomic_load_explicit(&log->lost, memory_order_acquire) != 0;
    uint64_t tail = atomic_load_explicit(&log->tail, memory_order_relaxed);
    uint64_t head = atomic_load_explicit(&log->head, memory_order_acquire);
    uint64_t wanted = head - tail;
    uint64_t fit = room / sizeof(struct kb_log_row);

    *lost = 0;
    *more = wanted > fit;
    if (wanted > fit)
        wanted = fit;
    for (uint64_t done = 0; done < wanted;) {
        uint64_t from = (tail + done) & (log->rows - 1);
        uint64_t n = log->rows - from < wanted - done ? log->rows - from : wanted - done;
        memcpy(bytes + done * sizeof(struct kb_log_row), &log->row[from], n * sizeof(struct kb_log_row));
        done += n;
    }
    atomic_store_explicit(&log->tail, tail + wanted, memory_order_release);
    if (hole && !*more)
        *lost = atomic_exchange(&log->lost, 0);
    if (!*more && entered && entered != log->told_ns) {
        struct kb_log_row row = {.enter_ns = entered, .thread = (uint32_t)atomic_load(&log->thread)};
        *more = wanted == fit;
        if (!*more) {
            memcpy(bytes + wanted++ * sizeof(row), &row, sizeof(row));
            log->told_ns = entered;
        }
    }
    return wanted * sizeof(struct kb_log_row);
}

static int logged_run(struct vcpu *vcpu)
{
    struct run_log *log = trace_log_of(vcpu);
    struct kb_log_row row = {0};

    if (!log || !log->rows)
        return ioctl(vcpu->object.fd, KVM_RUN, 0);
    /* The row's rip; whoever runs the vcpu asks for what it needs itself. */
    if (vcpu->has_sync_regs)
        vcpu->run->kvm_valid_regs |= KVM_SYNC_X86_REGS;
    row.enter_ns = now_ns();
    atomic_store_explicit(&log->thread, vcpu->thread, memory_order_relaxed);
    atomic_store_explicit(&log->entered_ns, row.enter_ns, memory_order_release);
    int result = ioctl(vcpu->object.fd, KVM_RUN, 0);
    int error = errno;
    row.leave_ns = now_ns();
    row.thread = (uint32_t)vcpu->thread;
    row.error = result < 0 ? error : 0;
    if (result < 0) {
        if (vcpu->run->kvm_valid_regs & KVM_SYNC_X86_REGS)
            row.rip = vcpu->run->s.regs.regs.rip;
    } else {
        row.exit = vcpu->run->exit_reason;
        note_exit(vcpu, &row);
    }
    run_log_add(log, &row);
    atomic_store_explicit(&log->entered_ns, 0, memory_order_release);
    errno = error;
    return result;
}

int vcpu_kvm_run(struct vcpu *vcpu)
{
    if (__builtin_expect(atomic_load_explicit(&vcpu->object.vm->traced, memory_order_relaxed), 0))
        return logged_run(vcpu);
    return ioctl(vcpu->object.fd, KVM_RUN, 0);
}
