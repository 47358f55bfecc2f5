/*
 * One KB_EXECUTE while it is served: shared by execute.c (the request), loop.c
 * (running and stepping), watches.c (what the stepping loop compares) and
 * report.c (rows and the stop).
 */
#ifndef KVMBENCH_JOB_H
#define KVMBENCH_JOB_H

#include "internal.h"

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

/* loop.c */
int job_arm(struct job *job);
void job_loop(struct job *job);
int vcpu_fetch_regs(struct vcpu *vcpu);
int vcpu_fetch_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs);
/* True for exits that wait for an answer of user space and go on with the next KVM_RUN. */
bool exit_is_answered(uint32_t reason);

/* watches.c */
int watches_open(struct job *job, uint8_t *before, size_t room);
void watches_close(struct job *job);
bool watch_changed(struct job *job, uint32_t *index);
bool stop_at(const struct job *job, uint64_t linear_pc, uint32_t *index);

/* report.c */
void report_start(struct job *job);
void report_step(struct job *job, uint32_t exit_reason, uint32_t taint);
void report_stop(struct job *job);

#endif
