/*
 * One step under way: shared by step.c (the loop) and arrive.c (the ways in which a step ends at a mark of handlers.h,
 * which KVM does not tell).
 */
#ifndef KVMBENCH_STEP_H
#define KVMBENCH_STEP_H

#include "job.h"

struct step {
    struct instruction instruction;
    struct instruction along; /* the one behind STI or MOV SS, which it may take along */
    uint64_t rip, pc, rsp;
    uint16_t cs;
    uint32_t width, taint;
    bool guest_tf;  /* before, */
    bool loaded_tf; /* and after it, if it retires */
    bool lent_tf;   /* SYSRET: r11 has TF set, so that its step is seen to end */
};

/* step.c */
/* What is known before a step: where it starts, and how to read code there; 0 or -errno. */
int step_prepare(struct vcpu *vcpu);
/* A step is complete: a row, and whether the request goes on. */
bool step_finish(struct job *job, uint32_t exit_reason, uint32_t taint);

/* arrive.c */
/* The vcpu is at the first instruction of a handler: mends the frame, notes it; what it adds to the step's taint. */
uint32_t arrive_enter(struct job *job, const struct step *step, const struct handler *at);
/* IRET out of the handler that a step had entered: the step is over, unless its instruction is tried again. */
bool arrive_leave(struct job *job, const struct step *step, bool *again);
/* The OUT that KVM was left with is one of the marks: the step ends at the first instruction of a handler.
 * 1: it was, and the request goes on; 0: it ends; -1: it was the guest's own OUT. */
int arrive_by_mark(struct job *job, struct step *step);
/* KVM's halt_request, left over from a stepped HLT: it comes with the next exception, before that is delivered, or
 * instead of the debug exit of IRET and SWAPGS (kvm_pvm).  False if the request ends. */
bool arrive_after_old_halt(struct job *job, const struct step *step);
/* KVM_RUN was left early.  Perhaps between the delivery of an exception and the handler's first instruction: the step
 * is over then, and nothing else would tell.  False if the request ends. */
bool arrive_unseen(struct job *job, struct step *step);

#endif
