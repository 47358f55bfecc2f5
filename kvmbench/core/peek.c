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
    bool flat = t->width == KB_WIDTH_BITS64;
    t->cs_base = flat ? 0 : sregs->cs.base;
    t->ss_base = flat ? 0 : sregs->ss.base;
    t->wide_stack = flat || sregs->ss.db;
    t->cs = sregs->cs.selector;
    t->idt_base = sregs->idt.base;
    t->idt_bytes = (uint32_t)sregs->idt.limit + 1;
    t->gdt_base = sregs->gdt.base;
    t->gdt_bytes = (uint32_t)sregs->gdt.limit + 1;
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

bool translate(struct vm *vm, const struct translation *t, uint64_t linear, uint64_t *gpa)
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
    while (got < room && translate(vm, &vcpu->translation, linear_pc + got, &gpa)) {
        size_t wanted = 4096 - ((linear_pc + got) & 0xfff);
        if (wanted > room - got)
            wanted = room - got;
        const uint8_t *code = vm_memory(vm, gpa, wanted);
        if (!code)
            break;
        memcpy(bytes + got, code, wanted);
        got += wanted;
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
    case 0x05:
        return PEEK_SYSCALL;
    case 0x07:
        return PEEK_SYSRET;
    case 0x00: case 0x01:                       /* descriptor tables, VM instructions */
    case 0x34: case 0x35:                       /* SYSENTER, SYSEXIT */
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

static enum peek one_byte(uint8_t opcode, uint8_t modrm)
{
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
        switch (modrm >> 3 & 7) {
        case 2: case 4: /* CALL, JMP near */
            return PEEK_BRANCH;
        case 3: case 5: /* far */
            return PEEK_UNUSUAL;
        default:
            return PEEK_PLAIN;
        }
    case 0x9d:
        return PEEK_POPF;
    case 0xcf:
        return PEEK_IRET;
    case 0xcc: case 0xcd: case 0xce:            /* INT3, INT, INTO */
    case 0xf1:                                  /* INT1 */
    case 0x9a: case 0xea: case 0xca: case 0xcb: /* far CALL, JMP, RET */
    case 0x17: case 0x8e:                       /* POP SS, MOV SS: as LSS */
    case 0xfb:                                  /* STI */
    case 0x6c: case 0x6d: case 0x6e: case 0x6f: /* INS, OUTS: KVM's emulator, which loses TF */
        return PEEK_UNUSUAL;
    case 0xf4:
        return PEEK_HLT;
    default:
        return PEEK_PLAIN;
    }
}

/* False only of one-byte opcodes that are known to leave memory alone, or to push at most. */
static bool stores(uint8_t opcode, uint8_t modrm)
{
    bool memory = modrm < 0xc0;
    uint8_t extension = modrm >> 3 & 7;

    if (opcode < 0x40) /* arithmetic: only the forms with r/m first; CMP stores nothing */
        return (opcode & 7) < 2 && memory && opcode < 0x38;
    switch (opcode) {
    case 0x6c: case 0x6d:                       /* INS */
    case 0xa2: case 0xa3:                       /* MOV moffs */
    case 0xa4: case 0xa5: case 0xaa: case 0xab: /* MOVS, STOS */
    case 0xc4: case 0xc5: case 0x62:            /* VEX, EVEX; LES, LDS, BOUND elsewhere */
    case 0xc8:                                  /* ENTER */
        return true;
    case 0x80: case 0x81: case 0x82: case 0x83:
        return memory && extension != 7; /* CMP */
    case 0xf6: case 0xf7:
        return memory && (extension == 2 || extension == 3); /* NOT, NEG */
    case 0x86: case 0x87: case 0x88: case 0x89: case 0x8c: case 0x8f: /* XCHG, MOV, POP */
    case 0xc0: case 0xc1: case 0xc6: case 0xc7: case 0xd0: case 0xd1: case 0xd2: case 0xd3:
    case 0xfe: case 0xff:
        return memory;
    default:
        return opcode >= 0xd8 && opcode <= 0xdf && memory; /* x87 */
    }
}

/* Bytes of a ModRM byte with what belongs to it; 0 where they are not all there.
 * Source: SDM volume 2, "Addressing-Mode Encoding of ModR/M and SIB Bytes". */
static size_t modrm_bytes(const uint8_t *at, size_t room, bool short_address)
{
    if (room == 0)
        return 0;
    uint8_t mod = at[0] >> 6, rm = at[0] & 7;
    size_t bytes = 1, far = short_address ? 2 : 4;

    if (mod == 3)
        return 1;
    if (!short_address && rm == 4) { /* SIB */
        if (room < 2)
            return 0;
        bytes = 2;
        if (mod == 0 && (at[1] & 7) == 5)
            bytes += far;
    } else if (mod == 0 && rm == (short_address ? 6 : 5)) {
        bytes += far;
    }
    bytes += mod == 1 ? 1 : mod == 2 ? far : 0;
    return bytes <= room ? bytes : 0;
}

static int vector_of(uint8_t opcode, uint8_t next)
{
    switch (opcode) {
    case 0xcc:
        return 3;
    case 0xcd:
        return next;
    case 0xce:
        return 4;
    case 0xf1:
        return 1;
    default:
        return -1;
    }
}

struct instruction peek_instruction(struct vcpu *vcpu, uint64_t linear_pc)
{
    struct instruction found = {.kind = PEEK_UNUSUAL, .stores = true, .vector = -1};
    uint8_t *bytes = found.bytes;
    bool narrow = false, wide = false, repeat = false, address = false;
    size_t n = 0;

    if (!vcpu->translation.valid)
        return found;
    size_t got = peek_code(vcpu, linear_pc, bytes, sizeof(found.bytes));
    found.n_bytes = (uint8_t)got;
    uint32_t width = vcpu->translation.width;
    for (; n < got && is_prefix(bytes[n], width == KB_WIDTH_BITS64); n++) {
        narrow |= bytes[n] == 0x66;
        repeat |= bytes[n] == 0xf2 || bytes[n] == 0xf3;
        address |= bytes[n] == 0x67;
        wide = width == KB_WIDTH_BITS64 && (bytes[n] & 0xf8) == 0x48; /* REX.W, the last prefix */
    }
    if (n >= got)
        return found; /* into memory that cannot be read, or all prefixes */
    uint8_t opcode = bytes[n], next = n + 1 < got ? bytes[n + 1] : 0;
    if (n + 1 >= got && (opcode == 0x0f || opcode == 0xff || opcode == 0xcd))
        return found;
    found.kind = opcode == 0x0f ? two_byte(next) : one_byte(opcode, next);
    if (opcode == 0x90 && repeat) /* PAUSE: with QEMU before 9.1 the trap waits one instruction more */
        found.kind = PEEK_UNUSUAL;
    /* A ModRM byte that cannot be read counts as 0, which names memory. */
    found.stores = opcode == 0x0f ? (next & 0xf0) != 0x80 : stores(opcode, next);
    found.vector = vector_of(opcode, next);
    found.writes_port = opcode == 0xe6 || opcode == 0xee || opcode == 0x6e;
    if (opcode == 0xfb || opcode == 0x17) /* STI, POP SS */
        found.shadow_bytes = (uint8_t)(n + 1);
    size_t load = opcode == 0x8e && (next & 0x38) == 0x10 ? n + 1 : opcode == 0x0f && next == 0xb2 ? n + 2 : 0;
    if (load) { /* MOV SS and LSS */
        bool short_address = width == KB_WIDTH_BITS16 ? !address : width == KB_WIDTH_BITS32 && address;
        size_t operand = load < got ? modrm_bytes(bytes + load, got - load, short_address) : 0;
        found.shadow_bytes = operand ? (uint8_t)(load + operand) : 0;
    }
    if (opcode == 0xf1 && n > 0)
        found.vector = -1; /* with prefixes, which nobody writes: rip is moved by one byte (trap_flag.c) */
    found.repeats = repeat && ((opcode >= 0xa4 && opcode <= 0xa7) || (opcode >= 0xaa && opcode <= 0xaf) ||
                               (opcode >= 0x6c && opcode <= 0x6f));
    if (width == KB_WIDTH_BITS16)
        found.operand_bytes = narrow ? 4 : 2;
    else if (width == KB_WIDTH_BITS64 && (wide || (found.kind != PEEK_IRET && !narrow)))
        found.operand_bytes = 8; /* PUSHF and POPF need no REX.W */
    else
        found.operand_bytes = narrow ? 2 : 4;
    return found;
}
