/* See port.h. */
#define _GNU_SOURCE
#include "agent.h"
#include "port.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>

static uint32_t announced; /* bytes of KB_PORT_DATA not read yet */

static void words_in(void *to, size_t words)
{
    __asm__ volatile("rep insl" : "+D"(to), "+c"(words) : "d"(KB_PORT_DATA) : "memory");
}

static void words_out(const void *from, size_t words)
{
    __asm__ volatile("rep outsl" : "+S"(from), "+c"(words) : "d"(KB_PORT_DATA) : "memory");
}

int port_open(void)
{
    /* Not ioperm(): with it the kernel copies a bitmap at each switch to another thread. */
    if (iopl(3) < 0)
        return -errno;
    return inl(KB_PORT_MARK) == KB_PORT_PRESENT ? 0 : -ENODEV;
}

int port_read(void *to, size_t room, bool wait, size_t *got)
{
    *got = 0;
    if (!announced) {
        uint32_t bytes = inl(wait ? KB_PORT_WAIT : KB_PORT_LOOK);
        if (bytes > KB_PORT_MOST_BYTES)
            return -EPIPE;
        announced = bytes;
    }
    size_t bytes = announced <= room ? announced : room & ~(size_t)3;
    words_in(to, bytes / 4);
    if (bytes % 4) {
        uint32_t rest = inl(KB_PORT_DATA);
        memcpy((uint8_t *)to + bytes / 4 * 4, &rest, bytes % 4);
    }
    announced -= (uint32_t)bytes;
    *got = bytes;
    return 0;
}

void port_write(const void *from, size_t bytes)
{
    uint32_t rest = 0;

    memcpy(&rest, (const uint8_t *)from + bytes / 4 * 4, bytes % 4);
    outl((uint32_t)bytes, KB_PORT_LOOK);
    words_out(from, bytes / 4);
    if (bytes % 4)
        outl(rest, KB_PORT_DATA);
}
