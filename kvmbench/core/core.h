/*
 * The core: KVM descriptors, guest memory, and the loops that run a vcpu.
 *
 * One entry point serves every request of wire.h.  It is thread safe.  Calls
 * that concern one vcpu run on the thread that calls, so a program that keeps
 * KVM's rule (one thread a vcpu) calls from one thread a vcpu; core_vcpu_of()
 * tells which vcpu a request belongs to.  A second call on a running vcpu is
 * answered with KB_BUSY at once; KB_KICK and everything that concerns memory
 * or the VM goes through from any thread.
 *
 * The core keeps no pointer to a request or a reply, and calls back only what
 * core_on_overdue() was given.
 * It uses one signal, KB_SIGNAL, to take a vcpu out of KVM_RUN.
 */
#ifndef KVMBENCH_CORE_H
#define KVMBENCH_CORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct core;

/* 0 or a negative errno.  Opens nothing: /dev/kvm is opened when first used. */
int core_create(struct core **out);

/* Stops every vcpu, closes every descriptor.  Mappings that core_map() handed
 * out stay until core_unmap(). */
void core_destroy(struct core *core);

/* Takes every running vcpu out of the guest, so that calls under way return. */
void core_interrupt(struct core *core);

/* Serves one request of `request_bytes` and writes the reply, whose size it
 * stores.  Always writes at least a header, so reply_capacity must be at least
 * sizeof(struct kb_header); returns 0, or -EINVAL when it is less. */
int core_call(struct core *core, const void *request, size_t request_bytes,
              void *reply, size_t reply_capacity, size_t *reply_bytes);

/* The vcpu handle whose thread the request belongs to (KB_EXECUTE, KB_IOCTL on
 * a vcpu, ...), or 0 for any thread.  Safe on any bytes. */
uint32_t core_vcpu_of(struct core *core, const void *request, size_t request_bytes);

/* Whether a request to a vcpu is likely to be served in less than a millisecond:
 * an ioctl, a few steps, the completion of an exit.  Safe on any bytes. */
bool core_is_brief(const void *request, size_t request_bytes);

/* Has overdue(argument, vcpu) called, on the thread that runs it and once each,
 * when a brief KB_EXECUTE has taken longer than `after_ns` (a HLT that waits for
 * an interrupt).  To be set before the first call. */
void core_on_overdue(struct core *core, uint64_t after_ns, void (*overdue)(void *argument, uint32_t vcpu),
                     void *argument);

/* A core_call that is made again and again with the same buffers, a step or an exit each time. */
struct core_again {
    struct core *core;
    const void *request;
    size_t request_bytes;
    void *reply;
    size_t reply_capacity;
    size_t reply_bytes; /* as core_call returns it */
};

/* core_call with one argument: what it takes Python to pass six costs a tenth of an exit. */
int core_again(struct core_again *again);

/* Room the reply to this request may need, in bytes, at most
 * KB_MAX_MESSAGE_BYTES.  Safe on any bytes. */
size_t core_reply_bytes(struct core *core, const void *request, size_t request_bytes);

/* The bytes of a region for use inside this process only.  Each successful
 * call holds the mapping until core_unmap(token), even past core_destroy(). */
int core_map(struct core *core, uint32_t region, void **address, size_t *size_bytes, void **token);
void core_unmap(void *token);

#endif
