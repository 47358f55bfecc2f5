/*
 * The log of a trace: a row for each KVM_RUN of a vcpu, whoever may trace or not.
 *
 * Facts first: a user-space exit costs 5 to 8 us at least, two readings of the clock 50 ns.  So a row is written
 * on the vcpu's own thread, without a lock, into a ring that another thread empties (KB_TRACE_READ).  A full ring
 * loses the newest rows and counts them: those before tell how it came to that.  It then stays closed until the
 * reader has taken all of it, so that there is one hole, behind the last row.
 *
 * A VM without a trace pays one load for it.
 */
#ifndef KVMBENCH_RUN_LOG_H
#define KVMBENCH_RUN_LOG_H

#include "internal.h"

struct trace;

struct run_log {
    atomic_int users;    /* the vcpu and the trace */
    atomic_bool ended;   /* the trace is closed */
    struct run_log *next; /* in trace->logs */
    uint32_t vcpu;       /* handle */
    pid_t marked;        /* thread that the kernel's trace knows as this vcpu's */
    _Atomic pid_t thread; /* that runs the vcpu */
    uint64_t rows;       /* room for, a power of two; 0: only events are wanted */
    _Atomic uint64_t head; /* rows written, */
    _Atomic uint64_t tail; /* and read */
    _Atomic uint64_t lost;
    _Atomic uint64_t entered_ns; /* of the KVM_RUN that is under way, or 0, */
    uint64_t told_ns;            /* and of the last one that the reader was told of */
    struct kb_log_row row[];
};

/* KVM_RUN, with a row in the log if the VM is traced; errno as ioctl() leaves it. */
int vcpu_kvm_run(struct vcpu *vcpu);
void run_log_put(struct run_log *log);
/* Moves as many rows as there is room for to `bytes`; how many bytes.  *lost: rows lost behind them.  Behind the
 * last comes a KVM_RUN that is under way, once, with leave_ns 0. */
size_t run_log_take(struct run_log *log, uint8_t *bytes, size_t room, uint64_t *lost, bool *more);

#endif
