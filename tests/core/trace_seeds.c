/* Valid requests about traces; see seeds.c. */
#include "generator.h"

#include <string.h>

#define LEAST_READ_BYTES 8192u

/* Names there are, and some that are none or may not be. */
static const char *const events[] = {
    "kvm/kvm_entry", "kvm/kvm_exit", "kvm/kvm_pio", "kvm/kvm_userspace_exit", "kvm/kvm_fpu", "sched/sched_switch",
    "kvm/nothing", "ftrace/print", "kvm/../../x", "kvm/", "/kvm_exit", "kvm", "", "net/netif_rx", "kvm/kvm_exit/enable",
};
#define TRUE_EVENTS 6

static const char *event(struct generator *g)
{
    return events[below(g, one_in(g, 8) ? COUNT_OF(events) : TRUE_EVENTS)];
}

static size_t open_trace(struct generator *g, uint8_t *message)
{
    struct kb_trace_open open = {
        .header.kind = KB_TRACE_OPEN,
        .vm = pick(g, OF_VM),
        .flags = KB_TRACE_LOG,
        .buffer_kb = 4,
        .log_rows = 16u << below(g, 6),
    };
    uint8_t *names = message + sizeof(open);

    /* A directory in tracefs takes tens of milliseconds, so it is rare. */
    if (one_in(g, 8)) {
        open.flags = KB_TRACE_EVENTS | (one_in(g, 2) ? KB_TRACE_LOG : 0) | (one_in(g, 2) ? KB_TRACE_OWN : 0);
        for (uint64_t n = below(g, 4); n < 4; n++) {
            const char *name = event(g);
            memcpy(names + open.names_bytes, name, strlen(name));
            open.names_bytes += (uint32_t)strlen(name);
            names[open.names_bytes++] = '\n';
        }
    }
    memcpy(message, &open, sizeof(open));
    return sizeof(open) + open.names_bytes;
}

static size_t text(struct generator *g, uint8_t *message)
{
    struct kb_trace_text text = {
        .header.kind = KB_TRACE_TEXT,
        .what = (uint32_t)(1 + below(g, 4)),
        .index = (uint32_t)below(g, 3),
    };
    const char *name = event(g);

    if (text.what == KB_TRACE_STATS)
        text.handle = pick(g, OF_TRACE);
    if (text.what == KB_TRACE_FORMAT)
        text.name_bytes = (uint32_t)strlen(name);
    memcpy(message, &text, sizeof(text));
    memcpy(message + sizeof(text), name, text.name_bytes);
    return sizeof(text) + text.name_bytes;
}

static size_t mark(struct generator *g, uint8_t *message)
{
    struct kb_trace_mark mark = {
        .header.kind = KB_TRACE_MARK, .handle = pick(g, OF_TRACE), .text_bytes = (uint32_t)below(g, KB_MAX_TRACE_MARK + 1),
    };
    memcpy(message, &mark, sizeof(mark));
    scribble(g, message + sizeof(mark), mark.text_bytes);
    return sizeof(mark) + mark.text_bytes;
}

size_t trace_message(struct generator *g, uint8_t *message)
{
    struct kb_trace_set set = {.header.kind = KB_TRACE_SET, .handle = pick(g, OF_TRACE), .on = !one_in(g, 4)};
    struct kb_trace_read read = {
        .header.kind = KB_TRACE_READ,
        .handle = set.handle,
        .max_bytes = one_in(g, 4) ? (uint32_t)below(g, LEAST_READ_BYTES) : LEAST_READ_BYTES * 4,
    };
    struct kb_handle close = {.header.kind = KB_CLOSE, .handle = set.handle};

    if (!g->count[OF_TRACE] && !one_in(g, 4))
        return open_trace(g, message);
    switch (below(g, 16)) {
    case 0:
    case 1:
        return open_trace(g, message);
    case 2:
        memcpy(message, &close, sizeof(close));
        return sizeof(close);
    case 3:
    case 4:
        return text(g, message);
    case 5:
    case 6:
        return mark(g, message);
    case 7:
    case 8:
    case 9:
    case 10:
        memcpy(message, &set, sizeof(set));
        return sizeof(set);
    default:
        memcpy(message, &read, sizeof(read));
        return sizeof(read);
    }
}

void trace_tame(uint8_t *message, size_t size)
{
    struct kb_trace_open open;

    if (size < sizeof(open))
        return;
    memcpy(&open, message, sizeof(open));
    if (open.buffer_kb > 64 && open.buffer_kb <= KB_MAX_TRACE_BUFFER_KB)
        open.buffer_kb = 64;
    memcpy(message, &open, sizeof(open));
}
