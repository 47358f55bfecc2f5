/*
 * Pages of the kernel's ring buffer into columns: where each event lies, when it happened, of which type it is.
 *
 * This is no message: it runs in the Python process, on bytes that came out of KB_TRACE_READ or out of a file, so
 * nothing about them is believed.  A page whose events run past its end is left there and counted as bad.
 *
 * The layout is that of events/header_page, and of the comments on `struct ring_buffer_event` in the kernel's
 * <linux/ring_buffer.h>: 5 bits of type or length, 27 bits of time since the event before.
 */
#include "walk.h"

#include <stdbool.h>
#include <string.h>

#define TYPE_BITS 5
#define TYPE_MASK 31u
#define TYPE_DATA_MAX 28u
#define TYPE_PADDING 29u
#define TYPE_TIME_EXTEND 30u
#define TYPE_TIME_STAMP 31u
#define TIME_SHIFT 27
#define TIME_STAMP_TOP 0xf800000000000000ull
/* In the page's size: events were lost before this page, and their number stands behind the data. */
#define SIZE_LOST (1ull << 31)
#define SIZE_LOST_COUNTED (1ull << 30)
#define SIZE_MASK 0xfffffull
#define ID_BYTES 2

static uint32_t load32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

static uint64_t load64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof(value));
    return value;
}

/* One page's events, of which `data` are the first of `size` bytes; false where they make no sense. */
static bool walk_page(struct core_walk *walk, const uint8_t *data, size_t size, uint64_t time)
{
    size_t at = 0;

    while (size - at >= 4) {
        uint32_t header = load32(data + at);
        uint32_t type = header & TYPE_MASK;
        uint64_t delta = header >> TYPE_BITS;
        size_t payload = at + 4, length = (size_t)type * 4;

        if (type == 0 || type >= TYPE_PADDING) {
            if (type == TYPE_PADDING && delta == 0)
                return true; /* nothing more in this page */
            if (size - at < 8)
                return false;
            uint32_t first = load32(data + at + 4);
            if (type == TYPE_TIME_EXTEND) {
                time += ((uint64_t)first << TIME_SHIFT) + delta;
            } else if (type == TYPE_TIME_STAMP) {
                time = (time & TIME_STAMP_TOP) | (((uint64_t)first << TIME_SHIFT) + delta);
            } else {
                /* The length counts the word that holds it. */
                length = first;
                payload = at + 8;
                if (length < 4 || length > size - at - 4)
                    return false;
                if (type == TYPE_PADDING) {
                    time += delta;
                    at += 4 + ((length + 3) & ~(size_t)3);
                    if (at > size)
                        return false;
                    continue;
                }
                length -= 4;
            }
            if (type != 0) {
                at += 8;
                continue;
            }
        }
        if (length < ID_BYTES || length > size - payload)
            return false;
        time += delta;
        if (walk->count >= walk->room)
            return false;
        size_t n = walk->count++;
        walk->time[n] = time;
        walk->offset[n] = (uint64_t)(data + payload - walk->pages);
        walk->length[n] = (uint32_t)length;
        memcpy(&walk->id[n], data + payload, ID_BYTES);
        at = payload + ((length + 3) & ~(size_t)3);
        if (at > size)
            return false;
    }
    return true;
}

int core_walk_pages(struct core_walk *walk)
{
    size_t head = walk->data_offset;

    if (walk->page_bytes < 32 || head < 16 || head > walk->page_bytes || walk->size_offset > head - 8)
        return -1;
    for (size_t from = 0; walk->bytes - from >= walk->page_bytes; from += walk->page_bytes) {
        const uint8_t *page = walk->pages + from;
        uint64_t time = load64(page);
        uint64_t raw_size = load64(page + walk->size_offset);
        size_t size = raw_size & SIZE_MASK, room = walk->page_bytes - head;

        if (raw_size & SIZE_LOST && walk->gaps < walk->gap_room) {
            bool counted = raw_size & SIZE_LOST_COUNTED && size <= room && room - size >= 8;
            walk->gap_time[walk->gaps] = time;
            walk->gap_lost[walk->gaps++] = counted ? load64(page + head + size) : 0;
        }
        if (size > room || !walk_page(walk, page + head, size, time))
            walk->bad++;
    }
    return 0;
}
