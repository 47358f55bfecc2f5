/* The agent's threads: who reads, who serves, and how the two are passed on.  See agent.h. */
#define _GNU_SOURCE
#include "agent.h"

#include <stdlib.h>
#include <time.h>

#define WORKER_STACK_BYTES ((size_t)256 << 10)
#define KICK_TRIES 1000 /* of 1 ms */
#define END_TRIES 2000  /* of 1 ms */
#define REST_NS 1000000

static void wait_1ms(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Has the core serve a request; returns the reply's size, 0 when there is no room for one. */
static size_t serve(struct agent *agent, const void *request, size_t request_bytes, struct buffer *reply)
{
    size_t room = core_reply_bytes(agent->core, request, request_bytes);
    size_t bytes = 0;

    if (room < sizeof(struct kb_header))
        room = sizeof(struct kb_header);
    if (!buffer_reserve(reply, room) ||
        core_call(agent->core, request, request_bytes, reply->bytes, room, &bytes) != 0)
        return 0;
    return bytes;
}

static void answer(struct agent *agent, const struct kb_header *request, struct buffer *reply, size_t reply_bytes)
{
    if (reply_bytes)
        send_reply(agent, reply->bytes, reply_bytes);
    else
        send_status(agent, request, KB_NO_MEMORY);
    buffer_trim(reply);
}

/* Makes another thread the reader; agent->lock held. */
static void pass_reading(struct agent *agent, struct worker *to)
{
    agent->reader = to;
    pthread_cond_signal(&to->wake);
}

/* The core calls this on a vcpu's thread whose brief request turns out not to be. */
static void on_overdue(void *argument, uint32_t vcpu)
{
    struct agent *agent = argument;

    pthread_mutex_lock(&agent->lock);
    if (agent->reader && agent->reader->vcpu == vcpu)
        pass_reading(agent, &agent->main);
    pthread_mutex_unlock(&agent->lock);
}

/* The handle of the vcpu that a KB_CREATE_VCPU made, or 0. */
static uint32_t created(const struct buffer *reply, size_t reply_bytes)
{
    const struct kb_handle_reply *made = (const struct kb_handle_reply *)reply->bytes;
    return reply_bytes >= sizeof(*made) && made->header.status == 0 ? made->handle : 0;
}

/* Serves the request of the worker's own vcpu. */
static void serve_own(struct worker *worker)
{
    struct agent *agent = worker->agent;
    struct kb_header header = *(const struct kb_header *)worker->request.bytes;
    size_t reply_bytes = serve(agent, worker->request.bytes, worker->request_bytes, &worker->reply);

    buffer_trim(&worker->request);
    pthread_mutex_lock(&agent->lock);
    if (worker->vcpu == 0) {
        worker->vcpu = created(&worker->reply, reply_bytes);
        worker->ending = worker->vcpu == 0;
        agent->starting = NULL;
        pthread_cond_broadcast(&agent->started);
    }
    /* Idle before the reply is out: who has it may send the next request at once. */
    worker->busy = false;
    pthread_mutex_unlock(&agent->lock);
    answer(agent, &header, &worker->reply, reply_bytes);
    pthread_mutex_lock(&agent->lock);
    agent->at_work--;
    pthread_cond_signal(&agent->answered);
    pthread_mutex_unlock(&agent->lock);
}

bool nobody_works(struct agent *agent)
{
    pthread_mutex_lock(&agent->lock);
    bool nobody = agent->at_work == 0;
    pthread_mutex_unlock(&agent->lock);
    return nobody;
}

void rest(struct agent *agent)
{
    struct timespec until;

    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += REST_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    pthread_mutex_lock(&agent->lock);
    pthread_cond_timedwait(&agent->answered, &agent->lock, &until);
    pthread_mutex_unlock(&agent->lock);
}

static struct worker *worker_of(struct agent *agent, uint32_t vcpu)
{
    struct worker *worker = agent->workers;
    while (worker && (worker->vcpu != vcpu || worker->ending))
        worker = worker->next;
    return worker;
}

/* Gives a worker the request in `from`, and `from` the worker's old buffer; agent->lock held. */
static void hand_over(struct worker *to, struct worker *from)
{
    struct buffer old = to->request;

    to->request = from->request;
    to->request_bytes = from->request_bytes;
    to->busy = true;
    to->agent->at_work++;
    /* Now and not later: whoever reads next may have a request for `from`. */
    from->request = old;
    buffer_trim(&from->request);
    pthread_cond_signal(&to->wake);
}

/* Whose vcpu the request is for serves it: this thread, the reader, or another. */
static void serve_vcpu(struct worker *self, uint32_t vcpu)
{
    struct agent *agent = self->agent;
    const struct kb_header header = *(const struct kb_header *)self->request.bytes;
    bool brief = core_is_brief(self->request.bytes, self->request_bytes);

    pthread_mutex_lock(&agent->lock);
    struct worker *worker = worker_of(agent, vcpu);
    bool free = worker && !worker->busy;
    if (free && worker == self) {
        worker->busy = true;
        agent->at_work++;
        if (!brief)
            pass_reading(agent, &agent->main);
    } else if (free) {
        if (brief)
            agent->reader = worker; /* woken by the next line */
        hand_over(worker, self);
    }
    pthread_mutex_unlock(&agent->lock);
    if (!free) {
        buffer_trim(&self->request);
        send_status(agent, &header, KB_BUSY);
    } else if (worker == self) {
        serve_own(self);
    }
}

static void *work(void *worker);

/* A vcpu is created by the thread that will run it: starts one, and waits until it has done that. */
static bool worker_start(struct worker *self)
{
    struct agent *agent = self->agent;
    struct worker *worker = calloc(1, sizeof(*worker));
    pthread_attr_t attributes;
    pthread_t thread;

    if (!worker)
        return false;
    worker->agent = agent;
    pthread_cond_init(&worker->wake, NULL);
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, WORKER_STACK_BYTES);
    pthread_mutex_lock(&agent->lock);
    bool started = pthread_create(&thread, &attributes, work, worker) == 0;
    if (started) {
        worker->next = agent->workers;
        agent->workers = worker;
        hand_over(worker, self);
        /* One at a time: a flood of failing requests must not become a flood of threads. */
        agent->starting = worker;
        while (agent->starting == worker) /* not worker->busy: it may be freed by then */
            pthread_cond_wait(&agent->started, &agent->lock);
    } else {
        pthread_cond_destroy(&worker->wake);
        free(worker);
    }
    pthread_mutex_unlock(&agent->lock);
    pthread_attr_destroy(&attributes);
    return started;
}

/* Sends the workers home whose vcpu a KB_CLOSE has taken away. */
static void workers_sweep(struct agent *agent)
{
    pthread_mutex_lock(&agent->lock);
    for (struct worker *worker = agent->workers; worker; worker = worker->next) {
        struct kb_handle probe = {{sizeof(probe), 0, KB_EXECUTE, 0}, worker->vcpu, 0};
        if (worker->vcpu && core_vcpu_of(agent->core, &probe, sizeof(probe)) == 0) {
            worker->ending = true;
            pthread_cond_signal(&worker->wake);
        }
    }
    pthread_mutex_unlock(&agent->lock);
}

/* A kick for a worker that has its request but has not entered KVM_RUN yet would be lost: the
 * core forgets kicks when it enters.  So kick until the request is served. */
static void kick_again(struct agent *agent, const struct kb_handle *request)
{
    for (int n = 0; n < KICK_TRIES; n++) {
        uint8_t reply[64];
        size_t reply_bytes;
        pthread_mutex_lock(&agent->lock);
        struct worker *worker = worker_of(agent, request->handle);
        bool busy = worker && worker->busy;
        pthread_mutex_unlock(&agent->lock);
        if (!busy)
            return;
        core_call(agent->core, request, sizeof(*request), reply, sizeof(reply), &reply_bytes);
        wait_1ms();
    }
}

/* Reads one request and sees to it that it is served; false at the end of the stream. */
static bool read_and_serve(struct worker *self)
{
    struct agent *agent = self->agent;

    self->request_bytes = read_message(agent, &self->request);
    if (!self->request_bytes)
        return false;
    const struct kb_header header = *(const struct kb_header *)self->request.bytes;
    uint32_t vcpu = core_vcpu_of(agent->core, self->request.bytes, self->request_bytes);
    if (vcpu) {
        serve_vcpu(self, vcpu);
    } else if (header.kind == KB_CREATE_VCPU && self->request_bytes == sizeof(struct kb_create)) {
        if (!worker_start(self))
            send_status(agent, &header, KB_NO_MEMORY);
    } else {
        size_t reply_bytes = serve(agent, self->request.bytes, self->request_bytes, &self->reply);
        if (header.kind == KB_KICK && self->request_bytes == sizeof(struct kb_handle))
            kick_again(agent, (const struct kb_handle *)self->request.bytes);
        else if (header.kind == KB_CLOSE)
            workers_sweep(agent);
        buffer_trim(&self->request);
        answer(agent, &header, &self->reply, reply_bytes);
    }
    return true;
}

/* What every thread does until it is to end; agent->lock held, and again on return. */
static void take_turns(struct worker *self)
{
    struct agent *agent = self->agent;

    for (;;) {
        while (!self->busy && !self->ending && agent->reader != self)
            pthread_cond_wait(&self->wake, &agent->lock);
        bool has_request = self->busy;
        if (!has_request && self->ending)
            return;
        pthread_mutex_unlock(&agent->lock);
        bool goes_on = true;
        if (has_request)
            serve_own(self);
        else
            goes_on = read_and_serve(self);
        pthread_mutex_lock(&agent->lock);
        if (!goes_on) {
            agent->reader = NULL;
            agent->main.ending = true;
            pthread_cond_signal(&agent->main.wake);
        }
    }
}

static void *work(void *argument)
{
    struct worker *self = argument;
    struct agent *agent = self->agent;

    pthread_mutex_lock(&agent->lock);
    take_turns(self);
    if (agent->reader == self)
        pass_reading(agent, &agent->main);
    struct worker **place = &agent->workers;
    while (*place != self)
        place = &(*place)->next;
    *place = self->next;
    pthread_cond_destroy(&self->wake);
    buffer_release(&self->request);
    buffer_release(&self->reply);
    free(self);
    pthread_mutex_unlock(&agent->lock);
    return NULL;
}

void serve_stream(struct agent *agent)
{
    core_on_overdue(agent->core, BRIEF_NS, on_overdue, agent);
    pthread_mutex_lock(&agent->lock);
    agent->reader = &agent->main;
    take_turns(&agent->main);
    pthread_mutex_unlock(&agent->lock);
    buffer_release(&agent->main.request);
    buffer_release(&agent->main.reply);
}

bool workers_end(struct agent *agent)
{
    for (int n = 0; n < END_TRIES; n++) {
        core_interrupt(agent->core);
        pthread_mutex_lock(&agent->lock);
        for (struct worker *worker = agent->workers; worker; worker = worker->next) {
            worker->ending = true;
            pthread_cond_signal(&worker->wake);
        }
        bool gone = agent->workers == NULL;
        pthread_mutex_unlock(&agent->lock);
        if (gone)
            return true;
        wait_1ms();
    }
    return false;
}
