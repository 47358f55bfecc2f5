/*
 * The ioctls that a message may ask for, and what each does with its argument.
 *
 * Bytes that arrive in a message never become a pointer, a length or a file
 * descriptor that the kernel acts on.  So an ioctl is served only if it is in
 * the table of ioctls.c, which says for whom it is (system, VM, vcpu, device)
 * and what its argument looks like: nothing, a number, a struct of fixed size
 * in one or both directions, or a header with a count and that many entries.
 * The few whose argument holds a pointer, or whose size only KVM knows, have a
 * function of their own (ioctl_special.c) that builds the argument from plain
 * bytes.
 *
 * Left out on purpose: what has a message of its own (memory regions, dirty
 * log, KVM_RUN, KVM_CREATE_*), and what takes descriptors or addresses of this
 * process (Xen, memory encryption).  Where an eventfd is meant (KVM_IOEVENTFD,
 * KVM_IRQFD) the message has its handle, and its descriptor is put in here.
 *
 * To add one, write a line in the table: docs/adding-an-ioctl.md.
 */
#ifndef KVMBENCH_IOCTLS_H
#define KVMBENCH_IOCTLS_H

#include <stddef.h>
#include <stdint.h>

struct vm;

/* The descriptor that an ioctl goes to; the table combines them. */
enum ioctl_scope {
    IOCTL_SYSTEM = 1,
    IOCTL_VM = 2,
    IOCTL_VCPU = 4,
    IOCTL_DEVICE = 8,
};

/*
 * One ioctl on `fd`, which is of sort `scope`.
 *
 *   vm        whose eventfds the struct may name; NULL unless the scope is IOCTL_VM
 *   value     argument of an ioctl that takes a number; else 0
 *   in        the argument struct as it came, all of it: `in_bytes` must be
 *             just what the struct and its counts say
 *   out       where the struct goes that the kernel writes; *out_bytes says
 *             how much of it is filled, at most `out_capacity`
 *   wanted    room in bytes for ioctls that answer with as much as there is
 *             (lists of MSRs and CPUID entries, XSAVE, nested state); else ignored
 *   result    what ioctl() returned
 *
 * `in` and `out` may have any alignment and must not overlap.
 * Returns 0, an enum kb_status or -errno; then *out_bytes and *result are 0.
 */
int core_ioctl(int fd, enum ioctl_scope scope, struct vm *vm, uint32_t request, uint64_t value,
               const void *in, size_t in_bytes, void *out, size_t out_capacity, uint32_t wanted,
               size_t *out_bytes, int32_t *result);

/* The name of an ioctl of the table, or NULL. */
const char *core_ioctl_name(uint32_t request);

#endif
