/*
 * The table of ioctls, and the one function that carries them out.
 *
 * Everything that may build an argument for the kernel is here, from the
 * table alone, or in ioctl_special.c, one function an ioctl.
 */
#define _GNU_SOURCE
#include "ioctls.h"
#include "ioctl_call.h"
#include "internal.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

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

static const struct entry *find(uint32_t request)
{
    for (size_t i = 0; i < sizeof(table) / sizeof(table[0]); i++) {
        if (table[i].request == request)
            return &table[i];
    }
    return NULL;
}

int ioctl_issue(struct call *call, void *argument)
{
    int result = ioctl_again(call->fd, call->request, (unsigned long)argument);

    if (result < 0)
        return -errno;
    call->result = result;
    return 0;
}

static int serve_struct(struct call *call, const struct entry *entry)
{
    if (call->in_bytes != (entry->argument == ARG_OUT ? 0 : entry->bytes))
        return KB_BAD_LENGTH;
    if (entry->argument == ARG_IN)
        return ioctl_issue(call, (void *)(uintptr_t)call->in); /* KVM only reads it */
    if (call->out_capacity < entry->bytes)
        return KB_TOO_LARGE;
    if (entry->argument == ARG_INOUT)
        memcpy(call->out, call->in, entry->bytes);
    else
        memset(call->out, 0, entry->bytes);

    int status = ioctl_issue(call, call->out);
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
        return ioctl_issue(call, (void *)(uintptr_t)call->in);
    if (call->out_capacity < call->in_bytes)
        return KB_TOO_LARGE;
    memcpy(call->out, call->in, call->in_bytes);

    int status = ioctl_issue(call, call->out);
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

    int status = ioctl_issue(call, call->out);
    if (status != 0)
        return status;
    uint32_t filled = load_u32(call->out + entry->count_offset);
    if (filled > count)
        filled = count;
    call->out_bytes = entry->bytes + (size_t)filled * entry->entry_bytes;
    return 0;
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
        status = in_bytes == 0 ? ioctl_issue(&call, (void *)(uintptr_t)value) : KB_BAD_LENGTH;
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
