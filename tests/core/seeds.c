/* Valid requests of every kind, about objects that are likely to be there. */
#include "generator.h"

#include <linux/kvm.h>
#include <string.h>

#define CODE_GPA 0x1000u
#define QUIET_GPA 0x1100u
#define GUEST_BYTES 0x10000u

/* A few vcpus and small memories, so that what is running is the core and not the kernel's VM construction. */
#define MOST_VMS 3
#define MOST_VCPUS 6
#define MOST_REGIONS 48
#define MOST_FILES 48

/* Port and memory accesses both ways, repeated ones, PUSHF and POPF, HLT; real mode. */
static const uint8_t guest_code[] = {
    0xe4, 0x60,             /* again: in al, 0x60 */
    0xe6, 0x80,             /* out 0x80, al */
    0xa0, 0x00, 0x10,       /* mov al, [0x1000]: no memory there under ds */
    0xa2, 0x00, 0x10,       /* mov [0x1000], al */
    0x9c, 0x9d,             /* pushf; popf */
    0xb9, 0x10, 0x00,       /* mov cx, 16 */
    0xba, 0x80, 0x00,       /* mov dx, 0x80 */
    0xf3, 0x26, 0x6e,       /* rep outsb from es */
    0xbf, 0x00, 0x30,       /* mov di, 0x3000 */
    0xb9, 0x10, 0x00,       /* mov cx, 16 */
    0xf3, 0x6c,             /* rep insb */
    0x26, 0xff, 0x06, 0, 4, /* inc word ptr es:[0x400] */
    0xf4,                   /* hlt */
    0xeb, 0xdd,             /* jmp again */
};

/* Runs on without leaving the guest, so that a recording gets long. */
static const uint8_t quiet_code[] = {
    0x40,                   /* again: inc ax */
    0x9c, 0x9d,             /* pushf; popf */
    0x26, 0xff, 0x06, 0, 4, /* inc word ptr es:[0x400] */
    0xeb, 0xf6,             /* jmp again */
};

static const uint32_t ioctls[] = {
    KVM_GET_API_VERSION, KVM_CHECK_EXTENSION, KVM_GET_VCPU_MMAP_SIZE, KVM_GET_MSR_INDEX_LIST,
    KVM_GET_MSR_FEATURE_INDEX_LIST, KVM_GET_SUPPORTED_CPUID, KVM_GET_EMULATED_CPUID,
    KVM_GET_SUPPORTED_HV_CPUID, KVM_X86_GET_MCE_CAP_SUPPORTED, KVM_SET_TSS_ADDR,
    KVM_SET_IDENTITY_MAP_ADDR, KVM_SET_NR_MMU_PAGES, KVM_GET_NR_MMU_PAGES, KVM_SET_BOOT_CPU_ID,
    KVM_CREATE_IRQCHIP, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, KVM_IRQ_LINE, KVM_IRQ_LINE_STATUS,
    KVM_SET_GSI_ROUTING, KVM_SIGNAL_MSI, KVM_CREATE_PIT2, KVM_GET_PIT, KVM_SET_PIT, KVM_GET_PIT2,
    KVM_SET_PIT2, KVM_REINJECT_CONTROL, KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_SET_PMU_EVENT_FILTER,
    KVM_X86_SET_MSR_FILTER, KVM_ENABLE_CAP, KVM_SET_TSC_KHZ, KVM_GET_TSC_KHZ, KVM_SET_DEVICE_ATTR,
    KVM_GET_DEVICE_ATTR, KVM_HAS_DEVICE_ATTR, KVM_GET_MSRS, KVM_GET_REGS, KVM_SET_REGS,
    KVM_GET_SREGS, KVM_SET_SREGS, KVM_GET_SREGS2, KVM_SET_SREGS2, KVM_GET_FPU, KVM_SET_FPU,
    KVM_GET_XSAVE, KVM_GET_XSAVE2, KVM_SET_XSAVE, KVM_GET_XCRS, KVM_SET_XCRS, KVM_GET_DEBUGREGS,
    KVM_SET_DEBUGREGS, KVM_SET_MSRS, KVM_SET_CPUID, KVM_SET_CPUID2, KVM_GET_CPUID2,
    KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, KVM_GET_MP_STATE, KVM_SET_MP_STATE, KVM_TRANSLATE,
    KVM_INTERRUPT, KVM_NMI, KVM_SMI, KVM_GET_LAPIC, KVM_SET_LAPIC, KVM_TPR_ACCESS_REPORTING,
    KVM_SET_VAPIC_ADDR, KVM_SET_GUEST_DEBUG, KVM_SET_SIGNAL_MASK, KVM_KVMCLOCK_CTRL,
    KVM_X86_SETUP_MCE, KVM_X86_SET_MCE, KVM_GET_NESTED_STATE, KVM_SET_NESTED_STATE, KVM_IOEVENTFD, KVM_IRQFD,
    KVM_REGISTER_COALESCED_MMIO, KVM_UNREGISTER_COALESCED_MMIO,
    /* Not in the core's table, and to be refused: */
    KVM_RUN, KVM_SET_USER_MEMORY_REGION, KVM_CREATE_VM, KVM_CREATE_VCPU,
    KVM_GET_DIRTY_LOG, KVM_MEMORY_ENCRYPT_OP, KVM_XEN_HVM_CONFIG, KVM_CREATE_DEVICE, 0x5401, 0,
};

/* Creation */

static size_t create(struct generator *g, uint8_t *message, uint32_t kind)
{
    struct kb_create create = {.header.kind = kind, .parent = pick(g, OF_VM)};

    switch (kind) {
    case KB_CREATE_VM:
        create.parent = KB_SYSTEM_HANDLE;
        break;
    case KB_CREATE_VCPU:
        create.type = (uint32_t)below(g, 4);
        break;
    case KB_CREATE_DEVICE:
        create.type = (uint32_t)below(g, 16);
        create.flags = one_in(g, 2) ? KVM_CREATE_DEVICE_TEST : 0;
        break;
    case KB_CREATE_EVENTFD:
        break;
    default:
        create.parent = pick(g, one_in(g, 2) ? OF_VM : OF_VCPU);
        break;
    }
    memcpy(message, &create, sizeof(create));
    return sizeof(create);
}

/* Memory */

static size_t add_region(struct generator *g, uint8_t *message)
{
    struct kb_add_region add = {
        .header.kind = KB_ADD_REGION,
        .vm = pick(g, OF_VM),
        .flags = (uint32_t)below(g, 4),
        .gpa = below(g, 64) * 0x4000,
        .size_bytes = (1 + below(g, 32)) * 4096,
    };
    memcpy(message, &add, sizeof(add));
    return sizeof(add);
}

static size_t set_region(struct generator *g, uint8_t *message)
{
    struct kb_set_region set = {
        .header.kind = KB_SET_REGION,
        .handle = pick(g, OF_REGION),
        .flags = (uint32_t)below(g, 4),
        .gpa = below(g, 64) * 0x4000,
    };
    memcpy(message, &set, sizeof(set));
    return sizeof(set);
}

static size_t protect(struct generator *g, uint8_t *message)
{
    struct kb_protect protect = {
        .header.kind = KB_PROTECT,
        .handle = pick(g, OF_REGION),
        .protection = (uint32_t)below(g, 3),
        .offset = below(g, 16) * 4096,
        .length_bytes = below(g, 16) * 4096,
    };
    memcpy(message, &protect, sizeof(protect));
    return sizeof(protect);
}

static size_t range(struct generator *g, uint8_t *message, uint32_t kind)
{
    struct kb_range range = {
        .header.kind = kind,
        .handle = pick(g, kind == KB_READ_STATS ? OF_STATS : OF_REGION),
        .offset = below(g, GUEST_BYTES) | (kind == KB_WRITE_REGION && !one_in(g, 8) ? 0x8000 : 0),
        .length_bytes = below(g, 2048),
    };
    size_t payload = 0;

    if (kind == KB_WRITE_REGION) {
        payload = range.length_bytes;
        scribble(g, message + sizeof(range), payload);
        if (one_in(g, 4)) {
            range.offset = CODE_GPA;
            payload = range.length_bytes = sizeof(guest_code);
            memcpy(message + sizeof(range), guest_code, payload);
        }
    }
    memcpy(message, &range, sizeof(range));
    return sizeof(range) + payload;
}

static size_t fill(struct generator *g, uint8_t *message)
{
    struct kb_fill fill = {
        .header.kind = KB_FILL_REGION,
        .handle = pick(g, OF_REGION),
        .byte = (uint32_t)below(g, 256),
        .offset = below(g, GUEST_BYTES),
        .length_bytes = below(g, 2048),
    };
    memcpy(message, &fill, sizeof(fill));
    return sizeof(fill);
}

/* ioctls */

static struct kvm_segment segment(uint64_t base, uint8_t type)
{
    return (struct kvm_segment){
        .base = base, .limit = 0xffff, .selector = (uint16_t)(base >> 4), .type = type, .present = 1, .s = 1,
    };
}

static size_t ioctl_payload(struct generator *g, uint32_t request, uint8_t *payload)
{
    size_t size = request >> _IOC_SIZESHIFT & _IOC_SIZEMASK;
    uint32_t entries = (uint32_t)below(g, 9);
    bool reads = _IOC_DIR(request) & _IOC_WRITE;

    switch (request) {
    case KVM_SET_SREGS: {
        struct kvm_sregs sregs = {
            .cs = segment(0, 11), .ds = segment(0x200000, 3), .es = segment(0, 3), .fs = segment(0, 3),
            .gs = segment(0, 3), .ss = segment(0, 3),
            .tr = {.limit = 0xffff, .type = 11, .present = 1}, .ldt = {.limit = 0xffff, .type = 2, .present = 1},
            .gdt.limit = 0xffff, .idt.limit = 0xffff, .cr0 = 0x10, .apic_base = 0xfee00900,
        };
        sregs.ds.selector = 0x2000;
        memcpy(payload, &sregs, sizeof(sregs));
        return sizeof(sregs);
    }
    case KVM_SET_REGS: {
        struct kvm_regs regs = {.rip = one_in(g, 2) ? CODE_GPA : QUIET_GPA, .rsp = 0x8000, .rflags = 2};
        memcpy(payload, &regs, sizeof(regs));
        return sizeof(regs);
    }
    case KVM_GET_MSRS:
    case KVM_SET_MSRS: {
        struct kvm_msr_entry msr = {.index = 0x174 + entries};
        memset(payload, 0, size);
        memcpy(payload, &entries, sizeof(entries));
        for (uint32_t n = 0; n < entries; n++)
            memcpy(payload + size + n * sizeof(msr), &msr, sizeof(msr));
        return size + entries * sizeof(msr);
    }
    case KVM_SET_CPUID2:
        memset(payload, 0, size + entries * sizeof(struct kvm_cpuid_entry2));
        memcpy(payload, &entries, sizeof(entries));
        return size + entries * sizeof(struct kvm_cpuid_entry2);
    case KVM_SET_GSI_ROUTING:
        scribble(g, payload, size + entries * sizeof(struct kvm_irq_routing_entry));
        memcpy(payload, &entries, sizeof(entries));
        return size + entries * sizeof(struct kvm_irq_routing_entry);
    case KVM_SET_PMU_EVENT_FILTER: {
        struct kvm_pmu_event_filter filter = {.nevents = entries};
        memcpy(payload, &filter, sizeof(filter));
        scribble(g, payload + sizeof(filter), entries * 8);
        return sizeof(filter) + entries * 8;
    }
    case KVM_X86_SET_MSR_FILTER: {
        struct kvm_msr_filter filter = {.flags = (uint32_t)below(g, 2)};
        size_t bitmaps = 0;
        for (uint32_t n = 0; n < entries; n++) {
            filter.ranges[n].flags = (uint32_t)(1 + below(g, 3));
            filter.ranges[n].base = n * 0x1000;
            filter.ranges[n].nmsrs = (uint32_t)below(g, 300);
            bitmaps += (filter.ranges[n].nmsrs + 63) / 64 * 8;
        }
        memcpy(payload, &filter, sizeof(filter));
        scribble(g, payload + sizeof(filter), bitmaps);
        return sizeof(filter) + bitmaps;
    }
    case KVM_ENABLE_CAP: {
        struct kvm_enable_cap cap = {.cap = (uint32_t)below(g, 256), .args = {below(g, 4)}};
        memcpy(payload, &cap, sizeof(cap));
        return sizeof(cap);
    }
    case KVM_SET_DEVICE_ATTR:
    case KVM_GET_DEVICE_ATTR:
    case KVM_HAS_DEVICE_ATTR: {
        struct kvm_device_attr attr = {.group = (uint32_t)below(g, 3), .attr = below(g, 3)};
        memcpy(payload, &attr, sizeof(attr));
        if (request != KVM_SET_DEVICE_ATTR)
            return sizeof(attr);
        scribble(g, payload + sizeof(attr), 8);
        return sizeof(attr) + 8;
    }
    case KVM_IOEVENTFD: {
        struct kvm_ioeventfd doorbell = {
            .addr = one_in(g, 2) ? 0x80 : 0x201000, .len = 1u << below(g, 4), .fd = (int32_t)pick(g, OF_EVENTFD),
            .flags = (uint32_t)below(g, 8),
        };
        memcpy(payload, &doorbell, sizeof(doorbell));
        return sizeof(doorbell);
    }
    case KVM_IRQFD: {
        struct kvm_irqfd line = {.fd = pick(g, OF_EVENTFD), .gsi = entries, .flags = (uint32_t)below(g, 4)};
        line.resamplefd = line.flags & KVM_IRQFD_FLAG_RESAMPLE ? pick(g, OF_EVENTFD) : 0;
        memcpy(payload, &line, sizeof(line));
        return sizeof(line);
    }
    case KVM_REGISTER_COALESCED_MMIO:
    case KVM_UNREGISTER_COALESCED_MMIO: {
        /* Where guest_code writes: a port, and memory that is not there. */
        bool pio = one_in(g, 2);
        struct kvm_coalesced_mmio_zone zone = {.addr = pio ? 0x80 : 0x201000, .size = 1 + entries, .pio = pio};
        memcpy(payload, &zone, sizeof(zone));
        return sizeof(zone);
    }
    case KVM_SET_SIGNAL_MASK: {
        uint32_t length = 8;
        memcpy(payload, &length, sizeof(length));
        scribble(g, payload + sizeof(length), 8);
        return one_in(g, 3) ? 0 : 12;
    }
    case KVM_SET_XSAVE:
        memset(payload, 0, 4096);
        return 4096;
    case KVM_SET_NESTED_STATE: {
        struct kvm_nested_state state = {.format = (uint16_t)below(g, 2), .size = sizeof(state)};
        memcpy(payload, &state, sizeof(state));
        return sizeof(state);
    }
    case KVM_REINJECT_CONTROL:
        size = sizeof(struct kvm_reinject_control);
        reads = true;
        break;
    case KVM_SET_IRQCHIP:
    case KVM_SET_PIT:
        reads = true;
        break;
    default:
        break;
    }
    if (!reads)
        return 0;
    if (one_in(g, 2))
        scribble(g, payload, size);
    else
        memset(payload, 0, size);
    return size;
}

static size_t one_ioctl(struct generator *g, uint8_t *message, uint32_t request, enum family family)
{
    struct kb_ioctl one = {
        .header.kind = KB_IOCTL,
        .handle = pick(g, family),
        .request = request,
    };
    switch (request) {
    case KVM_CHECK_EXTENSION:
    case KVM_SET_TSS_ADDR:
    case KVM_SET_NR_MMU_PAGES:
    case KVM_SET_BOOT_CPU_ID:
    case KVM_SET_TSC_KHZ:
        one.value = odd_number(g);
        break;
    default:
        one.out_bytes = one_in(g, 2) ? (uint32_t)below(g, 6000) : 0;
        break;
    }
    memcpy(message, &one, sizeof(one));
    return sizeof(one) + ioctl_payload(g, request, message + sizeof(one));
}

/* Running */

static size_t execute(struct generator *g, uint8_t *message)
{
    struct kb_execute run = {
        .header.kind = KB_EXECUTE,
        .vcpu = pick(g, OF_VCPU),
        .mode = one_in(g, 3) ? KB_RUN : KB_STEP,
        .steps = below(g, one_in(g, 4) ? 400 : 20),
        .deadline_ns = 20000 + below(g, one_in(g, 16) ? 5000000 : 200000),
        .flags = (uint32_t)below(g, 256) & (one_in(g, 8) ? ~0u : ~(uint32_t)KB_COMPLETE),
        .debug_control = one_in(g, 8) ? KVM_GUESTDBG_USE_HW_BP : one_in(g, 16) ? KVM_GUESTDBG_USE_SW_BP : 0,
        .debugreg = {CODE_GPA + below(g, sizeof(guest_code)), 0, 0, 0, 0, 0, 0, 0x401},
        .io_bytes = one_in(g, 3) ? 0 : g->io_wanted,
        .n_stops = one_in(g, 3) ? (uint32_t)below(g, 20) : 0,
        .n_watches = one_in(g, 3) ? (uint32_t)below(g, 6) : 0,
        .max_rows = (uint32_t)(1 + below(g, 50)),
    };
    if (run.mode == KB_RUN) {
        run.flags &= ~(uint32_t)(KB_RECORD | KB_HANDLERS | KB_OVER_HANDLERS | KB_WHOLE_REP);
        run.n_stops = run.n_watches = 0;
    } else {
        run.flags &= ~(uint32_t)KB_BARE;
    }
    if (run.flags & KB_OVER_HANDLERS)
        run.flags |= KB_HANDLERS;
    if (run.io_bytes > 4096)
        run.io_bytes = 4096;
    uint8_t *payload = message + sizeof(run);
    scribble(g, payload, run.io_bytes);
    payload += run.io_bytes;
    for (uint32_t n = 0; n < run.n_stops; n++, payload += 8) {
        uint64_t stop = CODE_GPA + below(g, 0x200);
        memcpy(payload, &stop, sizeof(stop));
    }
    for (uint32_t n = 0; n < run.n_watches; n++) {
        struct kb_watch watch = {pick(g, OF_REGION), (uint32_t)(1 + below(g, 16)), 0x400 - below(g, 8)};
        if (one_in(g, 4)) /* about the end of a region */
            watch.offset = (1 + below(g, 32)) * 4096 - below(g, 20);
        if (one_in(g, 8))
            watch.offset = odd_number(g);
        if (one_in(g, 8))
            watch.length_bytes = (uint32_t)odd_number(g);
        memcpy(payload, &watch, sizeof(watch));
        payload += sizeof(watch);
    }
    memcpy(message, &run, sizeof(run));
    return (size_t)(payload - message);
}

static size_t lockstep(struct generator *g, uint8_t *message)
{
    struct kb_lockstep head = {.header.kind = KB_LOCKSTEP,
                               .n_vcpus = one_in(g, 4) ? (uint32_t)odd_number(g) : (uint32_t)(1 + below(g, 2)),
                               .n_turns = 1 + below(g, 60),
                               .deadline_ns = 20000 + below(g, 200000)};
    uint8_t *payload = message + sizeof(head);

    for (uint32_t n = 0; n < head.n_vcpus && n < 3; n++) {
        size_t size = (execute(g, payload) + 7) & ~(size_t)7;
        struct kb_execute run;
        memcpy(&run, payload, sizeof(run));
        if (n > 0 || !one_in(g, 8)) { /* one with a payload of 4 KiB fits a message */
            size = (sizeof(run) + 7) & ~(size_t)7;
            run.mode = KB_STEP;
            run.flags &= KB_RECORD | KB_PACK | KB_HANDLERS;
            run.io_bytes = run.n_stops = run.n_watches = 0;
            run.max_rows = 100;
        }
        run.header.size_bytes = one_in(g, 16) ? (uint32_t)odd_number(g) : (uint32_t)size;
        if (n == 0)
            head.vcpu = run.vcpu;
        memcpy(payload, &run, sizeof(run));
        payload += size;
    }
    for (uint64_t turn = 0; turn < head.n_turns; turn++)
        *payload++ = (uint8_t)(one_in(g, 500) ? below(g, 256) : below(g, head.n_vcpus == 1 ? 1 : 2));
    memcpy(message, &head, sizeof(head));
    return (size_t)(payload - message);
}

static size_t raw_loop(struct generator *g, uint8_t *message)
{
    struct kb_raw_loop loop = {
        .header.kind = KB_RAW_LOOP, .vcpu = pick(g, OF_VCPU), .sort = (uint32_t)(1 + below(g, 2)), .count = below(g, 50),
    };
    memcpy(message, &loop, sizeof(loop));
    return sizeof(loop);
}

static size_t about(struct generator *g, uint8_t *message, uint32_t kind, enum family family)
{
    struct kb_handle handle = {.header.kind = kind, .handle = pick(g, family)};
    memcpy(message, &handle, sizeof(handle));
    return sizeof(handle);
}

static uint32_t newest(struct generator *g, enum family family)
{
    return g->count[family] ? g->handles[family][g->count[family] - 1] : 0;
}

/* The steps that lead to a machine that runs; the last three mend one whose state was damaged. */
static size_t build_up(struct generator *g, uint8_t *message)
{
    struct kb_create create = {.header.kind = KB_CREATE_VM, .parent = KB_SYSTEM_HANDLE};
    struct kb_add_region add = {.header.kind = KB_ADD_REGION, .vm = newest(g, OF_VM), .size_bytes = GUEST_BYTES};
    struct kb_range code = {.header.kind = KB_WRITE_REGION,
                            .handle = newest(g, OF_REGION),
                            .offset = CODE_GPA,
                            .length_bytes = QUIET_GPA - CODE_GPA + sizeof(quiet_code)};
    size_t size;

    switch (g->planned--) {
    case 6:
        memcpy(message, &create, sizeof(create));
        return sizeof(create);
    case 5:
        memcpy(message, &add, sizeof(add));
        return sizeof(add);
    case 4:
        create.header.kind = KB_CREATE_VCPU;
        create.parent = newest(g, OF_VM);
        memcpy(message, &create, sizeof(create));
        return sizeof(create);
    case 3:
        memcpy(message, &code, sizeof(code));
        memcpy(message + sizeof(code), guest_code, sizeof(guest_code));
        memcpy(message + sizeof(code) + QUIET_GPA - CODE_GPA, quiet_code, sizeof(quiet_code));
        return sizeof(code) + code.length_bytes;
    case 2:
        size = one_ioctl(g, message, KVM_SET_SREGS, OF_VCPU);
        break;
    default:
        size = one_ioctl(g, message, KVM_SET_REGS, OF_VCPU);
        break;
    }
    uint32_t vcpu = newest(g, OF_VCPU);
    memcpy(message + offsetof(struct kb_ioctl, handle), &vcpu, sizeof(vcpu));
    return size;
}

size_t valid_message(struct generator *g, uint8_t *message)
{
    if (!g->planned && g->count[OF_VM] < MOST_VMS && g->count[OF_VCPU] < MOST_VCPUS && one_in(g, 200))
        g->planned = 6;
    if (!g->planned && g->count[OF_VCPU] && one_in(g, 25))
        g->planned = 3;
    if (g->planned)
        return build_up(g, message);
    uint64_t which = below(g, 2000);
    if (which < 1)
        return raw_loop(g, message);
    if (which < 4)
        return about(g, message, KB_CLOSE, OF_VM);
    if (which < 6) {
        struct kb_header header = {.kind = KB_HOST_INFO};
        memcpy(message, &header, sizeof(header));
        return sizeof(header);
    }
    if (which < 10 && g->count[OF_VM] < MOST_VMS)
        return create(g, message, KB_CREATE_VM);
    if (which < 14 && g->count[OF_VCPU] < MOST_VCPUS)
        return create(g, message, KB_CREATE_VCPU);
    if (which < 20)
        return about(g, message, KB_CLOSE, OF_VCPU);
    if (which < 60 && g->count[OF_DEVICE] < MOST_FILES)
        return create(g, message, KB_CREATE_DEVICE);
    if (which < 80 && g->count[OF_STATS] < MOST_FILES)
        return create(g, message, KB_OPEN_STATS);
    if (which < 100)
        return about(g, message, KB_CLOSE, one_in(g, 2) ? OF_STATS : OF_DEVICE);
    if (which < 140)
        return g->count[OF_REGION] < MOST_REGIONS ? add_region(g, message) : about(g, message, KB_CLOSE, OF_REGION);
    if (which < 150)
        return about(g, message, KB_CLOSE, OF_REGION);
    if (which < 165)
        return set_region(g, message);
    if (which < 185)
        return protect(g, message);
    if (which < 280)
        return range(g, message, KB_WRITE_REGION);
    if (which < 380)
        return range(g, message, KB_READ_REGION);
    if (which < 440)
        return range(g, message, KB_READ_STATS);
    if (which < 460)
        return fill(g, message);
    if (which < 500)
        return about(g, message, KB_DIRTY_LOG, OF_REGION);
    if (which < 540)
        return about(g, message, KB_KICK, OF_VCPU);
    if (which < 543)
        return g->count[OF_EVENTFD] < MOST_FILES ? create(g, message, KB_CREATE_EVENTFD)
                                                 : about(g, message, KB_CLOSE, OF_EVENTFD);
    if (which < 545)
        return about(g, message, KB_READ_EVENTFD, OF_EVENTFD);
    if (which < 547) {
        struct kb_eventfd add = {.header.kind = KB_WRITE_EVENTFD, .handle = pick(g, OF_EVENTFD), .add = odd_number(g)};
        memcpy(message, &add, sizeof(add));
        return sizeof(add);
    }
    if (which < 552)
        return about(g, message, KB_TAKE_COALESCED, OF_VCPU);
    if (which < 560)
        return about(g, message, KB_CLOSE, OF_NOTHING);
    if (which < 600) {
        struct kb_header header = {.kind = (uint32_t)odd_number(g)};
        memcpy(message, &header, sizeof(header));
        return sizeof(header);
    }
    if (which < 700)
        return one_ioctl(g, message, one_in(g, 2) ? KVM_SET_REGS : KVM_SET_SREGS, OF_VCPU);
    if (which < 1300) {
        enum family family = one_in(g, 3) ? OF_VM : one_in(g, 5) ? OF_SYSTEM : one_in(g, 12) ? OF_DEVICE : OF_VCPU;
        return one_ioctl(g, message, ioctls[below(g, COUNT_OF(ioctls))], family);
    }
    if (which < 1340)
        return lockstep(g, message);
    if (which < 1440)
        return trace_message(g, message);
    if (which < 1500)
        return kernel_message(g, message);
    return execute(g, message);
}
