/* Virtual machines. */
#define _GNU_SOURCE
#include "internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

int vm_create(struct exchange *x)
{
    const struct kb_create *request = (const struct kb_create *)x->request;
    struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    if (request->parent != KB_SYSTEM_HANDLE)
        return KB_BAD_HANDLE;
    int system = system_fd(x->core);
    if (system < 0)
        return system;
    struct vm *vm = calloc(1, sizeof(*vm));
    if (!vm)
        return KB_NO_MEMORY;
    vm->object.sort = SORT_VM;
    vm->object.core = x->core;
    atomic_store(&vm->object.users, 1);
    vm->object.fd = ioctl_again(system, KVM_CREATE_VM, request->type);
    if (vm->object.fd < 0) {
        int error = -errno;
        free(vm);
        return error;
    }
    pthread_mutex_init(&vm->lock, NULL);
    pthread_cond_init(&vm->untrapped, NULL);
    int status = object_publish(x->core, &vm->object);
    if (status != 0) {
        vm_free(vm);
        return status;
    }
    reply->handle = vm->object.handle;
    reply->reserved = 0;
    reply->size_bytes = 0;
    x->reply_bytes = sizeof(*reply);
    return 0;
}

/* The last user is gone, so every child is: children hold their VM. */
void vm_free(struct vm *vm)
{
    close(vm->object.fd);
    pthread_mutex_destroy(&vm->lock);
    pthread_cond_destroy(&vm->untrapped);
    free(vm);
}
