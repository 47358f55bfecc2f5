/*
 * The ioctls whose argument no line of the table in ioctls.c can describe: it
 * holds a pointer or a descriptor, its size is known to KVM only, or not every
 * value of it is allowed.  Each function builds the argument from plain bytes.
 */
#define _GNU_SOURCE
#include "ioctl_call.h"
#include "internal.h"

#include <cpuid.h>
#include <stdlib.h>
#include <string.h>

/*
 * kvm_device_attr with its payload behind it: to set, the value's bytes; to
 * get, nothing, and `wanted` says how many bytes to hand back.  The pointer in
 * the struct must be 0 and is replaced by that of a buffer here.  KVM does not
 * say how long an attribute is.  On x86 all but one have 8 bytes or less; the
 * buffer is a page so that no attribute of a later kernel can run past it.
 */
int serve_device_attr(struct call *call)
{
    struct kvm_device_attr attr;
    uint64_t buffer[512] = {0};
    size_t payload = call->in_bytes - sizeof(attr);
    bool get = call->request == KVM_GET_DEVICE_ATTR;

    if (call->in_bytes < sizeof(attr) || payload > sizeof(buffer))
        return KB_BAD_LENGTH;
    if (payload != 0 && call->request != KVM_SET_DEVICE_ATTR)
        return KB_BAD_LENGTH;
    if (get && call->wanted > sizeof(buffer))
        return KB_BAD_LENGTH;
    if (get && call->wanted > call->out_capacity)
        return KB_TOO_LARGE;
    memcpy(&attr, call->in, sizeof(attr));
    if (attr.addr != 0)
        return KB_BAD_VALUE;
    if (payload != 0)
        memcpy(buffer, call->in + sizeof(attr), payload);
    attr.addr = (uintptr_t)buffer;

    int status = ioctl_issue(call, &attr);
    if (status == 0 && get) {
        memcpy(call->out, buffer, call->wanted);
        call->out_bytes = call->wanted;
    }
    return status;
}

/*
 * Capabilities that KVM_ENABLE_CAP may switch on: those whose arguments are
 * plain numbers and that leave the core's view of memory alone.  A list of
 * what is allowed, because a capability of a later kernel may take a
 * descriptor or, as KVM_CAP_HYPERV_ENLIGHTENED_VMCS does, an address that KVM
 * then writes to.
 */
static const uint32_t vm_capabilities[] = {
    KVM_CAP_DISABLE_QUIRKS,
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_CAP_X2APIC_API,
    KVM_CAP_X86_DISABLE_EXITS,
    KVM_CAP_MSR_PLATFORM_INFO,
    KVM_CAP_EXCEPTION_PAYLOAD,
#ifdef KVM_CAP_HALT_POLL
    KVM_CAP_HALT_POLL,
#endif
#ifdef KVM_CAP_MAX_VCPU_ID
    KVM_CAP_MAX_VCPU_ID,
#endif
#ifdef KVM_CAP_X86_USER_SPACE_MSR
    KVM_CAP_X86_USER_SPACE_MSR,
#endif
#ifdef KVM_CAP_X86_BUS_LOCK_EXIT
    KVM_CAP_X86_BUS_LOCK_EXIT,
#endif
#ifdef KVM_CAP_EXIT_HYPERCALL
    KVM_CAP_EXIT_HYPERCALL,
#endif
#ifdef KVM_CAP_EXIT_ON_EMULATION_FAILURE
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
#endif
#ifdef KVM_CAP_PMU_CAPABILITY
    KVM_CAP_PMU_CAPABILITY,
#endif
#ifdef KVM_CAP_DISABLE_QUIRKS2
    KVM_CAP_DISABLE_QUIRKS2,
#endif
#ifdef KVM_CAP_X86_TRIPLE_FAULT_EVENT
    KVM_CAP_X86_TRIPLE_FAULT_EVENT,
#endif
#ifdef KVM_CAP_X86_NOTIFY_VMEXIT
    KVM_CAP_X86_NOTIFY_VMEXIT,
#endif
#ifdef KVM_CAP_VM_DISABLE_NX_HUGE_PAGES
    KVM_CAP_VM_DISABLE_NX_HUGE_PAGES,
#endif
#ifdef KVM_CAP_X86_APIC_BUS_CYCLES_NS
    KVM_CAP_X86_APIC_BUS_CYCLES_NS,
#endif
};

static const uint32_t vcpu_capabilities[] = {
    KVM_CAP_HYPERV_SYNIC,
#ifdef KVM_CAP_HYPERV_SYNIC2
    KVM_CAP_HYPERV_SYNIC2,
#endif
#ifdef KVM_CAP_HYPERV_DIRECT_TLBFLUSH
    KVM_CAP_HYPERV_DIRECT_TLBFLUSH,
#endif
#ifdef KVM_CAP_ENFORCE_PV_FEATURE_CPUID
    KVM_CAP_ENFORCE_PV_FEATURE_CPUID,
#endif
#ifdef KVM_CAP_HYPERV_ENFORCE_CPUID
    KVM_CAP_HYPERV_ENFORCE_CPUID,
#endif
};

int serve_enable_cap(struct call *call)
{
    struct kvm_enable_cap cap;
    bool vm = call->scope == IOCTL_VM;
    const uint32_t *allowed = vm ? vm_capabilities : vcpu_capabilities;
    size_t n = vm ? sizeof(vm_capabilities) : sizeof(vcpu_capabilities);

    if (call->in_bytes != sizeof(cap))
        return KB_BAD_LENGTH;
    memcpy(&cap, call->in, sizeof(cap));
    for (size_t i = 0; i < n / sizeof(*allowed); i++) {
        if (allowed[i] == cap.cap)
            return ioctl_issue(call, &cap);
    }
    return KB_NOT_ALLOWED;
}

/*
 * The signals blocked while the vcpu runs; without bytes the mask is taken
 * away again.  The core's own signal always stays open, or no kick and no
 * deadline could end a run.
 */
int serve_signal_mask(struct call *call)
{
    struct {
        uint32_t len;
        uint8_t sigset[8]; /* the kernel's sigset_t, which libc's is longer than */
    } mask;
    uint64_t bits;

    if (call->in_bytes == 0)
        return ioctl_issue(call, NULL);
    if (call->in_bytes != sizeof(mask))
        return KB_BAD_LENGTH;
    memcpy(&mask, call->in, sizeof(mask));
    if (mask.len != sizeof(mask.sigset))
        return KB_BAD_VALUE;
    memcpy(&bits, mask.sigset, sizeof(bits));
    bits &= ~(UINT64_C(1) << (KB_SIGNAL - 1));
    memcpy(mask.sigset, &bits, sizeof(bits));
    return ioctl_issue(call, &mask);
}

/*
 * How much KVM may read or write of a vcpu's XSAVE area.  It is fixed when the
 * vcpu gets its CPUID and can be had from a VM's descriptor only, but it is
 * never more than all states of this processor take (CPUID leaf 0xd, ECX), and
 * never less than struct kvm_xsave without its tail.
 */
static size_t xsave_room(void)
{
    static _Atomic size_t known; /* CPUID leaves a guest for its hypervisor: ask once */
    unsigned int eax, ebx, ecx, edx;
    size_t room = known;

    if (room == 0) {
        room = sizeof(uint32_t[1024]);
        if (__get_cpuid_count(0xd, 0, &eax, &ebx, &ecx, &edx) && ecx > room)
            room = ecx;
        known = room;
    }
    return room;
}

int serve_get_xsave2(struct call *call)
{
    size_t room = xsave_room();

    if (call->in_bytes != 0 || call->wanted > room)
        return KB_BAD_LENGTH;
    if (call->wanted > call->out_capacity)
        return KB_TOO_LARGE;
    uint8_t *area = calloc(1, room);
    if (!area)
        return KB_NO_MEMORY;
    int status = ioctl_issue(call, area);
    if (status == 0) {
        memcpy(call->out, area, call->wanted);
        call->out_bytes = call->wanted;
    }
    free(area);
    return status;
}

int serve_set_xsave(struct call *call)
{
    size_t room = xsave_room();

    if (call->in_bytes < sizeof(uint32_t[1024]) || call->in_bytes > room)
        return KB_BAD_LENGTH;
    uint8_t *area = calloc(1, room);
    if (!area)
        return KB_NO_MEMORY;
    memcpy(area, call->in, call->in_bytes);
    int status = ioctl_issue(call, area);
    free(area);
    return status;
}

/* Header and two VMCS pages on Intel, header and one VMCB on AMD. */
#define NESTED_STATE_BYTES (sizeof(struct kvm_nested_state) + sizeof(struct kvm_vmx_nested_state_data))

int serve_get_nested_state(struct call *call)
{
    size_t head = sizeof(struct kvm_nested_state);
    size_t size_at = offsetof(struct kvm_nested_state, size);
    size_t room = call->wanted < NESTED_STATE_BYTES ? call->wanted : NESTED_STATE_BYTES;

    if (call->in_bytes != 0 || room < head)
        return KB_BAD_LENGTH;
    if (room > call->out_capacity)
        return KB_TOO_LARGE;
    memset(call->out, 0, room);
    store_u32(call->out + size_at, (uint32_t)room);
    int status = ioctl_issue(call, call->out);
    if (status != 0)
        return status;
    uint32_t filled = load_u32(call->out + size_at);
    call->out_bytes = filled < room ? filled : room;
    return 0;
}

int serve_set_nested_state(struct call *call)
{
    size_t size_at = offsetof(struct kvm_nested_state, size);

    if (call->in_bytes < sizeof(struct kvm_nested_state) || call->in_bytes > NESTED_STATE_BYTES ||
        load_u32(call->in + size_at) != call->in_bytes)
        return KB_BAD_LENGTH;
    /* KVM reads as much as the format asks for; the copy is long enough for any. */
    uint8_t *state = calloc(1, NESTED_STATE_BYTES);
    if (!state)
        return KB_NO_MEMORY;
    memcpy(state, call->in, call->in_bytes);
    int status = ioctl_issue(call, state);
    free(state);
    return status;
}

/*
 * kvm_msr_filter with its bitmaps behind it, in the order of the ranges that
 * have any MSRs, each as long as its nmsrs bits make when rounded up to 8
 * bytes.  The pointers in the struct must be 0.
 */
int serve_msr_filter(struct call *call)
{
    struct kvm_msr_filter filter;
    uint8_t *bitmaps;
    size_t used = 0;

    if (call->in_bytes < sizeof(filter))
        return KB_BAD_LENGTH;
    memcpy(&filter, call->in, sizeof(filter));
    size_t payload = call->in_bytes - sizeof(filter);
    for (size_t i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
        size_t bytes = ((size_t)filter.ranges[i].nmsrs + 63) / 64 * 8;

        if (filter.ranges[i].bitmap != NULL || bytes > KVM_MSR_FILTER_MAX_BITMAP_SIZE)
            return KB_BAD_VALUE;
        if (bytes > payload - used)
            return KB_BAD_LENGTH;
        used += bytes;
    }
    if (used != payload)
        return KB_BAD_LENGTH;
    bitmaps = malloc(payload + 1);
    if (!bitmaps)
        return KB_NO_MEMORY;
    memcpy(bitmaps, call->in + sizeof(filter), payload);
    used = 0;
    for (size_t i = 0; i < KVM_MSR_FILTER_MAX_RANGES; i++) {
        filter.ranges[i].bitmap = bitmaps + used;
        used += ((size_t)filter.ranges[i].nmsrs + 63) / 64 * 8;
    }
    int status = ioctl_issue(call, &filter);
    free(bitmaps);
    return status;
}

/*
 * kvm_ioeventfd and kvm_irqfd with the handle of an eventfd of the same VM where the kernel has a descriptor.  Flags
 * that a later kernel may have are refused, for with one the other fields may hold something else.
 */
#define IOEVENTFD_FLAGS (KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)
#define IRQFD_FLAGS (KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE)

int serve_ioeventfd(struct call *call)
{
    struct kvm_ioeventfd argument;

    if (call->in_bytes != sizeof(argument))
        return KB_BAD_LENGTH;
    memcpy(&argument, call->in, sizeof(argument));
    if (argument.flags & ~(uint32_t)IOEVENTFD_FLAGS)
        return KB_BAD_VALUE;
    struct object *eventfd = eventfd_get(call->vm, (uint32_t)argument.fd);
    if (!eventfd)
        return KB_BAD_HANDLE;
    argument.fd = eventfd->fd;
    int status = ioctl_issue(call, &argument);
    object_put(eventfd);
    return status;
}

int serve_irqfd(struct call *call)
{
    struct kvm_irqfd argument;
    struct object *resample = NULL;
    int status = KB_BAD_HANDLE;

    if (call->in_bytes != sizeof(argument))
        return KB_BAD_LENGTH;
    memcpy(&argument, call->in, sizeof(argument));
    bool resamples = argument.flags & KVM_IRQFD_FLAG_RESAMPLE;
    if (argument.flags & ~(uint32_t)IRQFD_FLAGS || (!resamples && argument.resamplefd != 0))
        return KB_BAD_VALUE;
    struct object *eventfd = eventfd_get(call->vm, argument.fd);
    if (resamples)
        resample = eventfd_get(call->vm, argument.resamplefd);
    if (eventfd && (resample || !resamples)) {
        argument.fd = (uint32_t)eventfd->fd;
        argument.resamplefd = resample ? (uint32_t)resample->fd : 0;
        status = ioctl_issue(call, &argument);
    }
    object_put(resample);
    object_put(eventfd);
    return status;
}
