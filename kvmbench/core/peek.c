/*
 * What the next instruction may do to a single step.
 *
 * KVM sets TF when KVM_SET_GUEST_DEBUG is called and then trusts that it
 * stays: an instruction that loads RFLAGS (POPF, IRET, SYSRET) or enters a
 * handler takes it away, and the guest runs on.  Calling the ioctl before
 * every step would cost as much as the step itself.  So the stepping loop
 * looks at the opcode that is about to run, and renews the ioctl only after
 * the few that matter.  Anything that cannot be read counts as one of them.
 *
 * The look is a page walk of our own (KVM_TRANSLATE would be an ioctl a step)
 * without permission checks: a wrong answer costs time, not truth, as long as
 * PEEK_PLAIN is said only of bytes that were read.
 */
#include "internal.h"

#include <string.h>

#define CR0_PG (1ull << 31)
#define CR4_PSE (1ull << 4)
#define CR4_PAE (1ull << 5)
#define CR4_LA57 (1ull << 12)
#define EFER_LMA (1ull << 10)
#define ENTRY_PRESENT 1u
#define ENTRY_LARGE (1u << 7)
#define ENTRY_ADDRESS 0x000ffffffffff000ull

void translation_set(struct translation *t, const struct kvm_sregs *sregs)
{
    t->cr0 = sregs->cr0;
    t->cr3 = sregs->cr3;
    t->cr4 = sregs->cr4;
    t->efer = sregs->efer;
    if ((sregs->efer & EFER_LMA) && sregs->cs.l)
        t->width = KB_WIDTH_BITS64;
    else
        t->width = sregs->cs.db ? KB_WIDTH_BITS32 : KB_WIDTH_BITS16;
    t->valid = true;
}

static bool read_entry(struct vm *vm, uint64_t gpa, size_t bytes, uint64_t *entry)
{
    const uint8_t *address = vm_memory(vm, gpa, bytes);
    if (!address)
        return false;
    *entry = 0;
    memcpy(entry, address, bytes);
    return *entry & ENTRY_PRESENT;
}

static bool walk(struct vm *vm, const struct translation *t, uint64_t linear, uint64_t *gpa)
{
    uint64_t entry;

    if (!(t->cr0 & CR0_PG)) {
        *gpa = linear & 0xffffffffu;
        return true;
    }
    if (!(t->cr4 & CR4_PAE)) {
        linear &= 0xffffffffu;
        if (!read_entry(vm, (t->cr3 & 0xfffff000u) + (linear >> 22) * 4, 4, &entry))
            return false;
        if ((entry & ENTRY_LARGE) && (t->cr4 & CR4_PSE)) {
            *gpa = (entry & 0xffc00000u) | (entry & 0x1fe000u) << 19 | (linear & 0x3fffffu);
            return true;
        }
        if (!read_entry(vm, (entry & 0xfffff000u) + (linear >> 12 & 0x3ff) * 4, 4, &entry))
            return false;
        *gpa = (entry & 0xfffff000u) | (linear & 0xfff);
        return true;
    }
    int level;
    uint64_t table;
    if (t->efer & EFER_LMA) {
        level = t->cr4 & CR4_LA57 ? 5 : 4;
        table = t->cr3 & ENTRY_ADDRESS;
    } else {
        linear &= 0xffffffffu;
        if (!read_entry(vm, (t->cr3 & 0xffffffe0u) + (linear >> 30) * 8, 8, &entry))
            return false;
        level = 2;
        table = entry & ENTRY_ADDRESS;
    }
    for (; level > 0; level--) {
        int shift = 12 + 9 * (level - 1);
        if (!read_entry(vm, table + (linear >> shift & 0x1ff) * 8, 8, &entry))
            return false;
        if (level == 1 || (level <= 3 && (entry & ENTRY_LARGE))) {
            uint64_t offset = (1ull << shift) - 1;
            *gpa = (entry & ENTRY_ADDRESS & ~offset) | (linear & offset);
            return true;
        }
        table = entry & ENTRY_ADDRESS;
    }
    return false;
}

size_t peek_code(struct vcpu *vcpu, uint64_t linear_pc, uint8_t *bytes, size_t room)
{
    struct vm *vm = vcpu->object.vm;
    size_t got = 0;
    uint64_t gpa;

    pthread_mutex_lock(&vm->lock);
    if (walk(vm, &vcpu->translation, linear_pc, &gpa)) {
        size_t wanted = 4096 - (linear_pc & 0xfff);
        if (wanted > room)
            wanted = room;
        const uint8_t *code = vm_memory(vm, gpa, wanted);
        if (code) {
            memcpy(bytes, code, wanted);
            got = wanted;
        }
    }
    pthread_mutex_unlock(&vm->lock);
    return got;
}

static bool is_prefix(uint8_t byte, bool code64)
{
    switch (byte) {
    case 0x26: case 0x2e: case 0x36: case 0x3e: /* segments */
    case 0x64: case 0x65:
    case 0x66: case 0x67:                       /* operand and address size */
    case 0xf0: case 0xf2: case 0xf3:            /* LOCK, REP */
        return true;
    default:
        return code64 && (byte & 0xf0) == 0x40; /* REX */
    }
}

static enum peek two_byte(uint8_t opcode)
{
    if ((opcode & 0xf0) == 0x80) /* Jcc near */
        return PEEK_BRANCH;
    switch (opcode) {
    case 0x00: case 0x01:                       /* descriptor tables, VM instructions */
    case 0x05: case 0x07: case 0x34: case 0x35: /* SYSCALL and its kin */
    case 0x06:                                  /* CLTS */
    case 0x0b: case 0xb9: case 0xff:            /* UD: into a handler */
    case 0x20: case 0x21: case 0x22: case 0x23: /* control and debug registers */
    case 0x30: case 0xaa:                       /* WRMSR, RSM */
    case 0xb2:                                  /* LSS: the trap waits one instruction more */
        return PEEK_UNUSUAL;
    default:
        return PEEK_PLAIN;
    }
}

enum peek peek_instruction(struct vcpu *vcpu, uint64_t linear_pc)
{
    uint8_t bytes[16];
    size_t n = 0;

    if (!vcpu->translation.valid)
        return PEEK_UNUSUAL;
    size_t got = peek_code(vcpu, linear_pc, bytes, sizeof(bytes));
    bool code64 = vcpu->translation.width == KB_WIDTH_BITS64;
    while (n < got && is_prefix(bytes[n], code64))
        n++;
    if (n >= got)
        return PEEK_UNUSUAL; /* crosses the page, or all prefixes */
    uint8_t opcode = bytes[n];
    if (opcode == 0x0f)
        return n + 1 < got ? two_byte(bytes[n + 1]) : PEEK_UNUSUAL;
    if ((opcode & 0xf0) == 0x70) /* Jcc short */
        return PEEK_BRANCH;
    switch (opcode) {
    case 0x9c:
        return PEEK_PUSHF;
    case 0xe0: case 0xe1: case 0xe2: case 0xe3: /* LOOP, JCXZ */
    case 0xe8: case 0xe9: case 0xeb:            /* CALL, JMP */
    case 0xc2: case 0xc3:                       /* RET */
        return PEEK_BRANCH;
    case 0xff:
        if (n + 1 >= got)
            return PEEK_UNUSUAL;
        switch (bytes[n + 1] >> 3 & 7) {
        case 2: case 4: /* CALL, JMP near */
            return PEEK_BRANCH;
        case 3: case 5: /* far */
            return PEEK_UNUSUAL;
        default:
            return PEEK_PLAIN;
        }
    case 0x9d:                                     /* POPF */
    case 0xcc: case 0xcd: case 0xce: case 0xcf:    /* INT3, INT, INTO, IRET */
    case 0xf1:                                     /* INT1 */
    case 0x9a: case 0xea: case 0xca: case 0xcb:    /* far CALL, JMP, RET */
    case 0x17: case 0x8e:                          /* POP SS, MOV SS: as LSS */
    case 0xfb:                                     /* STI */
        return PEEK_UNUSUAL;
    case 0xf4:
        return PEEK_HLT;
    default:
        return PEEK_PLAIN;
    }
}
