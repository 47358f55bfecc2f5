/*
 * What the files of the core share: the objects behind the handles.
 *
 * Every object counts its users.  The table of handles is one of them, a
 * running call another, a child (vcpu, region, device, statistics file) of a
 * VM one more; the last to let go frees it.  So closing a handle never pulls
 * anything from under a call that still runs.
 */
#ifndef KVMBENCH_INTERNAL_H
#define KVMBENCH_INTERNAL_H

#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <time.h>

#include "core.h"
#include "wire.h"

#define KB_MAX_OBJECTS 4096
#define KB_MAX_SLOTS 1024

/* The signal that takes a vcpu out of KVM_RUN; must reach the running thread. */
#define KB_SIGNAL (SIGRTMIN + 5)

enum sort { SORT_SYSTEM = 1, SORT_VM, SORT_VCPU, SORT_DEVICE, SORT_STATS, SORT_REGION, SORT_TRACE, SORT_EVENTFD, SORT_KERNEL };

struct object {
    enum sort sort;
    uint32_t handle;
    atomic_int users;
    int fd; /* -1 for regions */
    struct core *core;
    struct vm *vm; /* the parent, held; NULL for the system and for VMs */
};

struct vm {
    struct object object;
    pthread_mutex_t lock; /* regions and slots */
    struct region *regions;
    uint8_t slots[KB_MAX_SLOTS]; /* 1: taken */
    atomic_bool irqchip;         /* HLT waits in the kernel */
    atomic_bool takes_ports;     /* an OUT may end in the kernel, by an eventfd or the coalesced ring */
    atomic_int executing;        /* vcpus in KB_EXECUTE; see handlers.c */
    struct vcpu *trapper;        /* whose handlers are marked in memory, under lock */
    pthread_cond_t untrapped;
    struct trace *trace;         /* under lock; not held, for it leaves when it is closed */
    atomic_bool traced;          /* it is on */
};

/* Host memory that outlives its region while somebody looks at it. */
struct mapping {
    atomic_int users;
    uint8_t *address;
    size_t size_bytes;
};

struct slot {
    uint32_t id;
    uint64_t offset;
    uint64_t size_bytes;
    uint32_t flags;
};

struct region {
    struct object object;
    struct region *next; /* in vm->regions, under vm->lock */
    bool linked;
    uint64_t gpa;
    uint64_t size_bytes;
    uint32_t flags;
    struct mapping *mapping;
    uint8_t *protection; /* enum kb_protection of each page, or NULL: none */
    struct slot *slots;
    size_t n_slots;
};

/* What the peek at the next instruction needs, and at what a handler finds; see peek.c. */
struct translation {
    bool valid;
    uint64_t cr0, cr3, cr4, efer;
    uint32_t width; /* enum kb_width */
    uint64_t cs_base, ss_base, idt_base, gdt_base;
    uint32_t idt_bytes, gdt_bytes;
    uint16_t cs;     /* selector */
    bool wide_stack; /* rsp or esp; else sp */
};

struct vcpu {
    struct object object;
    pthread_mutex_t busy; /* held by the call that uses the descriptor */
    struct kvm_run *run;
    size_t run_bytes;
    struct kvm_coalesced_mmio_ring *coalesced; /* of its VM, in the mapping of run; NULL: this KVM has none */
    bool has_sync_regs;

    pthread_mutex_t kick_lock; /* closed, running, thread */
    bool closed;
    bool running;
    pid_t thread;
    atomic_bool kicked;
    atomic_bool expired;
    atomic_bool signalled; /* our own signal came */
    _Atomic uint64_t deadline_ns; /* CLOCK_MONOTONIC; 0: none */
    bool has_timer;
    timer_t timer;
    pid_t timer_thread;
    uint64_t timer_ns; /* when the timer is set to fire; 0: not set */
    uint64_t overdue_ns; /* when core->overdue is to be called; 0: never, or it was */

    bool debug_known; /* debug is what KVM has */
    uint32_t step_exit; /* exit completed at step_rip before a signal came, of a step that goes on; 0: none */
    bool halt_left;   /* KVM has stepped over HLT, and tells the halt at the next exception */
    bool rearm;       /* registers were written since: TF may be gone */
    struct kvm_guest_debug debug;

    struct kvm_regs regs;
    bool regs_valid;
    uint64_t linear_pc;
    struct translation translation;

    bool guest_tf;             /* the guest's own TF, which KVM hides while we step (trap_flag.c) */
    bool owes_tf;              /* KVM has taken it away, and gets it back when the pending exit is completed */
    struct handlers *handlers; /* of its IDT, once it was stepped (handlers.c) */
    struct {                   /* KB_OVER_HANDLERS: the handler that runs as a part of its step, of several requests */
        bool inside;           /* if devices answer it or a deadline cuts it off */
        uint64_t rsp;          /* of what was interrupted, */
        uint64_t from_pc;      /* and the instruction that was to be stepped */
    } over;

    uint32_t pending;   /* KVM_EXIT_IO, _MMIO, ... that the next run completes, or 0 */
    bool completed;     /* its instruction has already retired */
    uint64_t step_rip;  /* rip before the step that it interrupted */
    uint32_t step_taint;
    uint64_t total_ns;
    struct run_log *log;      /* of the VM's trace, once it had one (run_log.h) */
};

struct core {
    pthread_mutex_t lock; /* the table */
    struct object *table[KB_MAX_OBJECTS];
    uint16_t generation[KB_MAX_OBJECTS];
    uint32_t next; /* where the search for a free place starts */
    struct object system;
    void (*overdue)(void *argument, uint32_t vcpu); /* or NULL; see core_on_overdue() */
    void *overdue_argument;
    uint64_t overdue_after_ns;
};

/* A request being served, and where its reply goes. */
struct exchange {
    struct core *core;
    const uint8_t *request;
    size_t request_bytes;
    uint8_t *reply;
    size_t capacity;
    size_t reply_bytes; /* set by the handler; starts as a bare header */
};

/* core.c */
struct object *object_get(struct core *core, uint32_t handle, enum sort sort);
void object_put(struct object *object);
int object_publish(struct core *core, struct object *object);
/* Takes away the handle, and with a VM's those of its children. */
void object_close(struct core *core, struct object *object);
int system_fd(struct core *core);
/* ioctl() for all but KVM_RUN: a timer left armed by a step may interrupt others, such as
 * KVM_CREATE_VM, which gives up when it finds a signal pending. */
int ioctl_again(int fd, unsigned long request, unsigned long argument);

/* vm.c, device.c; each returns 0, a KB_* status or -errno */
int vm_create(struct exchange *x);
void vm_free(struct vm *vm);
int device_create(struct exchange *x);
int stats_open(struct exchange *x);
int stats_read(struct exchange *x);
/* Makes an object of a descriptor and replies with its handle.  Takes over the descriptor, and the caller's hold on
 * `vm` when it succeeds. */
int publish_fd(struct exchange *x, enum sort sort, int fd, struct vm *vm);

/* eventfd.c */
int eventfd_make(struct exchange *x);
int eventfd_take(struct exchange *x);
int eventfd_add(struct exchange *x);
/* The eventfd of that handle, held, or NULL if it is none of this VM's. */
struct object *eventfd_get(struct vm *vm, uint32_t handle);

/* coalesced.c */
int coalesced_take(struct exchange *x);
/* Where the vcpu's mapping shows the ring, or NULL. */
struct kvm_coalesced_mmio_ring *coalesced_ring(int system, struct vcpu *vcpu);

/* memory.c */
int region_add(struct exchange *x);
int region_set(struct exchange *x);
int region_read(struct exchange *x);
int region_write(struct exchange *x);
int region_fill(struct exchange *x);
int region_dirty_log(struct exchange *x);
int region_protect(struct exchange *x);
void region_close(struct region *region);
void region_free(struct region *region);
/* Host address of [gpa, gpa + bytes) inside one region, or NULL; vm->lock held. */
uint8_t *vm_memory(struct vm *vm, uint64_t gpa, size_t bytes);

/* vcpu.c */
int vcpu_create(struct exchange *x);
void vcpu_free(struct vcpu *vcpu);
int vcpu_kick(struct exchange *x);
void vcpu_interrupt(struct vcpu *vcpu);
void vcpu_nudge(struct vcpu *vcpu);
void vcpu_close(struct vcpu *vcpu);
int vcpu_enter(struct vcpu *vcpu, uint64_t deadline_ns, uint64_t now);
void vcpu_leave(struct vcpu *vcpu);
/* Of several vcpus that this thread has entered, the one that it runs next. */
void vcpu_switch(struct vcpu *vcpu);
int vcpu_rearm_timer(struct vcpu *vcpu, uint64_t now);
uint64_t now_ns(void);
/* Makes KVM_RUN come back at once, or not.  A kick and the signal handler may both be at it. */
static inline void vcpu_set_immediate_exit(struct vcpu *vcpu, bool on)
{
    __atomic_store_n(&vcpu->run->immediate_exit, on, __ATOMIC_RELAXED);
}

/* execute.c, report.c, raw_loop.c */
int vcpu_execute(struct exchange *x);
size_t vcpu_execute_room(const struct kb_execute *request);
int vcpu_raw_loop(struct exchange *x);

/* lockstep.c */
int vcpu_lockstep(struct exchange *x);
/* Of a request of at least sizeof(struct kb_lockstep) bytes. */
size_t vcpu_lockstep_room(const uint8_t *bytes, size_t request_bytes);

/* peek.c */
enum peek {
    PEEK_PLAIN,   /* leaves TF and address translation alone, goes to the next instruction */
    PEEK_BRANCH,  /* likewise, but may go anywhere */
    PEEK_PUSHF,   /* plain, but writes RFLAGS to the stack */
    PEEK_HLT,     /* as unusual, and likewise the rest */
    PEEK_POPF,
    PEEK_IRET,
    PEEK_SYSCALL,
    PEEK_SYSRET,
    PEEK_UNUSUAL, /* may clear TF, change mode or address space, or could not be read */
};
/* An instruction that is about to run, as far as stepping must know it. */
struct instruction {
    enum peek kind;
    uint8_t operand_bytes; /* 2, 4 or 8, of PUSHF, POPF and IRET */
    bool stores;           /* may write memory other than by pushing */
    uint8_t shadow_bytes;  /* length of STI, POP SS and MOV SS, which may take the next one along; else 0 */
    bool writes_port;      /* OUT and OUTS of a byte */
    bool repeats;          /* a string instruction with REP: a step is one round */
    int vector;            /* of INT n, INT3, INT1 and INTO; else -1 */
    uint8_t bytes[16];     /* what is there, as far as it is mapped */
    uint8_t n_bytes;
};
void translation_set(struct translation *t, const struct kvm_sregs *sregs);
/* The guest-physical address of a linear one, without a look at rights; vm->lock held. */
bool translate(struct vm *vm, const struct translation *t, uint64_t linear, uint64_t *gpa);
struct instruction peek_instruction(struct vcpu *vcpu, uint64_t linear_pc);
/* Bytes of guest memory from linear_pc on, at most `room`, as far as they are mapped; how many. */
size_t peek_code(struct vcpu *vcpu, uint64_t linear_pc, uint8_t *bytes, size_t room);

/* info.c */
int host_info(struct exchange *x);

#endif
