/* KB_EXECUTE: the checks of the request, the answer to the exit before, and the call of the loop. */
#define _GNU_SOURCE
#include "job.h"

#include <string.h>

int job_check(struct job *job)
{
    const struct kb_execute *request = job->request;
    uint64_t payload = job->x->request_bytes - sizeof(*request);
    const uint8_t *bytes = job->x->request + sizeof(*request);

    if (request->n_stops > KB_MAX_STOPS || request->n_watches > KB_MAX_WATCHES ||
        request->max_rows > KB_MAX_STEPS_ROWS)
        return KB_BAD_VALUE;
    if (payload != (uint64_t)request->io_bytes + 8ull * request->n_stops +
                       sizeof(struct kb_watch) * (uint64_t)request->n_watches)
        return KB_BAD_LENGTH;
    if (request->mode > KB_STEP ||
        request->flags & ~(uint32_t)(KB_RECORD | KB_FULL_SYNC | KB_COMPLETE | KB_PACK | KB_HANDLERS |
                                     KB_OVER_HANDLERS | KB_WHOLE_REP | KB_BARE) ||
        request->debug_control & KVM_GUESTDBG_ENABLE ||
        (request->debug_control & KVM_GUESTDBG_SINGLESTEP && !(request->flags & KB_BARE)) ||
        (request->mode == KB_STEP && request->flags & KB_BARE))
        return KB_BAD_VALUE;
    job->stepping = request->mode == KB_STEP;
    uint32_t of_steps = KB_RECORD | KB_HANDLERS | KB_OVER_HANDLERS | KB_WHOLE_REP;
    if (!job->stepping && (request->flags & of_steps || request->n_stops || request->n_watches))
        return KB_BAD_VALUE;
    if (request->flags & KB_OVER_HANDLERS && !(request->flags & KB_HANDLERS))
        return KB_BAD_VALUE;
    if (request->flags & KB_RECORD && request->max_rows == 0)
        return KB_BAD_VALUE;
    if (job->x->capacity < vcpu_execute_room(request))
        return KB_TOO_LARGE;
    job->io = bytes;
    job->stops = bytes + request->io_bytes;
    job->watches = job->stops + 8ull * request->n_stops;
    return 0;
}

int job_answer(struct vcpu *vcpu, const uint8_t *data, size_t bytes)
{
    struct kvm_run *run = vcpu->run;

    switch (vcpu->pending) {
    case KVM_EXIT_IO: {
        size_t size = (size_t)run->io.size * run->io.count;
        if (run->io.direction != KVM_EXIT_IO_IN)
            return bytes ? KB_BAD_LENGTH : 0;
        if (run->io.data_offset > vcpu->run_bytes || size > vcpu->run_bytes - run->io.data_offset)
            return KB_BAD_RANGE;
        uint8_t *to = (uint8_t *)run + run->io.data_offset;
        if (bytes == 0)
            memset(to, 0xff, size); /* nobody answered: an empty bus reads ones */
        else if (bytes == size)
            memcpy(to, data, bytes);
        else
            return KB_BAD_LENGTH;
        return 0;
    }
    case KVM_EXIT_MMIO:
        if (run->mmio.is_write)
            return bytes ? KB_BAD_LENGTH : 0;
        if (bytes != 0 && bytes != run->mmio.len)
            return KB_BAD_LENGTH;
        memset(run->mmio.data, 0xff, sizeof(run->mmio.data));
        if (bytes <= sizeof(run->mmio.data))
            memcpy(run->mmio.data, data, bytes);
        return 0;
    case KVM_EXIT_X86_RDMSR:
    case KVM_EXIT_X86_WRMSR:
        /* The value; none means #GP in the guest. */
        if (bytes != 0 && bytes != 8)
            return KB_BAD_LENGTH;
        run->msr.error = bytes == 0;
        if (bytes == 8)
            memcpy(&run->msr.data, data, 8);
        return 0;
    case KVM_EXIT_HYPERCALL:
        if (bytes != 0 && bytes != 8)
            return KB_BAD_LENGTH;
        if (bytes == 8)
            memcpy(&run->hypercall.ret, data, 8);
        return 0;
    default:
        return bytes ? KB_BAD_LENGTH : 0;
    }
}

int vcpu_execute(struct exchange *x)
{
    struct job job = {.x = x, .request = (const struct kb_execute *)x->request};
    uint8_t before[KB_MAX_WATCH_BYTES];
    int status = job_check(&job);

    if (status != 0)
        return status;
    job.vcpu = (struct vcpu *)object_get(x->core, job.request->vcpu, SORT_VCPU);
    if (!job.vcpu)
        return KB_BAD_HANDLE;
    if (pthread_mutex_trylock(&job.vcpu->busy) != 0) {
        object_put(&job.vcpu->object);
        return KB_BUSY;
    }
    uint64_t start = now_ns();
    status = watches_open(&job, before, sizeof(before));
    if (status == 0)
        status = job_answer(job.vcpu, job.io, job.request->io_bytes);
    if (x->core->overdue && core_is_brief(x->request, x->request_bytes))
        job.vcpu->overdue_ns = start + x->core->overdue_after_ns;
    if (status == 0)
        status = vcpu_enter(job.vcpu, job.request->deadline_ns, start);
    if (status == 0) {
        report_start(&job);
        job.full = job.request->flags & KB_FULL_SYNC ||
                   (job.stepping && job.request->steps == 1);
        handlers_vcpu_begins(job.vcpu);
        watches_forget(&job); /* another vcpu's marks were there, perhaps, when they were opened */
        status = job_arm(&job);
        if (status == 0)
            job_loop(&job);
        handlers_vcpu_ends(job.vcpu);
        if (status == 0) {
            vcpu_leave(job.vcpu);
            report_stop(&job);
            job.stop->elapsed_ns = now_ns() - start;
            job.vcpu->total_ns += job.stop->elapsed_ns;
            job.stop->total_ns = job.vcpu->total_ns;
        } else {
            vcpu_leave(job.vcpu);
        }
    }
    watches_close(&job);
    pthread_mutex_unlock(&job.vcpu->busy);
    object_put(&job.vcpu->object);
    return status;
}
