/*
 * What the files of the agent share: agent.c (the program), stream.c (messages
 * in and out), port.c (their way in and out of Bochs) and workers.c (the threads).
 *
 * Facts first (the appliance, QEMU without acceleration):
 *  - A step takes KVM some 50 us there, and a message there and back 130 us.
 *    Waking another thread, and being woken by it, takes 40 us more.
 *  - KVM wants a vcpu's ioctls on the thread that created it; to be called
 *    from another makes it wait for all processors.
 *
 * So each vcpu has a thread, and the thread that reads a request is, if it can
 * be, the one that serves it.  At any time one thread is the reader: the main
 * thread, or that of the vcpu that was stepped last.  What the reader does
 * with a request depends on whose it is:
 *  - of no vcpu (memory, a kick): it serves it;
 *  - of its own vcpu and brief (an ioctl, a few steps): it serves it and reads
 *    on.  Should that last after all (a HLT that waits for an interrupt), the
 *    core says so after BRIEF_NS, and the main thread takes over the reading;
 *  - of its own vcpu and not brief: the main thread takes over at once;
 *  - of another vcpu and brief: that one's thread gets both, request and reading;
 *  - of another vcpu and not brief: that one's thread gets the request.
 * The main thread never runs a guest, so there is always one that can read, and
 * what stops a guest is read at once, or within BRIEF_NS.
 *
 * A worker takes one request at a time: a second one meanwhile is answered
 * KB_BUSY, as the core does, so that nothing queues up.  Replies are written
 * whole, under a lock, and a peer that does not read them stops the reader in
 * the end: memory stays bounded.
 */
#ifndef KVMBENCH_AGENT_H
#define KVMBENCH_AGENT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "core.h"
#include "wire.h"

/* How long a brief request may keep the reader from reading. */
#define BRIEF_NS 20000000
#define AHEAD_BYTES 4096

struct buffer {
    uint8_t *bytes;
    size_t room;
};

/* A thread: the main one, or that of a vcpu. */
struct worker {
    struct agent *agent;
    struct worker *next;    /* in agent->workers, where the main one is not */
    pthread_cond_t wake;    /* it has a request, or is to read, or to end */
    uint32_t vcpu;          /* its handle; 0 until it is created, and of the main thread */
    struct buffer request;
    size_t request_bytes;
    struct buffer reply;
    bool busy;              /* has a request of its vcpu that is not served yet */
    bool ending;
};

struct agent {
    struct core *core;
    int in, out;
    bool by_port;               /* not over `in` and `out` but the ports of port.h */
    pthread_mutex_t out_lock;   /* one reply at a time */
    pthread_mutex_t lock;       /* what follows, and what is in workers */
    unsigned at_work;           /* workers whose request is not answered yet */
    pthread_cond_t answered;    /* `at_work` became less; its clock is CLOCK_MONOTONIC */
    pthread_cond_t started;     /* `starting` became NULL */
    struct worker main;
    struct worker *workers;
    struct worker *reader;      /* NULL once the stream has ended */
    const struct worker *starting; /* whose first request, a KB_CREATE_VCPU, is being served */

    /* Bytes read ahead, the reader's: a short message then costs one read(). */
    uint8_t ahead[AHEAD_BYTES];
    size_t ahead_from, ahead_to;
};

/* stream.c */

/* Makes room for `bytes`; what the buffer held is lost. */
bool buffer_reserve(struct buffer *buffer, size_t bytes);
void buffer_release(struct buffer *buffer);
/* Gives a large buffer back to the system. */
void buffer_trim(struct buffer *buffer);
/* The next message; returns its size, or 0 when there is no more.  For the reader. */
size_t read_message(struct agent *agent, struct buffer *message);
void send_reply(struct agent *agent, const void *reply, size_t bytes);
void send_status(struct agent *agent, const struct kb_header *request, int32_t status);

/* workers.c */

/* Serves the stream to its end, on this thread and those of the vcpus. */
void serve_stream(struct agent *agent);
/* Takes every vcpu out of the guest and sends its worker home; false if one will not go. */
bool workers_end(struct agent *agent);

/* False while a vcpu has a request that is not answered: emulated time must pass then. */
bool nobody_works(struct agent *agent);
/* Sleeps until a reply is out, but for a millisecond at most. */
void rest(struct agent *agent);

/* port.c */

/* 0, or a negative errno when there is no such channel. */
int port_open(void);
/* What there is to read, or nothing; with `wait` the machine stands still until there is something.
 * `room` is 4 at least.  -EPIPE at the end.  For the reader. */
int port_read(void *to, size_t room, bool wait, size_t *got);
void port_write(const void *from, size_t bytes);

/* agent.c */

/* Ends everything at once: the stream is gone, so nobody waits for a reply. */
_Noreturn void leave(int status);

#endif
