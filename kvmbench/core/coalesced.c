/*
 * Coalesced writes: those that KVM keeps in a ring instead of leaving the guest, until somebody takes them.
 *
 * The ring is one page a VM (KVM_REGISTER_COALESCED_MMIO), which every vcpu's kvm_run mapping shows again.  KVM puts
 * writes in at `last`, under a lock of its own, and gives up on a full ring with an ordinary exit; who takes them out
 * moves `first`, here under vm->lock.  So they can be taken while vcpus run.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

struct kvm_coalesced_mmio_ring *coalesced_ring(int system, struct vcpu *vcpu)
{
    size_t page_bytes = (size_t)sysconf(_SC_PAGESIZE);
    int page = ioctl(system, KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_COALESCED_MMIO);

    if (page <= 0 || ((size_t)page + 1) * page_bytes > vcpu->run_bytes)
        return NULL;
    return (struct kvm_coalesced_mmio_ring *)((uint8_t *)vcpu->run + (size_t)page * page_bytes);
}

int coalesced_take(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;
    struct kb_coalesced_reply *reply = (struct kb_coalesced_reply *)x->reply;
    size_t room = ((size_t)sysconf(_SC_PAGESIZE) - sizeof(struct kvm_coalesced_mmio_ring)) /
                  sizeof(struct kvm_coalesced_mmio);
    uint32_t count = 0;
    int status = 0;

    /* One place stays free, or a full ring would look like an empty one. */
    if (x->capacity < sizeof(*reply) + (room - 1) * sizeof(struct kvm_coalesced_mmio))
        return KB_TOO_LARGE;
    struct vcpu *vcpu = (struct vcpu *)object_get(x->core, request->handle, SORT_VCPU);
    if (!vcpu)
        return KB_BAD_HANDLE;
    struct kvm_coalesced_mmio_ring *ring = vcpu->coalesced;
    struct vm *vm = vcpu->object.vm;
    uint8_t *next = x->reply + sizeof(*reply);
    if (ring) {
        pthread_mutex_lock(&vm->lock);
        uint32_t first = __atomic_load_n(&ring->first, __ATOMIC_RELAXED);
        /* What KVM wrote before it moved `last` is there to be read. */
        uint32_t last = __atomic_load_n(&ring->last, __ATOMIC_ACQUIRE);
        if (first >= room || last >= room)
            status = KB_BAD_RANGE; /* as it is shared memory: nothing is believed */
        while (status == 0 && first != last) {
            memcpy(next, &ring->coalesced_mmio[first], sizeof(struct kvm_coalesced_mmio));
            next += sizeof(struct kvm_coalesced_mmio);
            first = (first + 1) % (uint32_t)room;
            count++;
        }
        if (count)
            __atomic_store_n(&ring->first, first, __ATOMIC_RELEASE);
        pthread_mutex_unlock(&vm->lock);
    }
    object_put(&vcpu->object);
    reply->count = count;
    reply->reserved = 0;
    x->reply_bytes = (size_t)(next - x->reply);
    return status;
}
