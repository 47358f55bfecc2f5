/* Decoding the kernel's ring buffer; see walk.c. */
#ifndef KVMBENCH_WALK_H
#define KVMBENCH_WALK_H

#include <stddef.h>
#include <stdint.h>

struct core_walk {
    const uint8_t *pages; /* whole pages of one processor, one after the other */
    size_t bytes;
    size_t page_bytes;
    size_t size_offset;   /* of a page's size, 8 bytes, and of its events */
    size_t data_offset;
    size_t room;          /* of the four columns */
    uint64_t *time;
    uint64_t *offset;     /* of the payload, from `pages` on, */
    uint32_t *length;     /* its bytes, */
    uint16_t *id;         /* and its first two: the type of the event */
    size_t count;         /* events found so far */
    size_t gap_room;      /* of these two columns */
    uint64_t *gap_time;   /* of the page before which events were lost, */
    uint64_t *gap_lost;   /* and how many; 0: nobody knows */
    size_t gaps;
    size_t bad;           /* pages that made no sense from some point on */
};

/* 0, or -1 if the layout cannot be. */
int core_walk_pages(struct core_walk *walk);

#endif
