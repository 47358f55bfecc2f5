/*
 * The table of ioctls, and the one function that carries them out.
 *
 * Long, because everything that may build an argument for the kernel is here
 * and can be read in one place; half of it is tables.
 */
#define _GNU_SOURCE
#include "ioctls.h"
#include "internal.h"

#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

/* One call, as core_ioctl() got it, and what it has come to. */
struct call {
    int fd;
    enum ioctl_scope scope;
    struct vm *vm; /* or NULL */
    uint32_t request;
    uint64_t value;
    const uint8_t *in;
    size_t in_bytes;
    uint8_t *out;
    size_t out_capacity;
    uint32_t wanted;
    size_t out_bytes;
    int32_t result;
};

enum argument {
    ARG_NONE,        /* nothing */
    ARG_VALUE,       /* a number, in kb_ioctl.value */
    ARG_IN,          /* a struct of `bytes` that the kernel reads, */
    ARG_OUT,         /* that it writes, */
    ARG_INOUT,       /* or both */
    ARG_ARRAY_IN,    /* `bytes` of header with a u32 count at 0, then count entries */
    ARG_ARRAY_INOUT, /* the same, written back */
    ARG_LIST,        /* the same, written only: as many entries as there is room for */
    ARG_SPECIAL,     /* `serve` builds the argument */
};

struct entry {
    uint32_t request;
    uint8_t scope;    /* enum ioctl_scope, several or-ed */
    uint8_t argument; /* enum argument */
    uint32_t bytes;
    uint32_t entry_bytes;
    uint32_t count_offset;
    uint32_t max_entries;
    int (*serve)(struct call *call);
    const char *name;
};

static int serve_device_attr(struct call *call);
static int serve_enable_cap(struct call *call);
static int serve_signal_mask(struct call *call);
static int serve_get_xsave2(struct call *call);
static int serve_set_xsave(struct call *call);
static int serve_get_nested_state(struct call *call);
static int serve_set_nested_state(struct call *call);
static int serve_msr_filter(struct call *call);
static int serve_ioeventfd(struct call *call);
static int serve_irqfd(struct call *call);

#define NONE(ioctl, scope) {ioctl, scope, ARG_NONE, 0, 0, 0, 0, NULL, #ioctl}
#define VALUE(ioctl, scope) {ioctl, scope, ARG_VALUE, 0, 0, 0, 0, NULL, #ioctl}
#define IN(ioctl, scope, type) {ioctl, scope, ARG_IN, sizeof(type), 0, 0, 0, NULL, #ioctl}
#define OUT(ioctl, scope, type) {ioctl, scope, ARG_OUT, sizeof(type), 0, 0, 0, NULL, #ioctl}
#define INOUT(ioctl, scope, type) {ioctl, scope, ARG_INOUT, sizeof(type), 0, 0, 0, NULL, #ioctl}
#define ARRAY(argument, ioctl, scope, type, count, item, max)                                      \
    {ioctl, scope, argument, sizeof(type), sizeof(item), offsetof(type, count), max, NULL, #ioctl}
#define SPECIAL(ioctl, scope, serve) {ioctl, scope, ARG_SPECIAL, 0, 0, 0, 0, serve, #ioctl}

#define SYSTEM IOCTL_SYSTEM
#define VM IOCTL_VM
#define VCPU IOCTL_VCPU
#define DEVICE IOCTL_DEVICE

/* Upper bounds on counts.  KVM has its own (256 CPUID entries and MSRs a call, 4096 routes); these only
 * keep a message from asking for silly amounts. */
#define MAX_CPUID 1024
#define MAX_MSRS 4096
#define MAX_ROUTES 4096
#define MAX_PMU_EVENTS 4096

static const struct entry table[] = {
    /* /dev/kvm */
    NONE(KVM_GET_API_VERSION, SYSTEM),
    VALUE(KVM_CHECK_EXTENSION, SYSTEM | VM),
    NONE(KVM_GET_VCPU_MMAP_SIZE, SYSTEM),
    ARRAY(ARG_LIST, KVM_GET_MSR_INDEX_LIST, SYSTEM, struct kvm_msr_list, nmsrs, uint32_t, MAX_MSRS),
    ARRAY(ARG_LIST, KVM_GET_MSR_FEATURE_INDEX_LIST, SYSTEM, struct kvm_msr_list, nmsrs, uint32_t,
          MAX_MSRS),
    ARRAY(ARG_LIST, KVM_GET_SUPPORTED_CPUID, SYSTEM, struct kvm_cpuid2, nent,
          struct kvm_cpuid_entry2, MAX_CPUID),
    ARRAY(ARG_LIST, KVM_GET_EMULATED_CPUID, SYSTEM, struct kvm_cpuid2, nent,
          struct kvm_cpuid_entry2, MAX_CPUID),
    ARRAY(ARG_LIST, KVM_GET_SUPPORTED_HV_CPUID, SYSTEM | VCPU, struct kvm_cpuid2, nent,
          struct kvm_cpuid_entry2, MAX_CPUID),
    OUT(KVM_X86_GET_MCE_CAP_SUPPORTED, SYSTEM, uint64_t),

    /* Virtual machine */
    VALUE(KVM_SET_TSS_ADDR, VM),
    IN(KVM_SET_IDENTITY_MAP_ADDR, VM, uint64_t),
    VALUE(KVM_SET_NR_MMU_PAGES, VM),
    NONE(KVM_GET_NR_MMU_PAGES, VM),
    VALUE(KVM_SET_BOOT_CPU_ID, VM),
    NONE(KVM_CREATE_IRQCHIP, VM),
    INOUT(KVM_GET_IRQCHIP, VM, struct kvm_irqchip),
    /* The header says that the kernel writes this one and KVM_SET_PIT; it reads them. */
    IN(KVM_SET_IRQCHIP, VM, struct kvm_irqchip),
    IN(KVM_IRQ_LINE, VM, struct kvm_irq_level),
    INOUT(KVM_IRQ_LINE_STATUS, VM, struct kvm_irq_level),
    ARRAY(ARG_ARRAY_IN, KVM_SET_GSI_ROUTING, VM, struct kvm_irq_routing, nr,
          struct kvm_irq_routing_entry, MAX_ROUTES),
    IN(KVM_SIGNAL_MSI, VM, struct kvm_msi),
    IN(KVM_CREATE_PIT2, VM, struct kvm_pit_config),
    OUT(KVM_GET_PIT, VM, struct kvm_pit_state),
    IN(KVM_SET_PIT, VM, struct kvm_pit_state),
    OUT(KVM_GET_PIT2, VM, struct kvm_pit_state2),
    IN(KVM_SET_PIT2, VM, struct kvm_pit_state2),
    /* Declared without an argument, but KVM reads this struct. */
    IN(KVM_REINJECT_CONTROL, VM, struct kvm_reinject_control),
    OUT(KVM_GET_CLOCK, VM, struct kvm_clock_data),
    IN(KVM_SET_CLOCK, VM, struct kvm_clock_data),
    ARRAY(ARG_ARRAY_IN, KVM_SET_PMU_EVENT_FILTER, VM, struct kvm_pmu_event_filter, nevents,
          uint64_t, MAX_PMU_EVENTS),
    SPECIAL(KVM_X86_SET_MSR_FILTER, VM, serve_msr_filter),
    SPECIAL(KVM_IOEVENTFD, VM, serve_ioeventfd),
    SPECIAL(KVM_IRQFD, VM, serve_irqfd),
    IN(KVM_REGISTER_COALESCED_MMIO, VM, struct kvm_coalesced_mmio_zone),
    IN(KVM_UNREGISTER_COALESCED_MMIO, VM, struct kvm_coalesced_mmio_zone),

    /* Several */
    SPECIAL(KVM_ENABLE_CAP, VM | VCPU, serve_enable_cap),
    VALUE(KVM_SET_TSC_KHZ, VM | VCPU),
    NONE(KVM_GET_TSC_KHZ, VM | VCPU),
    SPECIAL(KVM_SET_DEVICE_ATTR, SYSTEM | VM | VCPU | DEVICE, serve_device_attr),
    SPECIAL(KVM_GET_DEVICE_ATTR, SYSTEM | VM | VCPU | DEVICE, serve_device_attr),
    SPECIAL(KVM_HAS_DEVICE_ATTR, SYSTEM | VM | VCPU | DEVICE, serve_device_attr),
    ARRAY(ARG_ARRAY_INOUT, KVM_GET_MSRS, SYSTEM | VCPU, struct kvm_msrs, nmsrs,
          struct kvm_msr_entry, MAX_MSRS),

    /* vcpu */
    OUT(KVM_GET_REGS, VCPU, struct kvm_regs),
    IN(KVM_SET_REGS, VCPU, struct kvm_regs),
    OUT(KVM_GET_SREGS, VCPU, struct kvm_sregs),
    IN(KVM_SET_SREGS, VCPU, struct kvm_sregs),
#ifdef KVM_GET_SREGS2
    OUT(KVM_GET_SREGS2, VCPU, struct kvm_sregs2),
    IN(KVM_SET_SREGS2, VCPU, struct kvm_sregs2),
#endif
    OUT(KVM_GET_FPU, VCPU, struct kvm_fpu),
    IN(KVM_SET_FPU, VCPU, struct kvm_fpu),
    /* 4096 bytes whatever the features; of the struct only its fixed part. */
    OUT(KVM_GET_XSAVE, VCPU, uint32_t[1024]),
#ifdef KVM_GET_XSAVE2
    SPECIAL(KVM_GET_XSAVE2, VCPU, serve_get_xsave2),
#endif
    SPECIAL(KVM_SET_XSAVE, VCPU, serve_set_xsave),
    OUT(KVM_GET_XCRS, VCPU, struct kvm_xcrs),
    IN(KVM_SET_XCRS, VCPU, struct kvm_xcrs),
    OUT(KVM_GET_DEBUGREGS, VCPU, struct kvm_debugregs),
    IN(KVM_SET_DEBUGREGS, VCPU, struct kvm_debugregs),
    ARRAY(ARG_ARRAY_IN, KVM_SET_MSRS, VCPU, struct kvm_msrs, nmsrs, struct kvm_msr_entry, MAX_MSRS),
    ARRAY(ARG_ARRAY_IN, KVM_SET_CPUID, VCPU, struct kvm_cpuid, nent, struct kvm_cpuid_entry,
          MAX_CPUID),
    ARRAY(ARG_ARRAY_IN, KVM_SET_CPUID2, VCPU, struct kvm_cpuid2, nent, struct kvm_cpuid_entry2,
          MAX_CPUID),
    ARRAY(ARG_LIST, KVM_GET_CPUID2, VCPU, struct kvm_cpuid2, nent, struct kvm_cpuid_entry2,
          MAX_CPUID),
    OUT(KVM_GET_VCPU_EVENTS, VCPU, struct kvm_vcpu_events),
    IN(KVM_SET_VCPU_EVENTS, VCPU, struct kvm_vcpu_events),
    OUT(KVM_GET_MP_STATE, VCPU, struct kvm_mp_state),
    IN(KVM_SET_MP_STATE, VCPU, struct kvm_mp_state),
    INOUT(KVM_TRANSLATE, VCPU, struct kvm_translation),
    IN(KVM_INTERRUPT, VCPU, struct kvm_interrupt),
    NONE(KVM_NMI, VCPU),
    NONE(KVM_SMI, VCPU),
    OUT(KVM_GET_LAPIC, VCPU, struct kvm_lapic_state),
    IN(KVM_SET_LAPIC, VCPU, struct kvm_lapic_state),
    INOUT(KVM_TPR_ACCESS_REPORTING, VCPU, struct kvm_tpr_access_ctl),
    IN(KVM_SET_VAPIC_ADDR, VCPU, struct kvm_vapic_addr),
    IN(KVM_SET_GUEST_DEBUG, VCPU, struct kvm_guest_debug),
    SPECIAL(KVM_SET_SIGNAL_MASK, VCPU, serve_signal_mask),
    NONE(KVM_KVMCLOCK_CTRL, VCPU),
    IN(KVM_X86_SETUP_MCE, VCPU, uint64_t),
    IN(KVM_X86_SET_MCE, VCPU, struct kvm_x86_mce),
    SPECIAL(KVM_GET_NESTED_STATE, VCPU, serve_get_nested_state),
    SPECIAL(KVM_SET_NESTED_STATE, VCPU, serve_set_nested_state),
};

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

static const struct entry *find(uint32_t request)
{
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        if (table[i].request == request)
            return &table[i];
    }
    return NULL;
}

/* The ioctl itself; `argument` points into this process or is a checked number. */
static int issue(struct call *call, void *argument)
{
    int result = ioctl_again(call->fd, call->request, (unsigned long)argument);

    if (result < 0)
        return -errno;
    call->result = result;
    return 0;
}

static uint32_t load_u32(const uint8_t *bytes)
{
    uint32_t value;

    memcpy(&value, bytes, sizeof(value));
    return value;
}

static void store_u32(uint8_t *bytes, uint32_t value)
{
    memcpy(bytes, &value, sizeof(value));
}

static int serve_struct(struct call *call, const struct entry *entry)
{
    if (call->in_bytes != (entry->argument == ARG_OUT ? 0 : entry->bytes))
        return KB_BAD_LENGTH;
    if (entry->argument == ARG_IN)
        return issue(call, (void *)(uintptr_t)call->in); /* KVM only reads it */
    if (call->out_capacity < entry->bytes)
        return KB_TOO_LARGE;
    if (entry->argument == ARG_INOUT)
        memcpy(call->out, call->in, entry->bytes);
    else
        memset(call->out, 0, entry->bytes);

    int status = issue(call, call->out);
    if (status == 0)
        call->out_bytes = entry->bytes;
    return status;
}

/* The entries that came are counted by their bytes; the count inside must say the same. */
static int serve_array(struct call *call, const struct entry *entry)
{
    if (call->in_bytes < entry->bytes)
        return KB_BAD_LENGTH;
    uint32_t count = load_u32(call->in + entry->count_offset);
    if (count > entry->max_entries)
        return KB_BAD_VALUE;
    if (call->in_bytes != entry->bytes + (size_t)count * entry->entry_bytes)
        return KB_BAD_LENGTH;
    if (entry->argument == ARG_ARRAY_IN)
        return issue(call, (void *)(uintptr_t)call->in);
    if (call->out_capacity < call->in_bytes)
        return KB_TOO_LARGE;
    memcpy(call->out, call->in, call->in_bytes);

    int status = issue(call, call->out);
    if (status == 0)
        call->out_bytes = call->in_bytes;
    return status;
}

static int serve_list(struct call *call, const struct entry *entry)
{
    if (call->in_bytes != 0 || call->wanted < entry->bytes)
        return KB_BAD_LENGTH;
    uint32_t count = (call->wanted - entry->bytes) / entry->entry_bytes;
    if (count > entry->max_entries)
        count = entry->max_entries;
    size_t bytes = entry->bytes + (size_t)count * entry->entry_bytes;
    if (call->out_capacity < bytes)
        return KB_TOO_LARGE;
    memset(call->out, 0, bytes);
    store_u32(call->out + entry->count_offset, count);

    int status = issue(call, call->out);
    if (status != 0)
        return status;
    uint32_t filled = load_u32(call->out + entry->count_offset);
    if (filled > count)
        filled = count;
    call->out_bytes = entry->bytes + (size_t)filled * entry->entry_bytes;
    return 0;
}

/*
 * kvm_device_attr with its payload behind it: to set, the value's bytes; to
 * get, nothing, and `wanted` says how many bytes to hand back.  The pointer in
 * the struct must be 0 and is replaced by that of a buffer here.  KVM does not
 * say how long an attribute is.  On x86 all but one have 8 bytes or less; the
 * buffer is a page so that no attribute of a later kernel can run past it.
 */
static int serve_device_attr(struct call *call)
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

    int status = issue(call, &attr);
    if (status == 0 && get) {
        memcpy(call->out, buffer, call->wanted);
        call->out_bytes = call->wanted;
    }
    return status;
}

static int serve_enable_cap(struct call *call)
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
            return issue(call, &cap);
    }
    return KB_NOT_ALLOWED;
}

/*
 * The signals blocked while the vcpu runs; without bytes the mask is taken
 * away again.  The core's own signal always stays open, or no kick and no
 * deadline could end a run.
 */
static int serve_signal_mask(struct call *call)
{
    struct {
        uint32_t len;
        uint8_t sigset[8]; /* the kernel's sigset_t, which libc's is longer than */
    } mask;
    uint64_t bits;

    if (call->in_bytes == 0)
        return issue(call, NULL);
    if (call->in_bytes != sizeof(mask))
        return KB_BAD_LENGTH;
    memcpy(&mask, call->in, sizeof(mask));
    if (mask.len != sizeof(mask.sigset))
        return KB_BAD_VALUE;
    memcpy(&bits, mask.sigset, sizeof(bits));
    bits &= ~(UINT64_C(1) << (KB_SIGNAL - 1));
    memcpy(mask.sigset, &bits, sizeof(bits));
    return issue(call, &mask);
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

static int serve_get_xsave2(struct call *call)
{
    size_t room = xsave_room();

    if (call->in_bytes != 0 || call->wanted > room)
        return KB_BAD_LENGTH;
    if (call->wanted > call->out_capacity)
        return KB_TOO_LARGE;
    uint8_t *area = calloc(1, room);
    if (!area)
        return KB_NO_MEMORY;
    int status = issue(call, area);
    if (status == 0) {
        memcpy(call->out, area, call->wanted);
        call->out_bytes = call->wanted;
    }
    free(area);
    return status;
}

static int serve_set_xsave(struct call *call)
{
    size_t room = xsave_room();

    if (call->in_bytes < sizeof(uint32_t[1024]) || call->in_bytes > room)
        return KB_BAD_LENGTH;
    uint8_t *area = calloc(1, room);
    if (!area)
        return KB_NO_MEMORY;
    memcpy(area, call->in, call->in_bytes);
    int status = issue(call, area);
    free(area);
    return status;
}

/* Header and two VMCS pages on Intel, header and one VMCB on AMD. */
#define NESTED_STATE_BYTES (sizeof(struct kvm_nested_state) + sizeof(struct kvm_vmx_nested_state_data))

static int serve_get_nested_state(struct call *call)
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
    int status = issue(call, call->out);
    if (status != 0)
        return status;
    uint32_t filled = load_u32(call->out + size_at);
    call->out_bytes = filled < room ? filled : room;
    return 0;
}

static int serve_set_nested_state(struct call *call)
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
    int status = issue(call, state);
    free(state);
    return status;
}

/*
 * kvm_msr_filter with its bitmaps behind it, in the order of the ranges that
 * have any MSRs, each as long as its nmsrs bits make when rounded up to 8
 * bytes.  The pointers in the struct must be 0.
 */
static int serve_msr_filter(struct call *call)
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
    int status = issue(call, &filter);
    free(bitmaps);
    return status;
}

/*
 * kvm_ioeventfd and kvm_irqfd with the handle of an eventfd of the same VM where the kernel has a descriptor.  Flags
 * that a later kernel may have are refused, for with one the other fields may hold something else.
 */
#define IOEVENTFD_FLAGS (KVM_IOEVENTFD_FLAG_DATAMATCH | KVM_IOEVENTFD_FLAG_PIO | KVM_IOEVENTFD_FLAG_DEASSIGN)
#define IRQFD_FLAGS (KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE)

static int serve_ioeventfd(struct call *call)
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
    int status = issue(call, &argument);
    object_put(eventfd);
    return status;
}

static int serve_irqfd(struct call *call)
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
        status = issue(call, &argument);
    }
    object_put(resample);
    object_put(eventfd);
    return status;
}

int core_ioctl(int fd, enum ioctl_scope scope, struct vm *vm, uint32_t request, uint64_t value,
               const void *in, size_t in_bytes, void *out, size_t out_capacity, uint32_t wanted,
               size_t *out_bytes, int32_t *result)
{
    const struct entry *entry = find(request);
    struct call call = {fd,       scope, vm,           request, value, in,
                        in_bytes, out,   out_capacity, wanted,  0,     0};
    int status;

    *out_bytes = 0;
    *result = 0;
    if (!entry || !(entry->scope & scope))
        return KB_NOT_ALLOWED;
    if (value != 0 && entry->argument != ARG_VALUE)
        return KB_BAD_VALUE;
    switch ((enum argument)entry->argument) {
    case ARG_NONE:
    case ARG_VALUE:
        /* KVM refuses some of the former when the argument is not 0. */
        status = in_bytes == 0 ? issue(&call, (void *)(uintptr_t)value) : KB_BAD_LENGTH;
        break;
    case ARG_IN:
    case ARG_OUT:
    case ARG_INOUT:
        status = serve_struct(&call, entry);
        break;
    case ARG_ARRAY_IN:
    case ARG_ARRAY_INOUT:
        status = serve_array(&call, entry);
        break;
    case ARG_LIST:
        status = serve_list(&call, entry);
        break;
    default:
        status = entry->serve(&call);
        break;
    }
    if (status == 0) {
        *out_bytes = call.out_bytes;
        *result = call.result;
    }
    return status;
}

const char *core_ioctl_name(uint32_t request)
{
    const struct entry *entry = find(request);

    return entry ? entry->name : NULL;
}
