/*
 * One KB_EXECUTE while it is served: shared by execute.c (the request), loop.c
 * (running), step.c (stepping), watches.c (what the stepping loop compares)
 * and report.c (rows and the stop).
 */
#ifndef KVMBENCH_JOB_H
#define KVMBENCH_JOB_H

#include "handlers.h"
#include "internal.h"
#include "run_log.h"
#include "trap_flag.h"

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
    struct kb_history history;
    bool has_history;
};

/* execute.c */
/* The request against its size, the room for the reply and what is defined; finds the parts of its payload. */
int job_check(struct job *job);
/* Puts the caller's answer to the last exit where KVM looks for it. */
int job_answer(struct vcpu *vcpu, const uint8_t *data, size_t bytes);

/* loop.c */
int job_arm(struct job *job);
void job_loop(struct job *job);
int vcpu_fetch_regs(struct vcpu *vcpu);
int vcpu_fetch_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs);
/* Registers after a KVM_RUN, whether it failed or not. */
int job_take_regs(struct job *job);
void job_fail(struct job *job, int error);
/* Why KVM_RUN was left early; 0: for nothing that stops the request. */
uint32_t job_early_cause(struct vcpu *vcpu);
/* Finishes the exit that the guest is in without running it further; EINTR when that is done, 0 for another exit. */
int vcpu_complete_pending(struct vcpu *vcpu);
/* After an exit that is no debug exit; the request ends here. */
void job_after_exit(struct job *job, uint64_t from_rip, uint32_t taint);
/* True for exits that wait for an answer of user space and go on with the next KVM_RUN. */
bool exit_is_answered(uint32_t reason);

/* step.c */
void step_loop(struct job *job);

/* The linear address of rip: outside 64-bit mode it is 32 bits wide, and a segment may wrap around. */
static inline uint64_t vcpu_linear(const struct vcpu *vcpu, uint64_t rip)
{
    uint64_t linear = rip + vcpu->translation.cs_base;

    return vcpu->translation.width == KB_WIDTH_BITS64 ? linear : linear & 0xffffffffu;
}

/* The registers as the guest has them: KVM hides its TF while we step. */
static inline void job_show_guest_tf(struct vcpu *vcpu)
{
    if (vcpu->guest_tf)
        vcpu->regs.rflags |= FLAGS_TF;
}

/* watches.c */
int watches_open(struct job *job, uint8_t *before, size_t room);
/* Takes what is there now as what was there before. */
void watches_forget(struct job *job);
void watches_close(struct job *job);
bool watch_changed(struct job *job, uint32_t *index);
bool stop_at(const struct job *job, uint64_t linear_pc, uint32_t *index);

/* report.c */
void report_start(struct job *job);
void report_step(struct job *job, uint32_t exit_reason, uint32_t taint);
void report_stop(struct job *job);

#endif
