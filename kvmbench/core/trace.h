/* A trace of a VM: its log and its events.  The messages KB_TRACE_* are served here; see wire.h. */
#ifndef KVMBENCH_TRACE_H
#define KVMBENCH_TRACE_H

#include "internal.h"
#include "run_log.h"
#include "tracefs.h"

struct trace {
    struct object object;
    pthread_mutex_t lock; /* what follows */
    bool closed;
    uint32_t flags;
    uint32_t log_rows;
    struct run_log *logs;
    bool has_events;
    struct tracefs fs;
    uint32_t next_cpu; /* whose ring is read first, so that none starves */
};

/* The log that the vcpu's next row goes into, or NULL; on the vcpu's thread. */
struct run_log *trace_log_of(struct vcpu *vcpu);
/* Ends it: nothing is written any more, its directory is gone. */
void trace_close(struct trace *trace);
void trace_free(struct trace *trace);

int trace_open(struct exchange *x);
int trace_text(struct exchange *x);
int trace_set(struct exchange *x);
int trace_read(struct exchange *x);
int trace_mark(struct exchange *x);
size_t trace_read_room(const struct kb_trace_read *request);

#endif
