/* The agent's messages on their stream: one after the other, framed by kb_header.size_bytes. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A buffer above this size goes back to the system once its reply is out. */
#define KEPT_BYTES ((size_t)16 << 20)

bool buffer_reserve(struct buffer *buffer, size_t bytes)
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

void buffer_release(struct buffer *buffer)
{
    free(buffer->bytes);
    *buffer = (struct buffer){0};
}

void buffer_trim(struct buffer *buffer)
{
    if (buffer->room > KEPT_BYTES)
        buffer_release(buffer);
}

static bool read_port(struct agent *agent, void *to, size_t room, size_t *got)
{
    /* While a vcpu works, emulated time must go on: the agent looks now and then, and sleeps in between. */
    while (port_read(to, room, nobody_works(agent), got) == 0) {
        if (*got)
            return true;
        rest(agent);
    }
    return false;
}

/* Until there is something; false at the end of the stream. */
static bool read_some(struct agent *agent, void *to, size_t room, size_t *got)
{
    ssize_t bytes;

    if (agent->by_port)
        return read_port(agent, to, room, got);
    do
        bytes = read(agent->in, to, room);
    while (bytes < 0 && (errno == EINTR || errno == EAGAIN));
    *got = bytes > 0 ? (size_t)bytes : 0;
    return bytes > 0;
}

/* Reads exactly `bytes`; false when the stream ends first. */
static bool read_whole(struct agent *agent, void *to, size_t bytes)
{
    for (size_t done = 0; done < bytes;) {
        uint8_t *place = (uint8_t *)to + done;
        size_t wanted = bytes - done;
        size_t got = agent->ahead_to - agent->ahead_from;
        if (got) {
            if (got > wanted)
                got = wanted;
            memcpy(place, agent->ahead + agent->ahead_from, got);
            agent->ahead_from += got;
        } else if (wanted >= AHEAD_BYTES) {
            if (!read_some(agent, place, wanted, &got))
                return false;
        } else {
            agent->ahead_from = 0;
            if (!read_some(agent, agent->ahead, AHEAD_BYTES, &agent->ahead_to))
                return false;
            continue;
        }
        done += got;
    }
    return true;
}

/* Reads and drops what there is no memory for, so that the next message is found. */
static bool discard(struct agent *agent, size_t bytes)
{
    uint8_t waste[1024];

    while (bytes) {
        size_t piece = bytes < sizeof(waste) ? bytes : sizeof(waste);
        if (!read_whole(agent, waste, piece))
            return false;
        bytes -= piece;
    }
    return true;
}

size_t read_message(struct agent *agent, struct buffer *message)
{
    struct kb_header header;

    while (read_whole(agent, &header, sizeof(header))) {
        size_t bytes = header.size_bytes;
        if (bytes < sizeof(header) || bytes > KB_MAX_MESSAGE_BYTES) {
            /* Where the next message starts cannot be known any more. */
            send_status(agent, &header, KB_BAD_LENGTH);
            fprintf(stderr, "kvmbench-agent: a message of %zu bytes cannot be; the stream ends here\n", bytes);
            return 0;
        }
        if (!buffer_reserve(message, bytes)) {
            if (!discard(agent, bytes - sizeof(header)))
                return 0;
            send_status(agent, &header, KB_NO_MEMORY);
            continue;
        }
        memcpy(message->bytes, &header, sizeof(header));
        return read_whole(agent, message->bytes + sizeof(header), bytes - sizeof(header)) ? bytes : 0;
    }
    return 0;
}

void send_reply(struct agent *agent, const void *reply, size_t bytes)
{
    pthread_mutex_lock(&agent->out_lock);
    if (agent->by_port)
        port_write(reply, bytes);
    for (size_t done = agent->by_port ? bytes : 0; done < bytes;) {
        ssize_t put = write(agent->out, (const uint8_t *)reply + done, bytes - done);
        if (put < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (put <= 0)
            leave(1);
        done += (size_t)put;
    }
    pthread_mutex_unlock(&agent->out_lock);
}

void send_status(struct agent *agent, const struct kb_header *request, int32_t status)
{
    struct kb_header reply = {sizeof(reply), request->id, request->kind, status};
    send_reply(agent, &reply, sizeof(reply));
}
