/*
 * How a single step stops at the first instruction of a handler.
 *
 * Facts, each shown by a test in tests/kvm/test_handlers.py:
 *  - The delivery of an exception or interrupt clears TF, and KVM says nothing
 *    of it.  On kvm_amd and kvm_intel a step over a faulting instruction so
 *    runs the whole handler, and more if it does not return; KVM's instruction
 *    emulator stops one instruction into it.
 *  - OUT leaves the guest on every KVM, at CPL 0 and in real mode, with or
 *    without an in-kernel interrupt controller.  INT3 and the debug registers
 *    do not, and there are four of those.
 *
 * So while single steps run, the first byte of each handler in the guest's IDT
 * is e6: OUT to the port that the byte behind it names, whatever that is.  (Where
 * the kernel may answer that port, a controller or an eventfd, the byte behind is e6
 * too; an eventfd for port e6 itself would take the marks.)  The
 * exit is not passed on; rip is put back, and the step ends there.  The byte is
 * put back when the guest steps there, and all are when the request ends.
 *
 * What remains: a guest that reads its handlers as data during a request finds
 * e6 there, and so does whoever reads it through a mapping from another thread
 * meanwhile; so does an instruction that begins before a handler and reaches
 * into it.  A handler whose very first instruction leads to itself is not
 * stopped in, and neither is one whose first byte or mapping the guest changes
 * within the request.
 *
 * Marks are memory, which all vcpus share, so they are set only while no other
 * vcpu of the VM executes; who starts meanwhile waits until they are gone.
 */
#ifndef KVMBENCH_HANDLERS_H
#define KVMBENCH_HANDLERS_H

#include "internal.h"

#define KB_VECTORS 256
#define KB_MARK 0xe6 /* OUT imm8, al */

struct handler {
    uint64_t linear;
    uint8_t vector;     /* the lowest, if several lead here */
    bool shared;
    uint8_t slot_bytes; /* of what its gate pushes: 2, 4 or 8 */
};

/* A byte of guest memory that is e6 meanwhile. */
struct mark {
    uint64_t linear, gpa;
    const uint8_t *at; /* while it is set; see handlers_forget() */
    uint8_t byte; /* what the guest had there */
    bool second;  /* the byte behind a handler's first: only where the kernel has that port */
    bool set;
    bool unmapped; /* its page is not mapped, or was not when that was last looked at */
};

/* A code segment that gates name. */
struct code {
    uint16_t selector;
    uint8_t descriptor[8];
};

struct handlers {
    struct translation from; /* what the list was made with, */
    bool known;
    uint32_t idt_bytes;
    uint8_t idt[16 * KB_VECTORS]; /* and from which bytes */
    uint32_t codes;
    struct code code[KB_VECTORS]; /* likewise of the GDT */
    uint64_t entry[KB_VECTORS];   /* linear address of each vector's handler, 0: none */
    uint32_t count;
    struct handler handler[KB_VECTORS]; /* by address */
    uint32_t marks;
    struct mark mark[2 * KB_VECTORS + 2]; /* by address, the target's two behind them */
    uint64_t target;                      /* see handlers_mark_target(); 0: none */
    atomic_bool here;                     /* marks are set */
    uint32_t entered;                     /* how many were entered since the vcpu began; for history */
    struct kb_entry history[KB_HISTORY];
};

/* Before and after a vcpu executes: nobody else's marks are in memory between them. */
void handlers_vcpu_begins(struct vcpu *vcpu);
void handlers_vcpu_ends(struct vcpu *vcpu);

/* Sets the marks, or sets them anew where registers, the IDT or descriptors have changed. */
void handlers_mark(struct vcpu *vcpu);
void handlers_unmark(struct vcpu *vcpu);
/* Takes whichever vcpu's marks out of memory that goes away; vm->lock held. The others stay: the vcpu may just have run
 * one, and would take it for the guest's own OUT. */
void handlers_forget(struct vm *vm, uint64_t gpa, uint64_t bytes);
/* Puts what the guest has into a copy of memory from gpa on, where marks are; vm->lock held. */
void handlers_cover(const struct vm *vm, uint64_t gpa, uint8_t *copy, size_t bytes);
/* Memory was written from gpa on, perhaps over marks: what was written is what the guest has; vm->lock held. */
void handlers_written(struct vm *vm, uint64_t gpa, size_t bytes);
/* Whether the mark at a linear address is in memory. */
bool handlers_is_set(const struct vcpu *vcpu, uint64_t linear);
/* Whether the IDT in memory, or a descriptor that it names, is another than the marks were made from, a mark was written
 * over, or a handler is mapped by now that was not. */
bool handlers_changed(struct vcpu *vcpu);
/* Takes marks out of the way of the instruction at linear_pc, which begins with KB_MARK; true if there were some, */
bool handlers_step_aside(struct vcpu *vcpu, uint64_t linear_pc);
/* and sets them again. */
void handlers_step_back(struct vcpu *vcpu);
/* Marks where an instruction will lead after which the step may not be seen to end: where SYSCALL goes, which may
 * clear TF, and where IRET returns at CPL 0, which kvm_pvm makes without a step
 * (test_an_iret_is_one_step). */
void handlers_mark_target(struct vcpu *vcpu, uint64_t linear);
/* Where SYSCALL leads (SDM volume 2, "SYSCALL"), or 0. */
uint64_t handlers_syscall_entry(struct vcpu *vcpu);

/* The linear address that a far pointer names, or 0 where it cannot be told. */
uint64_t handlers_far(struct vcpu *vcpu, uint16_t selector, uint64_t offset);

/* The handler that begins at a linear address, or NULL. */
const struct handler *handlers_at(const struct vcpu *vcpu, uint64_t linear);

#endif
