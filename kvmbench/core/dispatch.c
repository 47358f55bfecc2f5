/*
 * The dispatch of requests: which kinds there are, who serves each, on which thread and with how much room for the
 * reply.  Three are served here: the hello, the close of a handle, and an ioctl, with what the core must remember of it.
 */
#define _GNU_SOURCE
#include "internal.h"
#include "handlers.h"
#include "trap_flag.h"
#include "ioctls.h"
#include "kernel.h"
#include "trace.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BRIEF_STEPS 8 /* under emulation a step takes 50 us */

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
    [KB_KERNEL_OPEN] = {sizeof(struct kb_header), false, kernel_open},
    [KB_KERNEL_TEXT] = {sizeof(struct kb_kernel_text), true, kernel_text},
    [KB_KERNEL_READ] = {sizeof(struct kb_kernel_read), true, kernel_read},
    [KB_KERNEL_LIST] = {sizeof(struct kb_kernel_list), false, kernel_list},
    [KB_KERNEL_DESCRIPTOR] = {sizeof(struct kb_handle), false, kernel_descriptor},
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
    case KB_KERNEL_TEXT:
        room = kernel_text_room(request);
        break;
    case KB_KERNEL_READ:
        room = kernel_read_room(request, request_bytes);
        break;
    case KB_KERNEL_LIST:
        room = kernel_list_room(request);
        break;
    case KB_LOCKSTEP:
        room = vcpu_lockstep_room(request, request_bytes);
        break;
    default:
        break;
    }
    return room <= KB_MAX_MESSAGE_BYTES ? (size_t)room : sizeof(*header);
}

int core_again(struct core_again *again)
{
    return core_call(again->core, again->request, again->request_bytes, again->reply, again->reply_capacity,
                     &again->reply_bytes);
}
