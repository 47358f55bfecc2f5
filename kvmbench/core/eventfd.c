/*
 * Eventfds: what a guest's write signals (KVM_IOEVENTFD), and what raises an interrupt (KVM_IRQFD).
 *
 * An eventfd belongs to a VM and is closed with it.  Messages name it by handle; the two ioctls get its descriptor
 * here and nowhere else (eventfd_get(), called from ioctl_special.c), so a number from outside never is one.  KVM holds what
 * it was given: an eventfd that is closed while a doorbell rings it leaves the doorbell, whose writes then go nowhere.
 * Never blocking: who reads one that nobody has written is told 0.
 */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <sys/eventfd.h>
#include <unistd.h>

int eventfd_make(struct exchange *x)
{
    const struct kb_create *request = (const struct kb_create *)x->request;

    if (x->capacity < sizeof(struct kb_handle_reply))
        return KB_TOO_LARGE;
    if (request->type != 0 || request->flags != 0)
        return KB_BAD_VALUE;
    struct vm *vm = (struct vm *)object_get(x->core, request->parent, SORT_VM);
    if (!vm)
        return KB_BAD_HANDLE;
    int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    int status = fd < 0 ? -errno : publish_fd(x, SORT_EVENTFD, fd, vm);
    if (status != 0)
        object_put(&vm->object);
    return status;
}

int eventfd_take(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;
    struct kb_eventfd_reply *reply = (struct kb_eventfd_reply *)x->reply;
    uint64_t count = 0;
    int status = 0;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct object *eventfd = object_get(x->core, request->handle, SORT_EVENTFD);
    if (!eventfd)
        return KB_BAD_HANDLE;
    if (read(eventfd->fd, &count, sizeof(count)) < 0) {
        count = 0;
        status = errno == EAGAIN ? 0 : -errno;
    }
    object_put(eventfd);
    reply->count = count;
    x->reply_bytes = sizeof(*reply);
    return status;
}

int eventfd_add(struct exchange *x)
{
    const struct kb_eventfd *request = (const struct kb_eventfd *)x->request;
    int status = 0;

    if (request->add == UINT64_MAX) /* the one number that an eventfd does not take */
        return KB_BAD_VALUE;
    struct object *eventfd = object_get(x->core, request->handle, SORT_EVENTFD);
    if (!eventfd)
        return KB_BAD_HANDLE;
    if (write(eventfd->fd, &request->add, sizeof(request->add)) < 0)
        status = -errno; /* EAGAIN: the sum would pass UINT64_MAX - 1 */
    object_put(eventfd);
    return status;
}

struct object *eventfd_get(struct vm *vm, uint32_t handle)
{
    struct object *eventfd = object_get(vm->object.core, handle, SORT_EVENTFD);

    if (eventfd && eventfd->vm != vm) {
        object_put(eventfd);
        eventfd = NULL;
    }
    return eventfd;
}
