/*
 * kvmbench-agent: the core behind a byte stream.
 *
 *     kvmbench-agent --stdio    requests on standard input, replies on standard output
 *     kvmbench-agent --fd N     both on the inherited descriptor N
 *     kvmbench-agent --tsc-khz  prints the rate of this machine's time stamp counter
 *
 * As process 1 of an appliance it takes no arguments; init.c makes the machine
 * ready and opens the channel.  The stream carries the messages of wire.h one
 * after the other and nothing else; when it ends, so does the agent, and with
 * it every machine.
 *
 * Threads.  One reads requests and serves those that belong to no vcpu.  Each
 * vcpu has a worker, which creates it (KVM wants a vcpu's ioctls on the thread
 * that created it) and serves its requests.  A worker takes one request at a
 * time: a second one meanwhile is answered KB_BUSY, as the core does, so that
 * nothing queues up.  Replies are written whole, under a lock, and a peer that
 * does not read them stops the reader in the end: memory stays bounded.
 */
#define _GNU_SOURCE
#include "core.h"
#include "init.h"
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* A buffer above this size goes back to the system once its reply is out. */
#define KEPT_BYTES ((size_t)16 << 20)
#define WORKER_STACK_BYTES ((size_t)256 << 10)
#define KICK_TRIES 1000 /* of 1 ms */
#define END_TRIES 2000  /* of 1 ms */

struct buffer {
    uint8_t *bytes;
    size_t room;
};

struct worker {
    struct agent *agent;
    struct worker *next;
    pthread_cond_t wake;
    uint32_t vcpu;          /* its handle; 0 until it is created */
    struct buffer request;  /* swapped with the reader's */
    size_t request_bytes;
    bool busy;              /* has a request that is not served yet */
    bool ending;
};

struct agent {
    struct core *core;
    int in, out;
    pthread_mutex_t out_lock; /* one reply at a time */
    pthread_mutex_t lock;     /* workers and what is in them */
    pthread_cond_t served;    /* a worker became idle, or left */
    struct worker *workers;
    const struct worker *starting; /* whose first request, a KB_CREATE_VCPU, is being served */
};

static void wait_1ms(void)
{
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Makes room for `bytes`; what the buffer held is lost. */
static bool buffer_reserve(struct buffer *buffer, size_t bytes)
{
    if (buffer->room >= bytes)
        return true;
    free(buffer->bytes);
    buffer->room = bytes < 4096 ? 4096 : bytes;
    buffer->bytes = malloc(buffer->room);
    if (!buffer->bytes)
        buffer->room = 0;
    return buffer->bytes != NULL;
}

static void buffer_release(struct buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct buffer){0};
}

static void buffer_trim(struct buffer *buffer)
{
    if (buffer->room > KEPT_BYTES)
        buffer_release(buffer);
}

/* Ends everything at once: the stream is gone, so nobody waits for a reply. */
static _Noreturn void leave(int status)
{
    if (getpid() == 1)
        init_end();
    _exit(status);
}

/* Reads exactly `bytes`; false when the stream ends first. */
static bool read_whole(int fd, void *to, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t got = read(fd, (uint8_t *)to + done, bytes - done);
        if (got < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (got <= 0)
            return false;
        done += (size_t)got;
    }
    return true;
}

static void send_reply(struct agent *agent, const void *reply, size_t bytes)
{
    pthread_mutex_lock(&agent->out_lock);
    for (size_t done = 0; done < bytes;) {
        ssize_t put = write(agent->out, (const uint8_t *)reply + done, bytes - done);
        if (put < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (put <= 0)
            leave(1);
        done += (size_t)put;
    }
    pthread_mutex_unlock(&agent->out_lock);
}

static void send_status(struct agent *agent, const struct kb_header *request, int32_t status)
{
    struct kb_header reply = {sizeof(reply), request->id, request->kind, status};
    send_reply(agent, &reply, sizeof(reply));
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

static void answer(struct agent *agent, const struct kb_header *request, const struct buffer *reply,
                   size_t reply_bytes)
{
    if (reply_bytes)
        send_reply(agent, reply->bytes, reply_bytes);
    else
        send_status(agent, request, KB_NO_MEMORY);
}

/* The handle of the vcpu that a KB_CREATE_VCPU made, or 0. */
static uint32_t created(const struct buffer *reply, size_t reply_bytes)
{
    const struct kb_handle_reply *made = (const struct kb_handle_reply *)reply->bytes;
    return reply_bytes >= sizeof(*made) && made->header.status == 0 ? made->handle : 0;
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct agent *agent = worker->agent;
    struct buffer reply = {0};

    pthread_mutex_lock(&agent->lock);
    for (;;) {
        while (!worker->busy && !worker->ending)
            pthread_cond_wait(&worker->wake, &agent->lock);
        if (!worker->busy)
            break;
        pthread_mutex_unlock(&agent->lock);

        const struct kb_header *request = (const struct kb_header *)worker->request.bytes;
        struct kb_header header = *request;
        size_t reply_bytes = serve(agent, request, worker->request_bytes, &reply);

        pthread_mutex_lock(&agent->lock);
        if (worker->vcpu == 0) {
            worker->vcpu = created(&reply, reply_bytes);
            worker->ending = worker->vcpu == 0;
            agent->starting = NULL;
        }
        /* Idle before the reply is out: who has it may send the next request at once. */
        worker->busy = false;
        pthread_cond_broadcast(&agent->served);
        pthread_mutex_unlock(&agent->lock);

        answer(agent, &header, &reply, reply_bytes);
        buffer_trim(&reply);
        pthread_mutex_lock(&agent->lock);
    }
    struct worker **place = &agent->workers;
    while (*place != worker)
        place = &(*place)->next;
    *place = worker->next;
    pthread_cond_destroy(&worker->wake);
    buffer_release(&worker->request);
    buffer_release(&reply);
    free(worker);
    pthread_cond_broadcast(&agent->served);
    pthread_mutex_unlock(&agent->lock);
    return NULL;
}

/* Gives the worker the request in `buffer`, and `buffer` the worker's old one; agent->lock held. */
static void hand_over(struct worker *worker, struct buffer *buffer, size_t request_bytes)
{
    struct buffer old = worker->request;

    worker->request = *buffer;
    worker->request_bytes = request_bytes;
    worker->busy = true;
    *buffer = old;
    pthread_cond_signal(&worker->wake);
}

static bool worker_start(struct agent *agent, struct buffer *buffer, size_t request_bytes)
{
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
        hand_over(worker, buffer, request_bytes);
        /* One at a time: a flood of failing requests must not become a flood of threads. */
        agent->starting = worker;
        while (agent->starting == worker) /* not worker->busy: it may be freed by then */
            pthread_cond_wait(&agent->served, &agent->lock);
    } else {
        pthread_cond_destroy(&worker->wake);
        free(worker);
    }
    pthread_mutex_unlock(&agent->lock);
    pthread_attr_destroy(&attributes);
    return started;
}

static struct worker *worker_of(struct agent *agent, uint32_t vcpu)
{
    struct worker *worker = agent->workers;
    while (worker && (worker->vcpu != vcpu || worker->ending))
        worker = worker->next;
    return worker;
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

/* Serves the request in `request`, or hands it over and takes another buffer in exchange. */
static void dispatch(struct agent *agent, struct buffer *request, size_t request_bytes, struct buffer *reply)
{
    const struct kb_header header = *(const struct kb_header *)request->bytes;
    uint32_t vcpu = core_vcpu_of(agent->core, request->bytes, request_bytes);

    if (vcpu) {
        pthread_mutex_lock(&agent->lock);
        struct worker *worker = worker_of(agent, vcpu);
        bool busy = !worker || worker->busy;
        if (!busy)
            hand_over(worker, request, request_bytes);
        pthread_mutex_unlock(&agent->lock);
        if (busy)
            send_status(agent, &header, KB_BUSY);
        return;
    }
    if (header.kind == KB_CREATE_VCPU && request_bytes == sizeof(struct kb_create)) {
        if (!worker_start(agent, request, request_bytes))
            send_status(agent, &header, KB_NO_MEMORY);
        return;
    }
    size_t reply_bytes = serve(agent, request->bytes, request_bytes, reply);
    if (header.kind == KB_KICK && request_bytes == sizeof(struct kb_handle))
        kick_again(agent, (const struct kb_handle *)request->bytes);
    else if (header.kind == KB_CLOSE)
        workers_sweep(agent);
    answer(agent, &header, reply, reply_bytes);
    buffer_trim(reply);
}

/* Reads and drops what there is no memory for, so that the next message is found. */
static bool discard(int fd, size_t bytes)
{
    uint8_t waste[4096];

    while (bytes) {
        size_t piece = bytes < sizeof(waste) ? bytes : sizeof(waste);
        if (!read_whole(fd, waste, piece))
            return false;
        bytes -= piece;
    }
    return true;
}

static void read_requests(struct agent *agent)
{
    struct buffer request = {0}, reply = {0};
    struct kb_header header;

    while (read_whole(agent->in, &header, sizeof(header))) {
        size_t bytes = header.size_bytes;
        if (bytes < sizeof(header) || bytes > KB_MAX_MESSAGE_BYTES) {
            /* Where the next message starts cannot be known any more. */
            send_status(agent, &header, KB_BAD_LENGTH);
            fprintf(stderr, "kvmbench-agent: a message of %zu bytes cannot be; the stream ends here\n", bytes);
            break;
        }
        if (!buffer_reserve(&request, bytes)) {
            if (!discard(agent->in, bytes - sizeof(header)))
                break;
            send_status(agent, &header, KB_NO_MEMORY);
            continue;
        }
        memcpy(request.bytes, &header, sizeof(header));
        if (!read_whole(agent->in, request.bytes + sizeof(header), bytes - sizeof(header)))
            break;
        dispatch(agent, &request, bytes, &reply);
        buffer_trim(&request);
    }
    buffer_release(&request);
    buffer_release(&reply);
}

/* Takes every vcpu out of the guest and sends its worker home; false if one will not go. */
static bool workers_end(struct agent *agent)
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

static int run(int in, int out)
{
    struct agent agent = {.in = in, .out = out};

    if (core_create(&agent.core) != 0) {
        fprintf(stderr, "kvmbench-agent: out of memory\n");
        return 1;
    }
    pthread_mutex_init(&agent.out_lock, NULL);
    pthread_mutex_init(&agent.lock, NULL);
    pthread_cond_init(&agent.served, NULL);
    read_requests(&agent);
    if (!workers_end(&agent))
        leave(1);
    core_destroy(agent.core);
    return 0;
}

/* Keeps descriptors 0 to 2 away from the stream, so that a stray line cannot get into it. */
static bool take_standard_streams(int *in, int *out)
{
    *in = fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3);
    *out = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3);
    int nothing = open("/dev/null", O_RDWR | O_CLOEXEC);
    if (*in < 0 || *out < 0 || nothing < 0)
        return false;
    return dup2(nothing, STDIN_FILENO) >= 0 && dup2(STDERR_FILENO, STDOUT_FILENO) >= 0;
}

/* The rate over 50 ms; a pause of the scheduler between the two readings of a pair only widens both. */
static long tsc_khz(void)
{
    struct timespec from, to;

    clock_gettime(CLOCK_MONOTONIC_RAW, &from);
    uint64_t first = __builtin_ia32_rdtsc();
    for (int n = 0; n < 50; n++)
        wait_1ms();
    clock_gettime(CLOCK_MONOTONIC_RAW, &to);
    uint64_t last = __builtin_ia32_rdtsc();
    double ns = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    return (long)((double)(last - first) / ns * 1e6 + 0.5);
}

int main(int argc, char **argv)
{
    int in = -1, out = -1;

    signal(SIGPIPE, SIG_IGN);
    if (getpid() == 1) {
        in = init_start();
        if (in >= 0)
            run(in, in);
        init_end();
    }
    if (argc == 2 && strcmp(argv[1], "--tsc-khz") == 0) {
        printf("%ld\n", tsc_khz());
        return 0;
    }
    if (argc == 2 && strcmp(argv[1], "--stdio") == 0) {
        if (!take_standard_streams(&in, &out)) {
            fprintf(stderr, "kvmbench-agent: no standard input or output: %s\n", strerror(errno));
            return 1;
        }
    } else if (argc == 3 && strcmp(argv[1], "--fd") == 0) {
        char *end;
        long number = strtol(argv[2], &end, 10);
        if (*argv[2] && !*end && number >= 0 && number < 1 << 20)
            in = out = (int)number;
    }
    if (in < 0) {
        fprintf(stderr, "usage: kvmbench-agent --stdio | --fd NUMBER | --tsc-khz\n");
        return 2;
    }
    return run(in, out);
}
