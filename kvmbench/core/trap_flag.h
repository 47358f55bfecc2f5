/*
 * The trap flag: ours, by which KVM steps, and the guest's own.
 *
 * KVM sets TF in the guest's RFLAGS and hides it, and with it the guest's own,
 * in what KVM_GET_REGS tells.  But the processor shows it to the guest wherever
 * it stores RFLAGS: PUSHF, the frame of an exception or interrupt, R11 after
 * SYSCALL.  Here such an image is mended right after the step that made it.
 *
 * The guest's own TF is followed from the instructions that load it (POPF,
 * IRET, SYSRET) and from KVM_SET_REGS, kept in vcpu.guest_tf, and told with the
 * registers.  A step with it set ends as for the guest's own debugger: #DB is
 * put into the guest, with DR6.BS.  Likewise for the guest's own debug registers.
 */
#ifndef KVMBENCH_TRAP_FLAG_H
#define KVMBENCH_TRAP_FLAG_H

#include "internal.h"

#define FLAGS_TF (UINT64_C(1) << 8)

/* The guest's TF after the instruction, if it retires: what it loads, or what it was. */
bool trap_flag_loaded(struct vcpu *vcpu, const struct instruction *instruction);

/* Where IRET would return to; 0: not to CPL 0, or it cannot be told. */
uint64_t trap_flag_return(struct vcpu *vcpu, const struct instruction *iret);

/* Takes our TF out of the RFLAGS that PUSHF has stored at the top of the stack; false if it cannot be reached. */
bool trap_flag_mend_push(struct vcpu *vcpu, unsigned int bytes);

/* What a handler finds on its stack. */
struct frame {
    bool found;
    uint64_t rip;
};

/* Likewise of the frame at the top of the stack.
 *   vector: of the handler, soft: entered by INT n;
 *   cs: the selector that was interrupted */
struct frame trap_flag_mend_frame(struct vcpu *vcpu, unsigned int slot_bytes, int vector, bool soft, uint16_t cs);

/* Puts #DB into the guest with these bits of DR6; 0 or -errno. */
int trap_flag_inject(struct vcpu *vcpu, uint64_t dr6);

/* Makes the INT1 that KVM has intercepted: rip behind it, and #DB into the guest; 0 or -errno. */
int trap_flag_int1(struct vcpu *vcpu);

/* For a debug exit of a vcpu that runs freely: while debug registers of ours are armed (`dr7`), KVM intercepts every
 * #DB; one that is not ours is put into the guest.  1: it was; 0: it is ours, or no #DB; or -errno. */
int trap_flag_hand_on(struct vcpu *vcpu, const uint64_t *dr7);

/* Which of DR6's B0 to B3 the guest has asked for in its own DR7. */
uint64_t trap_flag_guest_breakpoints(struct vcpu *vcpu, uint64_t dr6);

#endif
