/*
 * Guest memory: anonymous memory of this process, placed at a guest physical
 * address.  A region is one KVM memory slot until some of its pages are
 * protected; then it is a slot for each run of pages with the same protection
 * (no slot at all where reads too must leave the guest).
 */
#define _GNU_SOURCE
#include "handlers.h"
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PAGE_BYTES 4096u
#define PAGE_MASK (PAGE_BYTES - 1)
/* Larger than any guest that fits a machine; keeps sums below 2**64. */
#define MAX_GPA (1ull << 52)

static void mapping_put(struct mapping *mapping)
{
    if (mapping && atomic_fetch_sub(&mapping->users, 1) == 1) {
        munmap(mapping->address, mapping->size_bytes);
        free(mapping);
    }
}

void core_unmap(void *token)
{
    mapping_put(token);
}

static struct mapping *mapping_new(size_t size_bytes)
{
    struct mapping *mapping = calloc(1, sizeof(*mapping));
    if (!mapping)
        return NULL;
    /* NORESERVE: a large guest costs what it touches. */
    mapping->address = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping->address == MAP_FAILED) {
        free(mapping);
        return NULL;
    }
    mapping->size_bytes = size_bytes;
    atomic_store(&mapping->users, 1);
    return mapping;
}

static int slot_take(struct vm *vm)
{
    for (int id = 0; id < KB_MAX_SLOTS; id++)
        if (!vm->slots[id]) {
            vm->slots[id] = 1;
            return id;
        }
    return -1;
}

static int slot_set(struct region *region, const struct slot *slot, uint64_t size_bytes)
{
    struct kvm_userspace_memory_region memory = {
        .slot = slot->id,
        .flags = slot->flags,
        .guest_phys_addr = region->gpa + slot->offset,
        .memory_size = size_bytes,
        .userspace_addr = (uintptr_t)region->mapping->address + slot->offset,
    };
    int vm = region->object.vm->object.fd;
    return ioctl_again(vm, KVM_SET_USER_MEMORY_REGION, (unsigned long)&memory) < 0 ? -errno : 0;
}

static void slots_remove(struct region *region)
{
    for (size_t n = 0; n < region->n_slots; n++) {
        if (slot_set(region, &region->slots[n], 0) == 0)
            region->object.vm->slots[region->slots[n].id] = 0;
        else /* the guest still has it (KVM out of memory): so its bytes must stay, and its number */
            atomic_fetch_add(&region->mapping->users, 1);
    }
    free(region->slots);
    region->slots = NULL;
    region->n_slots = 0;
}

/* Makes the slots that gpa, flags and protection call for.  vm->lock is held. */
static int slots_make(struct region *region)
{
    uint64_t pages = region->size_bytes / PAGE_BYTES;
    size_t runs = 1;

    if (region->protection)
        for (uint64_t page = 1; page < pages; page++)
            runs += region->protection[page] != region->protection[page - 1];
    if (runs > KB_MAX_SLOTS)
        return KB_NO_MEMORY;
    region->slots = calloc(runs, sizeof(*region->slots));
    if (!region->slots)
        return KB_NO_MEMORY;
    for (uint64_t page = 0; page < pages;) {
        uint8_t protection = region->protection ? region->protection[page] : KB_PROTECT_NONE;
        uint64_t end = pages;
        if (region->protection)
            for (end = page + 1; end < pages && region->protection[end] == protection;)
                end++;
        if (protection != KB_PROTECT_ALL) {
            int id = slot_take(region->object.vm);
            if (id < 0)
                return KB_NO_MEMORY;
            struct slot slot = {
                .id = (uint32_t)id,
                .offset = page * PAGE_BYTES,
                .size_bytes = (end - page) * PAGE_BYTES,
                .flags = region->flags | (protection == KB_PROTECT_WRITE ? KVM_MEM_READONLY : 0),
            };
            int status = slot_set(region, &slot, slot.size_bytes);
            if (status != 0) {
                region->object.vm->slots[id] = 0;
                return status;
            }
            region->slots[region->n_slots++] = slot;
        }
        page = end;
    }
    return 0;
}

static bool overlaps_another(struct vm *vm, const struct region *self, uint64_t gpa, uint64_t size)
{
    for (struct region *other = vm->regions; other; other = other->next)
        if (other != self && gpa < other->gpa + other->size_bytes && other->gpa < gpa + size)
            return true;
    return false;
}

static int place_check(uint64_t gpa, uint64_t size_bytes, uint32_t flags)
{
    if ((gpa | size_bytes) & PAGE_MASK)
        return KB_BAD_ALIGNMENT;
    if (size_bytes == 0 || size_bytes > MAX_GPA || gpa > MAX_GPA - size_bytes)
        return KB_BAD_RANGE;
    if (flags & ~(uint32_t)(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY))
        return KB_BAD_VALUE;
    return 0;
}

int region_add(struct exchange *x)
{
    const struct kb_add_region *request = (const struct kb_add_region *)x->request;
    struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    int status = place_check(request->gpa, request->size_bytes, request->flags);
    if (status != 0)
        return status;
    struct vm *vm = (struct vm *)object_get(x->core, request->vm, SORT_VM);
    if (!vm)
        return KB_BAD_HANDLE;
    struct region *region = calloc(1, sizeof(*region));
    if (!region || !(region->mapping = mapping_new(request->size_bytes))) {
        free(region);
        object_put(&vm->object);
        return KB_NO_MEMORY;
    }
    region->object.sort = SORT_REGION;
    region->object.core = x->core;
    region->object.fd = -1;
    region->object.vm = vm; /* takes over the hold of object_get */
    atomic_store(&region->object.users, 1);
    region->gpa = request->gpa;
    region->size_bytes = request->size_bytes;
    region->flags = request->flags;

    pthread_mutex_lock(&vm->lock);
    status = overlaps_another(vm, region, region->gpa, region->size_bytes) ? KB_OVERLAP
                                                                           : slots_make(region);
    if (status == 0)
        status = object_publish(x->core, &region->object);
    if (status == 0) {
        region->linked = true;
        region->next = vm->regions;
        vm->regions = region;
    } else {
        slots_remove(region);
    }
    pthread_mutex_unlock(&vm->lock);
    if (status != 0) {
        object_put(&region->object);
        return status;
    }
    reply->handle = region->object.handle;
    reply->reserved = 0;
    reply->size_bytes = region->size_bytes;
    x->reply_bytes = sizeof(*reply);
    return 0;
}

/* The guest loses the region at once; its bytes stay until the last look ends. */
void region_close(struct region *region)
{
    struct vm *vm = region->object.vm;

    pthread_mutex_lock(&vm->lock);
    if (region->linked) {
        handlers_forget(vm, region->gpa, region->size_bytes);
        for (struct region **link = &vm->regions; *link; link = &(*link)->next)
            if (*link == region) {
                *link = region->next;
                break;
            }
        region->linked = false;
    }
    slots_remove(region);
    pthread_mutex_unlock(&vm->lock);
}

void region_free(struct region *region)
{
    mapping_put(region->mapping);
    free(region->protection);
    free(region);
}

/* Puts the slots right after a change, or brings back what was there before. */
static int slots_renew(struct region *region, uint64_t old_gpa, uint32_t old_flags)
{
    int status = slots_make(region);
    if (status != 0) {
        slots_remove(region);
        region->gpa = old_gpa;
        region->flags = old_flags;
    }
    return status;
}

int region_set(struct exchange *x)
{
    const struct kb_set_region *request = (const struct kb_set_region *)x->request;
    struct region *region = (struct region *)object_get(x->core, request->handle, SORT_REGION);
    if (!region)
        return KB_BAD_HANDLE;
    struct vm *vm = region->object.vm;
    int status = place_check(request->gpa, region->size_bytes, request->flags);
    if (status == 0) {
        pthread_mutex_lock(&vm->lock);
        if (!region->linked) {
            status = KB_BAD_HANDLE;
        } else if (overlaps_another(vm, region, request->gpa, region->size_bytes)) {
            status = KB_OVERLAP;
        } else {
            uint64_t old_gpa = region->gpa;
            uint32_t old_flags = region->flags;
            if (request->gpa != old_gpa)
                handlers_forget(vm, old_gpa, region->size_bytes);
            slots_remove(region);
            region->gpa = request->gpa;
            region->flags = request->flags;
            status = slots_renew(region, old_gpa, old_flags);
            if (status != 0)
                slots_make(region);
        }
        pthread_mutex_unlock(&vm->lock);
    }
    object_put(&region->object);
    return status;
}

int region_protect(struct exchange *x)
{
    const struct kb_protect *request = (const struct kb_protect *)x->request;

    if (request->protection > KB_PROTECT_ALL)
        return KB_BAD_VALUE;
    if ((request->offset | request->length_bytes) & PAGE_MASK)
        return KB_BAD_ALIGNMENT;
    struct region *region = (struct region *)object_get(x->core, request->handle, SORT_REGION);
    if (!region)
        return KB_BAD_HANDLE;
    int status = 0;
    struct vm *vm = region->object.vm;
    pthread_mutex_lock(&vm->lock);
    uint64_t pages = region->size_bytes / PAGE_BYTES;
    uint8_t *changed = NULL;
    if (request->offset > region->size_bytes ||
        request->length_bytes > region->size_bytes - request->offset)
        status = KB_BAD_RANGE;
    else if (!region->linked)
        status = KB_BAD_HANDLE;
    else if (!(changed = calloc(pages, 1)))
        status = KB_NO_MEMORY;
    if (status == 0) {
        uint8_t *old = region->protection;
        if (old)
            memcpy(changed, old, pages);
        memset(changed + request->offset / PAGE_BYTES, (int)request->protection,
               request->length_bytes / PAGE_BYTES);
        slots_remove(region);
        region->protection = changed;
        status = slots_renew(region, region->gpa, region->flags);
        if (status == 0) {
            free(old);
        } else {
            region->protection = old;
            free(changed);
            slots_make(region);
        }
    }
    pthread_mutex_unlock(&vm->lock);
    object_put(&region->object);
    return status;
}

/* The region that a kb_range names, held, with the range checked. */
static int region_range(struct exchange *x, const struct kb_range *request, struct region **out)
{
    struct region *region = (struct region *)object_get(x->core, request->handle, SORT_REGION);
    if (!region)
        return KB_BAD_HANDLE;
    if (request->offset > region->size_bytes ||
        request->length_bytes > region->size_bytes - request->offset) {
        object_put(&region->object);
        return KB_BAD_RANGE;
    }
    *out = region;
    return 0;
}

int region_read(struct exchange *x)
{
    const struct kb_range *request = (const struct kb_range *)x->request;
    struct region *region;
    int status = region_range(x, request, &region);
    if (status != 0)
        return status;
    if (request->length_bytes > x->capacity - sizeof(struct kb_header)) {
        status = KB_TOO_LARGE;
    } else {
        uint8_t *copy = x->reply + sizeof(struct kb_header);
        struct vm *vm = region->object.vm;
        pthread_mutex_lock(&vm->lock);
        memcpy(copy, region->mapping->address + request->offset, request->length_bytes);
        handlers_cover(vm, region->gpa + request->offset, copy, request->length_bytes);
        pthread_mutex_unlock(&vm->lock);
        x->reply_bytes = sizeof(struct kb_header) + request->length_bytes;
    }
    object_put(&region->object);
    return status;
}

int region_write(struct exchange *x)
{
    const struct kb_range *request = (const struct kb_range *)x->request;
    struct region *region;

    if (request->length_bytes != x->request_bytes - sizeof(*request))
        return KB_BAD_LENGTH;
    int status = region_range(x, request, &region);
    if (status != 0)
        return status;
    struct vm *vm = region->object.vm;
    /* Or a vcpu that steps might put back what was there before, with its marks (handlers.h). */
    pthread_mutex_lock(&vm->lock);
    memcpy(region->mapping->address + request->offset, x->request + sizeof(*request),
           request->length_bytes);
    if (region->linked)
        handlers_written(vm, region->gpa + request->offset, request->length_bytes);
    pthread_mutex_unlock(&vm->lock);
    object_put(&region->object);
    return 0;
}

int region_fill(struct exchange *x)
{
    const struct kb_fill *request = (const struct kb_fill *)x->request;
    struct kb_range range = {.handle = request->handle,
                             .offset = request->offset,
                             .length_bytes = request->length_bytes};
    struct region *region;

    if (request->byte > 255)
        return KB_BAD_VALUE;
    int status = region_range(x, &range, &region);
    if (status != 0)
        return status;
    struct vm *vm = region->object.vm;
    pthread_mutex_lock(&vm->lock);
    memset(region->mapping->address + range.offset, (int)request->byte, range.length_bytes);
    if (region->linked)
        handlers_written(vm, region->gpa + range.offset, range.length_bytes);
    pthread_mutex_unlock(&vm->lock);
    object_put(&region->object);
    return 0;
}

int region_dirty_log(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;
    struct region *region = (struct region *)object_get(x->core, request->handle, SORT_REGION);
    if (!region)
        return KB_BAD_HANDLE;
    struct vm *vm = region->object.vm;
    size_t pages = region->size_bytes / PAGE_BYTES;
    size_t bytes = (pages + 7) / 8;
    uint8_t *bitmap = x->reply + sizeof(struct kb_header);
    int status = 0;

    pthread_mutex_lock(&vm->lock);
    if (bytes > x->capacity - sizeof(struct kb_header))
        status = KB_TOO_LARGE;
    else
        memset(bitmap, 0, bytes);
    for (size_t n = 0; n < region->n_slots && status == 0; n++) {
        const struct slot *slot = &region->slots[n];
        size_t slot_pages = slot->size_bytes / PAGE_BYTES;
        /* KVM writes whole words. */
        uint64_t *dirty = calloc((slot_pages + 63) / 64, sizeof(*dirty));
        if (!dirty) {
            status = KB_NO_MEMORY;
            break;
        }
        struct kvm_dirty_log log = {.slot = slot->id, .dirty_bitmap = dirty};
        if (ioctl_again(vm->object.fd, KVM_GET_DIRTY_LOG, (unsigned long)&log) < 0)
            status = -errno;
        size_t first = slot->offset / PAGE_BYTES;
        for (size_t page = 0; page < slot_pages && status == 0; page++)
            if (dirty[page / 64] >> page % 64 & 1)
                bitmap[(first + page) / 8] |= (uint8_t)(1u << (first + page) % 8);
        free(dirty);
    }
    pthread_mutex_unlock(&vm->lock);
    if (status == 0)
        x->reply_bytes = sizeof(struct kb_header) + bytes;
    object_put(&region->object);
    return status;
}

uint8_t *vm_memory(struct vm *vm, uint64_t gpa, size_t bytes)
{
    for (struct region *region = vm->regions; region; region = region->next)
        if (gpa >= region->gpa && gpa - region->gpa < region->size_bytes &&
            bytes <= region->size_bytes - (gpa - region->gpa))
            return region->mapping->address + (gpa - region->gpa);
    return NULL;
}
