/*
 * Messages for the core that are nearly right.
 *
 * A message of purely random bytes is refused at the first look.  So each one
 * begins as a valid request of some kind about an object that is likely to be
 * there, and most are then damaged: bits, fields, handles, counts, lengths.
 * The same seed makes the same messages as long as the core's answers, which
 * decide which handles live, are the same.
 */
#ifndef KVMBENCH_TESTS_GENERATOR_H
#define KVMBENCH_TESTS_GENERATOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "wire.h"

#define MOST_MESSAGE_BYTES 8192
#define MOST_HANDLES 96

enum family { OF_SYSTEM, OF_VM, OF_VCPU, OF_REGION, OF_DEVICE, OF_STATS, OF_EVENTFD, OF_TRACE, OF_KERNEL, OF_NOTHING, FAMILIES };

struct generator {
    uint64_t random;
    uint32_t handles[FAMILIES][MOST_HANDLES]; /* OF_NOTHING: handles of closed objects */
    size_t count[FAMILIES];
    uint32_t parents[FAMILIES][MOST_HANDLES];
    uint32_t io_wanted; /* bytes that the last stop of any vcpu wants as its answer */
    uint32_t id;
    size_t planned;     /* messages of a machine that is being built up, still to come */
    bool whole_frames;  /* headers tell the true length, so that a stream goes on */
};

/* A generator for `seed` that knows the system's handle and no other. */
void generator_init(struct generator *g, uint64_t seed);

/* A number below `end`, which is not 0. */
uint64_t below(struct generator *g, uint64_t end);

/* Writes the next message, at most MOST_MESSAGE_BYTES; returns its size. */
size_t next_message(struct generator *g, uint8_t *message);

/* seeds.c: writes a valid request with its header's size and id still to be filled in. */
size_t valid_message(struct generator *g, uint8_t *message);

/* trace_seeds.c: likewise, about traces; and keeps a damaged one from a ring of a gigabyte. */
size_t trace_message(struct generator *g, uint8_t *message);
void trace_tame(uint8_t *message, size_t size);

/* kernel_seeds.c: likewise, about the host kernel's memory. */
size_t kernel_message(struct generator *g, uint8_t *message);

/* For seeds.c: chance, a number that tends to be at a limit, random bytes, and a handle that
 * is mostly of that family. */
bool one_in(struct generator *g, uint64_t n);
uint64_t odd_number(struct generator *g);
void scribble(struct generator *g, uint8_t *bytes, size_t count);
uint32_t pick(struct generator *g, enum family family);

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))

/* Learns from the reply to a message: handles that came and went, what a stop wants. */
void learn(struct generator *g, const uint8_t *message, const uint8_t *reply, size_t reply_bytes);

#endif
