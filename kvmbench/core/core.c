/*
 * The handles: the table of what they name, who holds it and how it is closed; the core itself, /dev/kvm's
 * descriptor, and what the program around the core asks of all vcpus or of one region.  dispatch.c serves requests.
 */
#define _GNU_SOURCE
#include "internal.h"
#include "kernel.h"
#include "trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define HANDLE_INDEX(handle) ((handle) & 0xffffu)

struct object *object_get(struct core *core, uint32_t handle, enum sort sort)
{
    struct object *found = NULL;

    pthread_mutex_lock(&core->lock);
    uint32_t index = HANDLE_INDEX(handle);
    if (index < KB_MAX_OBJECTS && core->table[index] && core->table[index]->handle == handle &&
        (sort == 0 || core->table[index]->sort == sort)) {
        found = core->table[index];
        atomic_fetch_add(&found->users, 1);
    }
    pthread_mutex_unlock(&core->lock);
    return found;
}

void object_put(struct object *object)
{
    if (!object || atomic_fetch_sub(&object->users, 1) != 1)
        return;
    struct vm *parent = object->vm;
    switch (object->sort) {
    case SORT_VM:
        vm_free((struct vm *)object);
        break;
    case SORT_VCPU:
        vcpu_free((struct vcpu *)object);
        break;
    case SORT_REGION:
        region_free((struct region *)object);
        break;
    case SORT_DEVICE:
    case SORT_STATS:
    case SORT_EVENTFD:
        close(object->fd);
        free(object);
        break;
    case SORT_TRACE:
        trace_free((struct trace *)object);
        break;
    case SORT_KERNEL:
        kernel_free(object);
        break;
    case SORT_SYSTEM:
        break;
    }
    if (parent)
        object_put(&parent->object);
}

int object_publish(struct core *core, struct object *object)
{
    int status = KB_NO_MEMORY;

    pthread_mutex_lock(&core->lock);
    for (uint32_t n = 0; n < KB_MAX_OBJECTS; n++) {
        /* Round robin, so that a stale handle meets a reused place late. */
        uint32_t index = (core->next + n) % KB_MAX_OBJECTS;
        if (index < 2 || core->table[index])
            continue;
        core->generation[index]++;
        object->handle = index | (uint32_t)core->generation[index] << 16;
        core->table[index] = object;
        core->next = index + 1;
        status = 0;
        break;
    }
    pthread_mutex_unlock(&core->lock);
    return status;
}

int system_fd(struct core *core)
{
    pthread_mutex_lock(&core->lock);
    int fd = core->system.fd;
    if (fd < 0) {
        fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
        /* A file of that name that is not KVM's answers every ioctl with ENOTTY. */
        if (fd < 0 || ioctl(fd, KVM_GET_API_VERSION, 0) < 0) {
            int error = -errno;
            if (fd >= 0)
                close(fd);
            fd = error;
        } else {
            core->system.fd = fd;
        }
    }
    pthread_mutex_unlock(&core->lock);
    return fd;
}

#define EINTR_TRIES 100

int ioctl_again(int fd, unsigned long request, unsigned long argument)
{
    int result = -1;

    /* Not for ever: an ioctl that returns a number can return what looks like EINTR each time, such as
     * KVM_GET_TSC_KHZ once a guest's rate was set to 0xfffffffc. */
    for (int tries = 0; tries < EINTR_TRIES && result < 0; tries++) {
        result = ioctl(fd, request, argument);
        if (result < 0 && errno != EINTR)
            break;
    }
    return result;
}

/* Takes the handle out of the table; true if this call was the one that did. */
static bool object_retire(struct core *core, struct object *object)
{
    bool retired = false;

    pthread_mutex_lock(&core->lock);
    uint32_t index = HANDLE_INDEX(object->handle);
    if (core->table[index] == object) {
        core->table[index] = NULL;
        retired = true;
    }
    pthread_mutex_unlock(&core->lock);
    return retired;
}

void object_close(struct core *core, struct object *object)
{
    if (!object_retire(core, object))
        return;
    if (object->sort == SORT_VM) {
        /* A VM takes its children with it. */
        for (uint32_t index = 2; index < KB_MAX_OBJECTS; index++) {
            pthread_mutex_lock(&core->lock);
            struct object *child = core->table[index];
            if (child && child->vm == (struct vm *)object)
                atomic_fetch_add(&child->users, 1);
            else
                child = NULL;
            pthread_mutex_unlock(&core->lock);
            if (child) {
                object_close(core, child);
                object_put(child);
            }
        }
    } else if (object->sort == SORT_VCPU) {
        vcpu_close((struct vcpu *)object);
    } else if (object->sort == SORT_REGION) {
        region_close((struct region *)object);
    } else if (object->sort == SORT_TRACE) {
        trace_close((struct trace *)object);
    }
    object_put(object);
}

int core_create(struct core **out)
{
    struct core *core = calloc(1, sizeof(*core));
    if (!core)
        return -ENOMEM;
    pthread_mutex_init(&core->lock, NULL);
    core->system.sort = SORT_SYSTEM;
    core->system.handle = KB_SYSTEM_HANDLE;
    core->system.fd = -1;
    core->system.core = core;
    atomic_store(&core->system.users, 1);
    core->table[KB_SYSTEM_HANDLE] = &core->system;
    core->next = 2;
    *out = core;
    return 0;
}

void core_destroy(struct core *core)
{
    if (!core)
        return;
    for (uint32_t index = 2; index < KB_MAX_OBJECTS; index++) {
        pthread_mutex_lock(&core->lock);
        struct object *object = core->table[index];
        if (object)
            atomic_fetch_add(&object->users, 1);
        pthread_mutex_unlock(&core->lock);
        if (object) {
            object_close(core, object);
            object_put(object);
        }
    }
    if (core->system.fd >= 0)
        close(core->system.fd);
    pthread_mutex_destroy(&core->lock);
    free(core);
}

void core_interrupt(struct core *core)
{
    for (uint32_t index = 2; index < KB_MAX_OBJECTS; index++) {
        pthread_mutex_lock(&core->lock);
        struct object *object = core->table[index];
        if (object && object->sort == SORT_VCPU)
            atomic_fetch_add(&object->users, 1);
        else
            object = NULL;
        pthread_mutex_unlock(&core->lock);
        if (object) {
            vcpu_interrupt((struct vcpu *)object);
            object_put(object);
        }
    }
}

void core_on_overdue(struct core *core, uint64_t after_ns, void (*overdue)(void *argument, uint32_t vcpu),
                     void *argument)
{
    core->overdue = overdue;
    core->overdue_argument = argument;
    core->overdue_after_ns = after_ns;
}

int core_map(struct core *core, uint32_t region, void **address, size_t *size_bytes, void **token)
{
    struct object *object = object_get(core, region, SORT_REGION);
    if (!object)
        return KB_BAD_HANDLE;
    struct mapping *mapping = ((struct region *)object)->mapping;
    atomic_fetch_add(&mapping->users, 1);
    *address = mapping->address;
    *size_bytes = mapping->size_bytes;
    *token = mapping;
    object_put(object);
    return 0;
}
