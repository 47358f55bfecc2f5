/*
 * Virtual CPUs, and how a running one is stopped.
 *
 * KVM_RUN returns early when a signal reaches its thread, or at once when
 * kvm_run.immediate_exit is set.  A signal alone can come a moment before
 * KVM_RUN is entered and be lost, so whoever wants the vcpu out sets the flag
 * first and then sends the signal: a timer for deadlines, another thread for
 * KB_KICK.  The timer is left armed from one call to the next; when it fires
 * early the loop sets it again.  So a thousand single steps with a deadline
 * each cost one timer_settime() and not two thousand.  The same timer tells the
 * loop when a brief request has become overdue (core_on_overdue()).
 */
#define _GNU_SOURCE
#include "internal.h"
#include "run_log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The vcpu this thread is running, for the handler: a late signal of a timer
 * that is gone must not lead to a vcpu that is gone.  The handler runs on the
 * thread it concerns, so what it finds here cannot be freed under it. */
static _Thread_local struct vcpu *volatile current __attribute__((tls_model("initial-exec")));

static void on_signal(int number)
{
    (void)number;
    struct vcpu *vcpu = current;
    int error = errno; /* of the KVM_RUN that just failed, perhaps */
    if (!vcpu)
        return;
    atomic_store(&vcpu->signalled, true);
    uint64_t deadline = atomic_load(&vcpu->deadline_ns);
    if (deadline && now_ns() >= deadline)
        atomic_store(&vcpu->expired, true);
    vcpu_set_immediate_exit(vcpu, 1);
    errno = error;
}

static void install_handler(void)
{
    struct sigaction action = {.sa_flags = 0}; /* no SA_RESTART: KVM_RUN must return */
    action.sa_handler = on_signal;
    sigemptyset(&action.sa_mask);
    sigaction(KB_SIGNAL, &action, NULL);
}

int vcpu_create(struct exchange *x)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    const struct kb_create *request = (const struct kb_create *)x->request;
    struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct vm *vm = (struct vm *)object_get(x->core, request->parent, SORT_VM);
    if (!vm)
        return KB_BAD_HANDLE;
    pthread_once(&once, install_handler);
    struct vcpu *vcpu = calloc(1, sizeof(*vcpu));
    int status = KB_NO_MEMORY;
    if (!vcpu)
        goto no_vcpu;
    int system = system_fd(x->core);
    int size = system < 0 ? -1 : ioctl(system, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (size < (int)sizeof(struct kvm_run)) {
        status = system < 0 ? system : -errno;
        goto no_size;
    }
    vcpu->object.sort = SORT_VCPU;
    vcpu->object.core = x->core;
    vcpu->object.vm = vm; /* takes over the hold of object_get */
    atomic_store(&vcpu->object.users, 1);
    vcpu->run_bytes = (size_t)size;
    vcpu->object.fd = ioctl_again(vm->object.fd, KVM_CREATE_VCPU, request->type);
    if (vcpu->object.fd < 0) {
        status = -errno;
        goto no_size;
    }
    vcpu->run = mmap(NULL, vcpu->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->object.fd, 0);
    if (vcpu->run == MAP_FAILED) {
        status = -errno;
        goto no_run;
    }
    int sync = ioctl(system, KVM_CHECK_EXTENSION, (unsigned long)KVM_CAP_SYNC_REGS);
    int wanted = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS;
    vcpu->has_sync_regs = sync > 0 && (sync & wanted) == wanted;
    vcpu->coalesced = coalesced_ring(system, vcpu);
    pthread_mutex_init(&vcpu->busy, NULL);
    pthread_mutex_init(&vcpu->kick_lock, NULL);
    vcpu->rearm = true;
    status = object_publish(x->core, &vcpu->object);
    if (status != 0) {
        object_put(&vcpu->object);
        return status;
    }
    reply->handle = vcpu->object.handle;
    reply->reserved = 0;
    reply->size_bytes = vcpu->run_bytes;
    x->reply_bytes = sizeof(*reply);
    return 0;

no_run:
    close(vcpu->object.fd);
no_size:
    free(vcpu);
no_vcpu:
    object_put(&vm->object);
    return status;
}

static void timer_drop(struct vcpu *vcpu)
{
    if (vcpu->has_timer)
        timer_delete(vcpu->timer);
    vcpu->has_timer = false;
    vcpu->timer_ns = 0;
}

void vcpu_free(struct vcpu *vcpu)
{
    timer_drop(vcpu);
    munmap(vcpu->run, vcpu->run_bytes);
    close(vcpu->object.fd);
    pthread_mutex_destroy(&vcpu->busy);
    pthread_mutex_destroy(&vcpu->kick_lock);
    free(vcpu->handlers);
    run_log_put(vcpu->log);
    free(vcpu);
}

void vcpu_interrupt(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick_lock);
    if (vcpu->running) {
        atomic_store(&vcpu->kicked, true);
        vcpu_set_immediate_exit(vcpu, 1);
        syscall(SYS_tgkill, getpid(), vcpu->thread, KB_SIGNAL);
    }
    pthread_mutex_unlock(&vcpu->kick_lock);
}

/* Takes the vcpu out of KVM_RUN and lets it go on, as a timer that fires for nothing does. */
void vcpu_nudge(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick_lock);
    if (vcpu->running)
        syscall(SYS_tgkill, getpid(), vcpu->thread, KB_SIGNAL);
    pthread_mutex_unlock(&vcpu->kick_lock);
}

/* For a vcpu whose handle is gone: a call that holds it already must not enter the guest any more. */
void vcpu_close(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick_lock);
    vcpu->closed = true;
    pthread_mutex_unlock(&vcpu->kick_lock);
    vcpu_interrupt(vcpu);
}

int vcpu_kick(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;
    struct vcpu *vcpu = (struct vcpu *)object_get(x->core, request->handle, SORT_VCPU);
    if (!vcpu)
        return KB_BAD_HANDLE;
    vcpu_interrupt(vcpu);
    object_put(&vcpu->object);
    return 0;
}

/* Sets the timer for what is due first unless it fires early enough already. */
int vcpu_rearm_timer(struct vcpu *vcpu, uint64_t now)
{
    uint64_t due = atomic_load(&vcpu->deadline_ns);

    if (vcpu->overdue_ns && (!due || vcpu->overdue_ns < due))
        due = vcpu->overdue_ns;
    if (!due)
        return 0;
    if (vcpu->has_timer && vcpu->timer_ns > now && vcpu->timer_ns <= due)
        return 0;
    if (!vcpu->has_timer) {
        struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = KB_SIGNAL};
        event.sigev_notify_thread_id = vcpu->thread;
        if (timer_create(CLOCK_MONOTONIC, &event, &vcpu->timer) < 0)
            return -errno;
        vcpu->has_timer = true;
        vcpu->timer_thread = vcpu->thread;
    }
    struct itimerspec when = {.it_value = {.tv_sec = (time_t)(due / 1000000000u),
                                           .tv_nsec = (long)(due % 1000000000u)}};
    if (timer_settime(vcpu->timer, TIMER_ABSTIME, &when, NULL) < 0)
        return -errno;
    vcpu->timer_ns = due;
    return 0;
}

/* Marks the vcpu as running on this thread; the caller holds busy.  `now` is the clock now. */
int vcpu_enter(struct vcpu *vcpu, uint64_t deadline_ns, uint64_t now)
{
    static _Thread_local pid_t thread;

    if (!thread)
        thread = (pid_t)syscall(SYS_gettid);
    uint64_t deadline = 0;
    if (deadline_ns)
        deadline = deadline_ns > UINT64_MAX / 2 - now ? UINT64_MAX / 2 : now + deadline_ns;
    pthread_mutex_lock(&vcpu->kick_lock);
    if (vcpu->closed) {
        pthread_mutex_unlock(&vcpu->kick_lock);
        return KB_BAD_HANDLE;
    }
    atomic_store(&vcpu->kicked, false);
    atomic_store(&vcpu->expired, false);
    atomic_store(&vcpu->signalled, false);
    atomic_store(&vcpu->deadline_ns, deadline);
    vcpu_set_immediate_exit(vcpu, 0);
    vcpu->thread = thread;
    vcpu->running = true;
    current = vcpu;
    pthread_mutex_unlock(&vcpu->kick_lock);
    if (vcpu->has_timer && vcpu->timer_thread != thread)
        timer_drop(vcpu);
    /* Not `now`: a timer that fired since then found no vcpu here, and will not fire again. */
    int status = vcpu_rearm_timer(vcpu, now_ns());
    if (status != 0)
        vcpu_leave(vcpu);
    return status;
}

void vcpu_switch(struct vcpu *vcpu)
{
    current = vcpu;
}

void vcpu_leave(struct vcpu *vcpu)
{
    pthread_mutex_lock(&vcpu->kick_lock);
    vcpu->running = false;
    current = NULL;
    vcpu->overdue_ns = 0;
    atomic_store(&vcpu->deadline_ns, 0);
    pthread_mutex_unlock(&vcpu->kick_lock);
}
