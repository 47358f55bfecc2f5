/*
 * One ioctl under way: what the table (ioctls.c) and the functions for the
 * arguments that it cannot describe (ioctl_special.c) share.
 *
 * A function that serves a call checks the bytes that came, builds the
 * argument, issues the ioctl and stores what it answers.  It returns 0, an enum
 * kb_status or -errno.
 */
#ifndef KVMBENCH_IOCTL_CALL_H
#define KVMBENCH_IOCTL_CALL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "ioctls.h"

/* One call, as core_ioctl() got it, and what it has come to. */
struct call {
    int fd;
    enum ioctl_scope scope;
    struct vm *vm; /* or NULL */
    uint32_t request;
    uint64_t value;
    const uint8_t *in;
    size_t in_bytes;
    uint8_t *out;
    size_t out_capacity;
    uint32_t wanted;
    size_t out_bytes;
    int32_t result;
};

/* The ioctl itself; `argument` points into this process or is a checked number. */
int ioctl_issue(struct call *call, void *argument);

/* Bytes of a message and of a reply may have any alignment. */
static inline uint32_t load_u32(const uint8_t *bytes)
{
    uint32_t value;

    memcpy(&value, bytes, sizeof(value));
    return value;
}

static inline void store_u32(uint8_t *bytes, uint32_t value)
{
    memcpy(bytes, &value, sizeof(value));
}

/* ioctl_special.c */
int serve_device_attr(struct call *call);
int serve_enable_cap(struct call *call);
int serve_signal_mask(struct call *call);
int serve_get_xsave2(struct call *call);
int serve_set_xsave(struct call *call);
int serve_get_nested_state(struct call *call);
int serve_set_nested_state(struct call *call);
int serve_msr_filter(struct call *call);
int serve_ioeventfd(struct call *call);
int serve_irqfd(struct call *call);

#endif
