#define _GNU_SOURCE
#include "trap_flag.h"

#include "handlers.h"
#include "job.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#define FLAGS_VM (UINT64_C(1) << 17)
#define FLAGS_FIXED 2u /* bit 1 of every image of RFLAGS */
#define DR6_FIXED 0xffff0ff0u
#define DR6_BREAKPOINTS 0xfu
#define DR6_BD (1u << 13)
#define DR6_BS (1u << 14)
#define DR6_BT (1u << 15)
#define DR7_GD (1u << 13)
#define DB_VECTOR 1

/* Reads or writes a slot of the guest's stack; false if it cannot be reached. */
static bool slot(struct vcpu *vcpu, uint64_t sp, unsigned int bytes, uint64_t *value, bool write)
{
    const struct translation *t = &vcpu->translation;
    struct vm *vm = vcpu->object.vm;
    uint64_t mask = t->width == KB_WIDTH_BITS64 ? UINT64_MAX : t->wide_stack ? 0xffffffffu : 0xffffu;
    uint8_t data[8];
    bool whole = true;

    memcpy(data, value, sizeof(data));
    pthread_mutex_lock(&vm->lock);
    for (unsigned int n = 0; n < bytes && whole; n++) {
        uint64_t gpa, linear = t->ss_base + ((sp + n) & mask);
        if (t->width != KB_WIDTH_BITS64)
            linear &= 0xffffffffu;
        uint8_t *byte = translate(vm, t, linear, &gpa) ? vm_memory(vm, gpa, 1) : NULL;
        whole = byte != NULL;
        if (!whole)
            break;
        if (write)
            *byte = data[n];
        else
            data[n] = *byte;
    }
    pthread_mutex_unlock(&vm->lock);
    if (whole && !write) {
        *value = 0;
        memcpy(value, data, bytes);
    }
    return whole;
}

bool trap_flag_loaded(struct vcpu *vcpu, const struct instruction *instruction)
{
    uint64_t flags = 0;
    unsigned int bytes = instruction->operand_bytes;

    switch (instruction->kind) {
    case PEEK_POPF:
        return slot(vcpu, vcpu->regs.rsp, bytes, &flags, false) ? flags & FLAGS_TF : false;
    case PEEK_IRET: /* rip, cs, rflags */
        return slot(vcpu, vcpu->regs.rsp + 2 * bytes, bytes, &flags, false) ? flags & FLAGS_TF : false;
    case PEEK_SYSRET:
        return vcpu->regs.r11 & FLAGS_TF;
    default:
        return vcpu->guest_tf;
    }
}

uint64_t trap_flag_return(struct vcpu *vcpu, const struct instruction *iret)
{
    unsigned int bytes = iret->operand_bytes;
    uint64_t rip = 0, cs = 0, flags = 0, sp = vcpu->regs.rsp;
    bool real = !(vcpu->translation.cr0 & 1);

    if (!slot(vcpu, sp, bytes, &rip, false) || !slot(vcpu, sp + bytes, bytes, &cs, false) ||
        !slot(vcpu, sp + 2 * bytes, bytes, &flags, false))
        return 0;
    if (!real && (cs & 3 || flags & FLAGS_VM))
        return 0;
    return handlers_far(vcpu, (uint16_t)cs, rip);
}

static bool mend(struct vcpu *vcpu, uint64_t sp, unsigned int bytes, uint64_t flags)
{
    if (vcpu->guest_tf || !(flags & FLAGS_TF))
        return true;
    flags &= ~FLAGS_TF;
    return slot(vcpu, sp, bytes, &flags, true);
}

bool trap_flag_mend_push(struct vcpu *vcpu, unsigned int bytes)
{
    uint64_t flags = 0;

    return slot(vcpu, vcpu->regs.rsp, bytes, &flags, false) && mend(vcpu, vcpu->regs.rsp, bytes, flags);
}

/* Exceptions that push an error code (SDM volume 3, "Exception and Interrupt Vectors"; #VC is AMD's). */
static bool has_error_code(int vector)
{
    return vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 ||
           vector == 30;
}

struct frame trap_flag_mend_frame(struct vcpu *vcpu, unsigned int slot_bytes, int vector, bool soft, uint16_t cs)
{
    struct frame frame = {0};
    bool real = !(vcpu->translation.cr0 & 1);
    bool error = !real && !soft && has_error_code(vector);

    /* Several vectors may lead to one handler, so the frame itself decides. */
    for (int attempt = 0; attempt < (real ? 1 : 2) && !frame.found; attempt++, error = !error) {
        uint64_t sp = vcpu->regs.rsp + (error ? slot_bytes : 0), at[3] = {0};
        bool read = true;
        for (int n = 0; n < 3; n++)
            read = read && slot(vcpu, sp + (unsigned int)n * slot_bytes, slot_bytes, &at[n], false);
        if (!read || (at[1] & 0xffff) != cs || !(at[2] & FLAGS_FIXED))
            continue;
        frame.rip = at[0];
        frame.found = mend(vcpu, sp + 2 * slot_bytes, slot_bytes, at[2]);
    }
    return frame;
}

int trap_flag_inject(struct vcpu *vcpu, uint64_t dr6)
{
    struct kvm_debugregs debug;
    struct kvm_vcpu_events events;
    int fd = vcpu->object.fd;

    if (ioctl_again(fd, KVM_GET_DEBUGREGS, (unsigned long)&debug) < 0 ||
        ioctl_again(fd, KVM_GET_VCPU_EVENTS, (unsigned long)&events) < 0)
        return -errno;
    debug.dr6 = (debug.dr6 & ~(uint64_t)DR6_BREAKPOINTS) | DR6_FIXED | dr6; /* the others stay until they are cleared */
    debug.dr7 &= ~(uint64_t)DR7_GD;
    events.exception.injected = 1;
    events.exception.nr = DB_VECTOR;
    events.exception.has_error_code = 0;
    events.exception.error_code = 0;
    if (ioctl_again(fd, KVM_SET_DEBUGREGS, (unsigned long)&debug) < 0 ||
        ioctl_again(fd, KVM_SET_VCPU_EVENTS, (unsigned long)&events) < 0)
        return -errno;
    vcpu->rearm = true;
    return 0;
}

uint64_t trap_flag_guest_breakpoints(struct vcpu *vcpu, uint64_t dr6)
{
    struct kvm_debugregs debug;
    uint64_t met = 0;

    if (!(dr6 & DR6_BREAKPOINTS) || ioctl_again(vcpu->object.fd, KVM_GET_DEBUGREGS, (unsigned long)&debug) < 0)
        return 0;
    for (int n = 0; n < 4; n++)
        if (dr6 >> n & 1 && debug.dr7 >> 2 * n & 3)
            met |= 1u << n;
    return met;
}

int trap_flag_int1(struct vcpu *vcpu)
{
    int status = vcpu_fetch_regs(vcpu);

    if (status != 0)
        return status;
    vcpu->regs.rip++;
    if (ioctl_again(vcpu->object.fd, KVM_SET_REGS, (unsigned long)&vcpu->regs) < 0)
        return -errno;
    vcpu->translation.valid = false;
    return trap_flag_inject(vcpu, 0);
}

int trap_flag_hand_on(struct vcpu *vcpu, const uint64_t *dr7)
{
    const struct kvm_debug_exit_arch *debug = &vcpu->run->debug.arch;
    struct kvm_sregs sregs;

    if (debug->exception != DB_VECTOR)
        return 0;
    for (int n = 0; n < 4; n++)
        if (debug->dr6 >> n & 1 && *dr7 >> 2 * n & 3)
            return 0;
    int status = vcpu_fetch_sregs(vcpu, &sregs);
    if (status == 0)
        status = vcpu_fetch_regs(vcpu);
    if (status != 0)
        return status;
    uint64_t bits = debug->dr6 & (DR6_BREAKPOINTS | DR6_BD | DR6_BS | DR6_BT);
    uint64_t at = vcpu_linear(vcpu, vcpu->regs.rip);
    bool int1 = !bits && debug->pc == at && peek_instruction(vcpu, at).vector == DB_VECTOR;
    status = int1 ? trap_flag_int1(vcpu) : trap_flag_inject(vcpu, bits);
    return status == 0 ? 1 : status;
}
