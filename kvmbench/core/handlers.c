#define _GNU_SOURCE
#include "handlers.h"

#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define ANOTHER UINT32_MAX /* idt_read(): no number of bytes */
#define CR0_PE 1u
#define EFER_LMA (1u << 10)
#define MSR_LSTAR 0xc0000082u
#define MSR_CSTAR 0xc0000083u

void handlers_vcpu_begins(struct vcpu *vcpu)
{
    struct vm *vm = vcpu->object.vm;

    pthread_mutex_lock(&vm->lock);
    atomic_fetch_add(&vm->executing, 1);
    while (vm->trapper) {
        struct vcpu *other = vm->trapper;
        /* Out of KVM_RUN and in again: its loop then sees that it is not alone. */
        pthread_mutex_lock(&other->kick_lock);
        if (other->running)
            syscall(SYS_tgkill, getpid(), other->thread, KB_SIGNAL);
        pthread_mutex_unlock(&other->kick_lock);
        pthread_cond_wait(&vm->untrapped, &vm->lock);
    }
    pthread_mutex_unlock(&vm->lock);
}

void handlers_vcpu_ends(struct vcpu *vcpu)
{
    if (vcpu->handlers)
        handlers_unmark(vcpu);
    atomic_fetch_sub(&vcpu->object.vm->executing, 1);
}

static uint32_t gate_bytes(const struct translation *t)
{
    return t->efer & EFER_LMA ? 16 : t->cr0 & CR0_PE ? 8 : 4;
}

/* Goes through the IDT in memory, piece by piece; vm->lock held.  Copies it out, or compares it: whole, for a kernel that
 * moves to the upper half may change but the upper half of each gate.  How many bytes were there; ANOTHER if not alike. */
static uint32_t idt_read(struct vcpu *vcpu, uint8_t *idt, bool copy)
{
    const struct translation *t = &vcpu->translation;
    uint32_t gate = gate_bytes(t);
    uint32_t bytes = t->idt_bytes < gate * KB_VECTORS ? t->idt_bytes : gate * KB_VECTORS;
    uint32_t done = 0;

    while (done < bytes) {
        uint64_t linear = t->idt_base + done, gpa;
        uint32_t piece = 4096 - (linear & 4095);
        if (piece > bytes - done)
            piece = bytes - done;
        const uint8_t *now = translate(vcpu->object.vm, t, linear, &gpa)
                                 ? vm_memory(vcpu->object.vm, gpa, piece)
                                 : NULL;
        if (!now)
            return done;
        if (copy)
            memcpy(idt + done, now, piece);
        else if (memcmp(idt + done, now, piece) != 0)
            return ANOTHER;
        done += piece;
    }
    return done;
}

/* A descriptor in the GDT; all zero, which is none, where it cannot be read; vm->lock held. */
static struct code code_read(struct vcpu *vcpu, uint16_t selector)
{
    const struct translation *t = &vcpu->translation;
    struct code code = {.selector = selector};
    uint32_t at = selector & 0xfff8u;
    uint64_t gpa;

    const uint8_t *now = !(selector & 4) && at + 8 <= t->gdt_bytes &&
                                 translate(vcpu->object.vm, t, t->gdt_base + at, &gpa)
                             ? vm_memory(vcpu->object.vm, gpa, 8)
                             : NULL;
    if (now)
        memcpy(code.descriptor, now, 8);
    return code;
}

/* Whether the IDT and the descriptors that it names are what the list was made from; vm->lock held. */
static bool tables_same(struct vcpu *vcpu, struct handlers *h)
{
    if (idt_read(vcpu, h->idt, false) != h->idt_bytes)
        return false;
    for (uint32_t i = 0; i < h->codes; i++)
        if (memcmp(code_read(vcpu, h->code[i].selector).descriptor, h->code[i].descriptor, 8) != 0)
            return false;
    return true;
}

/* Whether a mark was written over, or its page is mapped by now that was not; vm->lock held. */
static bool marks_changed(struct vcpu *vcpu, const struct handlers *h)
{
    uint64_t page = 1, gpa; /* no page begins at 1 */

    for (uint32_t i = 0; i < h->marks; i++) {
        const struct mark *mark = &h->mark[i];
        if (mark->set && *mark->at != KB_MARK)
            return true;
        if (!mark->unmapped || (mark->linear & ~4095ull) == page)
            continue;
        page = mark->linear & ~4095ull;
        if (translate(vcpu->object.vm, &vcpu->translation, page, &gpa))
            return true;
    }
    return false;
}

bool handlers_changed(struct vcpu *vcpu)
{
    struct handlers *h = vcpu->handlers;

    if (vcpu->translation.idt_bytes < gate_bytes(&vcpu->translation))
        return false; /* no table at all, as a machine begins */
    pthread_mutex_lock(&vcpu->object.vm->lock);
    bool changed = !tables_same(vcpu, h) || marks_changed(vcpu, h);
    pthread_mutex_unlock(&vcpu->object.vm->lock);
    return changed;
}

static uint64_t le(const uint8_t *bytes, unsigned int count)
{
    uint64_t value = 0;
    memcpy(&value, bytes, count);
    return value;
}

/* The base of a code segment whose code runs at CPL 0 (where OUT leaves the guest); false if it is none, or its
 * descriptor cannot be read.  CS, too, is loaded anew on the way to a handler. */
static bool code_base(struct vcpu *vcpu, uint16_t selector, uint64_t *base)
{
    const struct translation *t = &vcpu->translation;
    struct code code = code_read(vcpu, selector);
    const uint8_t *descriptor = code.descriptor;

    if ((descriptor[5] & 0x7c) == 0x18) { /* DPL 0, code, not conforming */
        *base = le(descriptor + 2, 3) | (uint64_t)descriptor[7] << 24;
        return true;
    }
    *base = t->cs_base;
    return (selector & 0xfffc) == (t->cs & 0xfffc) && (t->cs & 3) == 0;
}

static void note_code(struct vcpu *vcpu, struct handlers *h, const uint8_t *gate)
{
    uint16_t selector = (uint16_t)le(gate + 2, 2);
    uint32_t i = 0;

    while (i < h->codes && h->code[i].selector != selector)
        i++;
    if (i == h->codes && gate[5] & 0x80)
        h->code[h->codes++] = code_read(vcpu, selector);
}

/* What real mode's vectors point to that is data, by the custom of PCs: video, diskette and disk parameters, fonts. */
static bool is_data_vector(uint32_t vector)
{
    return (vector >= 0x1d && vector <= 0x1f) || vector == 0x41 || vector == 0x43 || vector == 0x44 ||
           vector == 0x46;
}

/* Source: SDM volume 3, "Interrupt Descriptor Table (IDT)" and "64-Bit IDT Gate Descriptors"; in real mode
 * the table of far pointers. */
static bool gate_decode(struct vcpu *vcpu, const uint8_t *gate, uint64_t *linear, uint8_t *slot)
{
    const struct translation *t = &vcpu->translation;
    uint64_t base;

    if (!(t->cr0 & CR0_PE)) {
        *slot = 2;
        *linear = le(gate + 2, 2) * 16 + le(gate, 2);
        return *linear != 0; /* 0000:0000 is a vector that nobody has set */
    }
    uint8_t type = gate[5] & 0x1f;
    if (!code_base(vcpu, (uint16_t)le(gate + 2, 2), &base))
        return false;
    uint64_t offset = le(gate, 2) | le(gate + 6, 2) << 16;
    if (!(gate[5] & 0x80))
        return false;
    if (t->efer & EFER_LMA) {
        *slot = 8;
        *linear = offset | le(gate + 8, 4) << 32;
        return type == 0xe || type == 0xf;
    }
    bool narrow = type == 6 || type == 7;
    if (!narrow && type != 0xe && type != 0xf) /* a task gate, or none */
        return false;
    *slot = narrow ? 2 : 4;
    *linear = (base + (narrow ? offset & 0xffff : offset)) & 0xffffffffu;
    return true;
}

static int by_address(const void *left, const void *right)
{
    const struct handler *a = left, *b = right;

    if (a->linear != b->linear)
        return a->linear < b->linear ? -1 : 1;
    return a->vector - b->vector;
}

static void add_marks(struct handlers *h, uint64_t linear)
{
    struct mark *last = h->marks ? &h->mark[h->marks - 1] : NULL;

    if (last && last->linear == linear)
        last->second = false;
    else
        h->mark[h->marks++] = (struct mark){.linear = linear};
    h->mark[h->marks++] = (struct mark){.linear = linear + 1, .second = true};
}

/* Makes the list from the IDT; vm->lock held. */
static void list(struct vcpu *vcpu, struct handlers *h)
{
    struct handler found[KB_VECTORS];
    uint32_t gate = gate_bytes(&vcpu->translation), n = 0;

    h->from = vcpu->translation;
    h->known = true;
    h->idt_bytes = idt_read(vcpu, h->idt, true);
    h->count = h->marks = h->codes = 0;
    memset(h->entry, 0, sizeof(h->entry));
    for (uint32_t vector = 0; (vector + 1) * gate <= h->idt_bytes; vector++) {
        struct handler *one = &found[n];
        if (gate == 4 && is_data_vector(vector))
            continue;
        if (gate != 4)
            note_code(vcpu, h, h->idt + vector * gate);
        if (!gate_decode(vcpu, h->idt + vector * gate, &one->linear, &one->slot_bytes))
            continue;
        one->vector = (uint8_t)vector;
        one->shared = false;
        h->entry[vector] = one->linear;
        n++;
    }
    qsort(found, n, sizeof(found[0]), by_address);
    for (uint32_t i = 0; i < n; i++) {
        if (h->count && h->handler[h->count - 1].linear == found[i].linear) {
            h->handler[h->count - 1].shared = true;
            continue;
        }
        h->handler[h->count++] = found[i];
        add_marks(h, found[i].linear);
    }
}

static bool same_tables(const struct translation *a, const struct translation *b)
{
    return a->idt_base == b->idt_base && a->idt_bytes == b->idt_bytes && gate_bytes(a) == gate_bytes(b) &&
           a->gdt_base == b->gdt_base && a->gdt_bytes == b->gdt_bytes && a->cs == b->cs && a->cs_base == b->cs_base;
}

/* Ports that KVM's own interrupt controllers and timer answer, and any that it may have been told to. */
static bool is_kernel_port(const struct vm *vm, uint8_t port)
{
    if (atomic_load(&vm->takes_ports))
        return true;
    return atomic_load(&vm->irqchip) && ((port & 0x7e) == 0x20 || (port & 0xfc) == 0x40 || port == 0x61);
}

static void set_mark(struct vm *vm, struct mark *mark)
{
    uint8_t *byte = vm_memory(vm, mark->gpa, 1);

    if (!byte || mark->set || (mark->second && !is_kernel_port(vm, *byte)))
        return;
    mark->byte = *byte;
    *byte = KB_MARK;
    mark->at = byte;
    mark->set = true;
}

static void clear_mark(struct vm *vm, struct mark *mark)
{
    if (!mark->set)
        return;
    uint8_t *byte = vm_memory(vm, mark->gpa, 1);
    /* Another byte was written by the guest: it stays. */
    if (byte && *byte == KB_MARK)
        *byte = mark->byte;
    mark->set = false;
}

/* Finds out where those marks from `first` on are in memory that are not set, and sets them; vm->lock held. */
static void set_marks(struct vcpu *vcpu, struct handlers *h, uint32_t first)
{
    struct vm *vm = vcpu->object.vm;
    uint64_t page = 1, frame = 0; /* no page begins at 1 */

    for (uint32_t i = first; i < h->marks; i++) {
        struct mark *mark = &h->mark[i];
        if (mark->set)
            continue;
        if ((mark->linear & ~4095ull) != page) {
            page = mark->linear & ~4095ull;
            if (!translate(vm, &vcpu->translation, page, &frame))
                frame = UINT64_MAX;
        }
        mark->unmapped = frame == UINT64_MAX;
        if (mark->unmapped)
            continue;
        mark->gpa = frame | (mark->linear & 4095);
        set_mark(vm, mark);
    }
}

/* vm->lock held. */
static void clear_marks(struct vcpu *vcpu)
{
    struct handlers *h = vcpu->handlers;
    struct vm *vm = vcpu->object.vm;

    if (!h->here)
        return;
    /* Backwards: should two linear addresses be one byte, the first to be set knows what was there. */
    for (uint32_t i = h->marks; i-- > 0;)
        clear_mark(vm, &h->mark[i]);
    if (h->target) {
        h->target = 0;
        h->marks -= 2;
    }
    h->here = false;
    if (vm->trapper == vcpu) {
        vm->trapper = NULL;
        pthread_cond_broadcast(&vm->untrapped);
    }
}

void handlers_mark(struct vcpu *vcpu)
{
    struct vm *vm = vcpu->object.vm;

    if (!vcpu->handlers)
        vcpu->handlers = calloc(1, sizeof(*vcpu->handlers));
    struct handlers *h = vcpu->handlers;
    if (!h || !vcpu->translation.valid)
        return;
    pthread_mutex_lock(&vm->lock);
    clear_marks(vcpu);
    if (atomic_load(&vm->executing) == 1) {
        bool same = h->known && same_tables(&h->from, &vcpu->translation) &&
                    tables_same(vcpu, h);
        if (!same)
            list(vcpu, h);
        h->here = true;
        set_marks(vcpu, h, 0);
        vm->trapper = vcpu;
    }
    pthread_mutex_unlock(&vm->lock);
}

void handlers_forget(struct vm *vm, uint64_t gpa, uint64_t bytes)
{
    struct handlers *h = vm->trapper ? vm->trapper->handlers : NULL;

    for (uint32_t i = h ? h->marks : 0; i-- > 0;)
        if (h->mark[i].gpa - gpa < bytes)
            clear_mark(vm, &h->mark[i]);
}

void handlers_cover(const struct vm *vm, uint64_t gpa, uint8_t *copy, size_t bytes)
{
    const struct handlers *h = vm->trapper ? vm->trapper->handlers : NULL;

    for (uint32_t i = 0; h && i < h->marks; i++)
        if (h->mark[i].set && h->mark[i].gpa - gpa < bytes && copy[h->mark[i].gpa - gpa] == KB_MARK)
            copy[h->mark[i].gpa - gpa] = h->mark[i].byte;
}

void handlers_written(struct vm *vm, uint64_t gpa, size_t bytes)
{
    struct handlers *h = vm->trapper ? vm->trapper->handlers : NULL;

    for (uint32_t i = 0; h && i < h->marks; i++) {
        struct mark *mark = &h->mark[i];
        uint8_t *byte = mark->set && mark->gpa - gpa < bytes ? vm_memory(vm, mark->gpa, 1) : NULL;
        mark->set = mark->set && !byte;
        if (byte)
            set_mark(vm, mark);
    }
}

void handlers_unmark(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->object.vm->lock);
    clear_marks(vcpu);
    pthread_mutex_unlock(&vcpu->object.vm->lock);
}

bool handlers_is_set(const struct vcpu *vcpu, uint64_t linear)
{
    const struct handlers *h = vcpu->handlers;

    for (uint32_t i = 0; i < h->marks; i++)
        if (h->mark[i].linear == linear && !h->mark[i].second)
            return h->mark[i].set;
    return false;
}

bool handlers_step_aside(struct vcpu *vcpu, uint64_t linear_pc)
{
    struct handlers *h = vcpu->handlers;
    struct vm *vm = vcpu->object.vm;
    uint64_t first, next;
    bool some = false;

    pthread_mutex_lock(&vm->lock);
    bool known = translate(vm, &vcpu->translation, linear_pc, &first);
    bool more = translate(vm, &vcpu->translation, linear_pc + 1, &next);
    /* By the byte, for it may be marked, and run, by several linear addresses; backwards: see clear_marks(). */
    for (uint32_t i = h->marks; known && i-- > 0;) {
        struct mark *mark = &h->mark[i];
        if (mark->set && (mark->gpa == first || (mark->second && more && mark->gpa == next))) {
            clear_mark(vm, mark);
            some = true;
        }
    }
    pthread_mutex_unlock(&vm->lock);
    return some;
}

void handlers_step_back(struct vcpu *vcpu)
{
    struct handlers *h = vcpu->handlers;

    pthread_mutex_lock(&vcpu->object.vm->lock);
    if (h->here)
        set_marks(vcpu, h, 0);
    pthread_mutex_unlock(&vcpu->object.vm->lock);
}

uint64_t handlers_syscall_entry(struct vcpu *vcpu)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[1];
    } msrs = {.head.nmsrs = 1};

    msrs.entry[0].index = vcpu->translation.width == KB_WIDTH_BITS64 ? MSR_LSTAR : MSR_CSTAR;
    if (ioctl_again(vcpu->object.fd, KVM_GET_MSRS, (unsigned long)&msrs) != 1)
        return 0;
    return msrs.entry[0].data;
}

uint64_t handlers_far(struct vcpu *vcpu, uint16_t selector, uint64_t offset)
{
    const struct translation *t = &vcpu->translation;
    uint64_t base = 0;

    if (!(t->cr0 & CR0_PE))
        return selector * 16ull + (offset & 0xffff);
    if (t->efer & EFER_LMA)
        return offset;
    pthread_mutex_lock(&vcpu->object.vm->lock);
    bool known = code_base(vcpu, selector, &base);
    pthread_mutex_unlock(&vcpu->object.vm->lock);
    return known ? (base + offset) & 0xffffffffu : 0;
}

void handlers_mark_target(struct vcpu *vcpu, uint64_t linear)
{
    struct handlers *h = vcpu->handlers;

    if (!linear || h->target || !h->here || handlers_at(vcpu, linear))
        return;
    pthread_mutex_lock(&vcpu->object.vm->lock);
    h->mark[h->marks++] = (struct mark){.linear = linear};
    h->mark[h->marks++] = (struct mark){.linear = linear + 1, .second = true};
    h->target = linear;
    set_marks(vcpu, h, h->marks - 2);
    pthread_mutex_unlock(&vcpu->object.vm->lock);
}

const struct handler *handlers_at(const struct vcpu *vcpu, uint64_t linear)
{
    const struct handlers *h = vcpu->handlers;
    uint32_t low = 0, high = h->count;

    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (h->handler[middle].linear < linear)
            low = middle + 1;
        else
            high = middle;
    }
    return low < h->count && h->handler[low].linear == linear ? &h->handler[low] : NULL;
}
