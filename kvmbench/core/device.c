/* KVM devices and statistics files: a descriptor and nothing else of ours. */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

int publish_fd(struct exchange *x, enum sort sort, int fd, struct vm *vm)
{
    struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;
    struct object *object = calloc(1, sizeof(*object));
    int status = KB_NO_MEMORY;

    if (object) {
        object->sort = sort;
        object->core = x->core;
        object->fd = fd;
        object->vm = vm;
        atomic_store(&object->users, 1);
        status = object_publish(x->core, object);
        if (status == 0) {
            reply->handle = object->handle;
            reply->reserved = 0;
            reply->size_bytes = 0;
            x->reply_bytes = sizeof(*reply);
            return 0;
        }
        free(object);
    }
    close(fd);
    return status;
}

int device_create(struct exchange *x)
{
    const struct kb_create *request = (const struct kb_create *)x->request;

    if (x->capacity < sizeof(struct kb_handle_reply))
        return KB_TOO_LARGE;
    struct vm *vm = (struct vm *)object_get(x->core, request->parent, SORT_VM);
    if (!vm)
        return KB_BAD_HANDLE;
    struct kvm_create_device device = {.type = request->type, .flags = request->flags};
    int status;
    if (ioctl_again(vm->object.fd, KVM_CREATE_DEVICE, (unsigned long)&device) < 0) {
        status = -errno;
    } else if (request->flags & KVM_CREATE_DEVICE_TEST) {
        struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;
        reply->handle = 0; /* a test creates nothing */
        reply->reserved = 0;
        reply->size_bytes = 0;
        x->reply_bytes = sizeof(*reply);
        status = 0;
    } else {
        status = publish_fd(x, SORT_DEVICE, (int)device.fd, vm);
        if (status == 0)
            return 0;
    }
    object_put(&vm->object);
    return status;
}

int stats_open(struct exchange *x)
{
    const struct kb_create *request = (const struct kb_create *)x->request;

    if (x->capacity < sizeof(struct kb_handle_reply))
        return KB_TOO_LARGE;
    struct object *parent = object_get(x->core, request->parent, 0);
    if (!parent || (parent->sort != SORT_VM && parent->sort != SORT_VCPU)) {
        object_put(parent);
        return KB_BAD_HANDLE;
    }
    struct vm *vm = parent->sort == SORT_VM ? (struct vm *)parent : parent->vm;
    struct vcpu *vcpu = parent->sort == SORT_VCPU ? (struct vcpu *)parent : NULL;
    int status;
    if (vcpu && pthread_mutex_trylock(&vcpu->busy) != 0) {
        object_put(parent);
        return KB_BUSY;
    }
    int fd = ioctl(parent->fd, KVM_GET_STATS_FD, NULL);
    status = fd < 0 ? -errno : 0;
    if (vcpu)
        pthread_mutex_unlock(&vcpu->busy);
    if (status == 0) {
        atomic_fetch_add(&vm->object.users, 1);
        status = publish_fd(x, SORT_STATS, fd, vm);
        if (status != 0)
            object_put(&vm->object);
    }
    object_put(parent);
    return status;
}

int stats_read(struct exchange *x)
{
    const struct kb_range *request = (const struct kb_range *)x->request;

    if (request->length_bytes > x->capacity - sizeof(struct kb_header))
        return KB_TOO_LARGE;
    if (request->offset > INT64_MAX)
        return KB_BAD_RANGE;
    struct object *stats = object_get(x->core, request->handle, SORT_STATS);
    if (!stats)
        return KB_BAD_HANDLE;
    ssize_t got = pread(stats->fd, x->reply + sizeof(struct kb_header), request->length_bytes,
                        (off_t)request->offset);
    int status = got < 0 ? -errno : 0;
    if (status == 0)
        x->reply_bytes = sizeof(struct kb_header) + (size_t)got;
    object_put(stats);
    return status;
}
