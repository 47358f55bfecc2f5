/* Handles, and the dispatch of requests to the file that serves them. */
#define _GNU_SOURCE
#include "internal.h"
#include "handlers.h"
#include "trap_flag.h"
#include "ioctls.h"
#include "trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define HANDLE_INDEX(handle) ((handle) & 0xffffu)
#define HANDLE_GENERATION(handle) ((handle) >> 16)

#define BRIEF_STEPS 8 /* under emulation a step takes 50 us */

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

static void object_close(struct core *core, struct object *object)
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

static int hello(struct exchange *x)
{
    struct kb_hello_reply *reply = (struct kb_hello_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    int fd = system_fd(x->core);
    reply->wire_version = KB_WIRE_VERSION;
    reply->page_bytes = (uint32_t)sysconf(_SC_PAGESIZE);
    reply->kvm_api_version = fd < 0 ? fd : ioctl(fd, KVM_GET_API_VERSION, 0);
    reply->row_bytes = sizeof(struct kb_row);
    reply->agent_pid = (uint32_t)getpid();
    reply->agent_uid = (uint32_t)getuid();
    x->reply_bytes = sizeof(*reply);
    return 0;
}

static int close_handle(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;

    if (request->handle == KB_SYSTEM_HANDLE)
        return KB_BAD_HANDLE;
    struct object *object = object_get(x->core, request->handle, 0);
    if (!object)
        return KB_BAD_HANDLE;
    object_close(x->core, object);
    object_put(object);
    return 0;
}

/* With interrupt controllers in the kernel, whole or split, HLT waits there. */
static bool makes_irqchip(const struct kb_ioctl *request, size_t request_bytes)
{
    struct kvm_enable_cap cap;

    if (request->request == KVM_CREATE_IRQCHIP)
        return true;
    if (request->request != KVM_ENABLE_CAP || request_bytes < sizeof(*request) + sizeof(cap))
        return false;
    memcpy(&cap, request + 1, sizeof(cap));
    return cap.cap == KVM_CAP_SPLIT_IRQCHIP;
}

/* Marks (handlers.h) must not be an OUT to such a port: it leaves no exit. */
static bool takes_ports(const struct kb_ioctl *request, size_t request_bytes)
{
    size_t bytes = request_bytes - sizeof(*request);
    struct kvm_ioeventfd eventfd;
    struct kvm_coalesced_mmio_zone zone;

    if (request->request == KVM_IOEVENTFD && bytes >= sizeof(eventfd)) {
        memcpy(&eventfd, request + 1, sizeof(eventfd));
        return eventfd.flags & KVM_IOEVENTFD_FLAG_PIO;
    }
    if (request->request != KVM_REGISTER_COALESCED_MMIO || bytes < sizeof(zone))
        return false;
    memcpy(&zone, request + 1, sizeof(zone));
    return zone.pio;
}

static int forward_ioctl(struct exchange *x)
{
    const struct kb_ioctl *request = (const struct kb_ioctl *)x->request;
    struct kb_ioctl_reply *reply = (struct kb_ioctl_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct object *object = object_get(x->core, request->handle, 0);
    if (!object)
        return KB_BAD_HANDLE;

    enum ioctl_scope scope = IOCTL_SYSTEM;
    int fd = object->fd;
    struct vcpu *vcpu = NULL;
    int status = 0;
    switch (object->sort) {
    case SORT_SYSTEM:
        fd = system_fd(x->core);
        if (fd < 0)
            status = fd;
        break;
    case SORT_VM:
        scope = IOCTL_VM;
        break;
    case SORT_VCPU:
        scope = IOCTL_VCPU;
        vcpu = (struct vcpu *)object;
        if (pthread_mutex_trylock(&vcpu->busy) != 0) {
            status = KB_BUSY;
            vcpu = NULL;
        }
        break;
    case SORT_DEVICE:
        scope = IOCTL_DEVICE;
        break;
    default:
        status = KB_BAD_HANDLE;
        break;
    }
    if (status == 0) {
        size_t out_bytes = 0;
        int32_t result = 0;
        status = core_ioctl(fd, scope, scope == IOCTL_VM ? (struct vm *)object : NULL, request->request,
                            request->value, x->request + sizeof(*request), x->request_bytes - sizeof(*request),
                            x->reply + sizeof(*reply), x->capacity - sizeof(*reply),
                            request->out_bytes, &out_bytes, &result);
        if (status == 0 && scope == IOCTL_VM && makes_irqchip(request, x->request_bytes))
            atomic_store(&((struct vm *)object)->irqchip, true);
        if (status == 0 && scope == IOCTL_VM && takes_ports(request, x->request_bytes))
            atomic_store(&((struct vm *)object)->takes_ports, true);
        if (status == 0) {
            reply->result = result;
            reply->reserved = 0;
            x->reply_bytes = sizeof(*reply) + out_bytes;
        }
    }
    if (vcpu) {
        if (_IOC_DIR(request->request) != _IOC_READ) {
            /* KVM arms TF for one rip only; any write may have moved or cleared it. */
            vcpu->rearm = true;
            vcpu->regs_valid = false;
            vcpu->translation.valid = false;
            if (request->request == KVM_SET_SREGS && vcpu->handlers)
                vcpu->handlers->entered = 0; /* a reset does it: what led to the next death begins here */
            if (request->request == KVM_SET_GUEST_DEBUG)
                vcpu->debug_known = false;
            /* What is written is told again, TF too; see trap_flag.h. */
            if (request->request == KVM_SET_REGS)
                vcpu->over.inside = vcpu->owes_tf = false;
            if (status == 0 && request->request == KVM_SET_REGS)
                vcpu->guest_tf = ((const struct kvm_regs *)(request + 1))->rflags & FLAGS_TF;
        }
        pthread_mutex_unlock(&vcpu->busy);
    }
    object_put(object);
    return status;
}

/* Size of the fixed part of each request, whether a payload may follow, and who serves it. */
static const struct {
    size_t bytes;
    bool payload;
    int (*serve)(struct exchange *x);
} kinds[KB_KIND_END] = {
    [KB_HELLO] = {sizeof(struct kb_header), false, hello},
    [KB_HOST_INFO] = {sizeof(struct kb_header), false, host_info},
    [KB_CREATE_VM] = {sizeof(struct kb_create), false, vm_create},
    [KB_CREATE_VCPU] = {sizeof(struct kb_create), false, vcpu_create},
    [KB_CREATE_DEVICE] = {sizeof(struct kb_create), false, device_create},
    [KB_OPEN_STATS] = {sizeof(struct kb_create), false, stats_open},
    [KB_READ_STATS] = {sizeof(struct kb_range), false, stats_read},
    [KB_CLOSE] = {sizeof(struct kb_handle), false, close_handle},
    [KB_IOCTL] = {sizeof(struct kb_ioctl), true, forward_ioctl},
    [KB_ADD_REGION] = {sizeof(struct kb_add_region), false, region_add},
    [KB_SET_REGION] = {sizeof(struct kb_set_region), false, region_set},
    [KB_READ_REGION] = {sizeof(struct kb_range), false, region_read},
    [KB_WRITE_REGION] = {sizeof(struct kb_range), true, region_write},
    [KB_DIRTY_LOG] = {sizeof(struct kb_handle), false, region_dirty_log},
    [KB_PROTECT] = {sizeof(struct kb_protect), false, region_protect},
    [KB_EXECUTE] = {sizeof(struct kb_execute), true, vcpu_execute},
    [KB_KICK] = {sizeof(struct kb_handle), false, vcpu_kick},
    [KB_FILL_REGION] = {sizeof(struct kb_fill), false, region_fill},
    [KB_LOCKSTEP] = {sizeof(struct kb_lockstep), true, vcpu_lockstep},
    [KB_CREATE_EVENTFD] = {sizeof(struct kb_create), false, eventfd_make},
    [KB_READ_EVENTFD] = {sizeof(struct kb_handle), false, eventfd_take},
    [KB_WRITE_EVENTFD] = {sizeof(struct kb_eventfd), false, eventfd_add},
    [KB_TAKE_COALESCED] = {sizeof(struct kb_handle), false, coalesced_take},
    [KB_RAW_LOOP] = {sizeof(struct kb_raw_loop), false, vcpu_raw_loop},
    [KB_TRACE_OPEN] = {sizeof(struct kb_trace_open), true, trace_open},
    [KB_TRACE_TEXT] = {sizeof(struct kb_trace_text), true, trace_text},
    [KB_TRACE_SET] = {sizeof(struct kb_trace_set), false, trace_set},
    [KB_TRACE_READ] = {sizeof(struct kb_trace_read), false, trace_read},
    [KB_TRACE_MARK] = {sizeof(struct kb_trace_mark), true, trace_mark},
};

int core_call(struct core *core, const void *request, size_t request_bytes, void *reply,
              size_t reply_capacity, size_t *reply_bytes)
{
    const struct kb_header *in = request;
    struct kb_header *out = reply;
    struct exchange x = {core, request, request_bytes, reply, reply_capacity,
                         sizeof(struct kb_header)};
    int status;

    if (reply_capacity < sizeof(*out))
        return -EINVAL;
    out->id = 0;
    out->kind = 0;
    if (request_bytes < sizeof(*in)) {
        status = KB_BAD_LENGTH;
    } else {
        out->id = in->id;
        out->kind = in->kind;
        if (in->size_bytes != request_bytes || request_bytes > KB_MAX_MESSAGE_BYTES)
            status = KB_BAD_LENGTH;
        else if (in->kind >= KB_KIND_END || !kinds[in->kind].serve)
            status = KB_BAD_KIND;
        else if (request_bytes < kinds[in->kind].bytes ||
                 (request_bytes > kinds[in->kind].bytes && !kinds[in->kind].payload))
            status = KB_BAD_LENGTH;
        else
            status = kinds[in->kind].serve(&x);
    }
    if (status != 0)
        x.reply_bytes = sizeof(*out);
    out->status = status;
    out->size_bytes = (uint32_t)x.reply_bytes;
    *reply_bytes = x.reply_bytes;
    return 0;
}

uint32_t core_vcpu_of(struct core *core, const void *request, size_t request_bytes)
{
    const struct kb_header *header = request;
    uint32_t handle;

    /* In each of these kinds the handle is the first field after the header. */
    if (request_bytes < sizeof(struct kb_handle))
        return 0;
    switch (header->kind) {
    case KB_EXECUTE:
    case KB_IOCTL:
    case KB_LOCKSTEP:
    case KB_RAW_LOOP:
    case KB_OPEN_STATS:
    case KB_CLOSE:
        handle = ((const struct kb_handle *)request)->handle;
        break;
    default:
        return 0;
    }
    /* A close interrupts the vcpu, so it must not queue behind what it interrupts. */
    if (header->kind == KB_CLOSE)
        return 0;
    struct object *object = object_get(core, handle, SORT_VCPU);
    if (!object)
        return 0;
    object_put(object);
    return handle;
}

bool core_is_brief(const void *request, size_t request_bytes)
{
    const struct kb_header *header = request;

    if (request_bytes < sizeof(*header))
        return false;
    switch (header->kind) {
    case KB_IOCTL:
    case KB_OPEN_STATS:
        return true;
    case KB_EXECUTE: {
        const struct kb_execute *execute = request;
        if (request_bytes < sizeof(*execute))
            return true; /* will be refused */
        return execute->flags & KB_COMPLETE ||
               (execute->mode == KB_STEP && execute->steps >= 1 && execute->steps <= BRIEF_STEPS);
    }
    default:
        return false;
    }
}

size_t core_reply_bytes(struct core *core, const void *request, size_t request_bytes)
{
    const struct kb_header *header = request;
    uint64_t room = 4096;

    if (request_bytes < sizeof(*header) || header->kind >= KB_KIND_END ||
        request_bytes < kinds[header->kind].bytes)
        return sizeof(*header);
    switch (header->kind) {
    case KB_HOST_INFO:
        room = 65536;
        break;
    case KB_READ_REGION:
    case KB_READ_STATS: {
        const struct kb_range *range = request;
        room = range->length_bytes < KB_MAX_MESSAGE_BYTES ? range->length_bytes : 0;
        room += sizeof(*header);
        break;
    }
    case KB_DIRTY_LOG: {
        struct object *object =
            object_get(core, ((const struct kb_handle *)request)->handle, SORT_REGION);
        if (object) {
            room = sizeof(*header) + ((struct region *)object)->size_bytes / 4096 / 8 + 8;
            object_put(object);
        }
        break;
    }
    case KB_IOCTL: {
        const struct kb_ioctl *ioctl_request = request;
        room = sizeof(struct kb_ioctl_reply) + request_bytes + _IOC_SIZE(ioctl_request->request) +
               ioctl_request->out_bytes;
        break;
    }
    case KB_EXECUTE: {
        room = vcpu_execute_room(request);
        break;
    }
    case KB_TRACE_TEXT:
        room = sizeof(*header) + KB_MAX_TRACE_TEXT;
        break;
    case KB_TRACE_READ:
        room = trace_read_room(request);
        break;
    case KB_LOCKSTEP:
        room = vcpu_lockstep_room(request, request_bytes);
        break;
    default:
        break;
    }
    return room <= KB_MAX_MESSAGE_BYTES ? (size_t)room : sizeof(*header);
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

int core_again(struct core_again *again)
{
    return core_call(again->core, again->request, again->request_bytes, again->reply, again->reply_capacity,
                     &again->reply_bytes);
}
