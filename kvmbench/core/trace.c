/* Traces: their messages, and the logs of the vcpus.  See trace.h. */
#define _GNU_SOURCE
#include "trace.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

/* A raw mark that says which vcpu a thread runs: the kernel knows threads by numbers that may not be ours. */
struct thread_mark {
    uint32_t magic;
    uint32_t thread;
    uint32_t vcpu;
    uint32_t reserved;
};
#define THREAD_MARK_MAGIC 0x6d62766bu /* "kvbm" */

#define LOG_ROWS_LEAST 16

/* The kernel's trace gets to know this thread as the vcpu's; trace->lock held. */
static void mark_thread(struct trace *trace, struct run_log *log, struct vcpu *vcpu)
{
    struct thread_mark mark = {THREAD_MARK_MAGIC, (uint32_t)vcpu->thread, vcpu->object.handle, 0};

    log->marked = vcpu->thread;
    /* If it cannot be written, the log's times tell the thread, though not by the kernel's number. */
    if (trace->has_events && trace->fs.raw_marker >= 0 &&
        write(trace->fs.raw_marker, &mark, sizeof(mark)) != (ssize_t)sizeof(mark))
        log->marked = 0;
}

static struct run_log *make_log(struct trace *trace, struct vcpu *vcpu)
{
    struct run_log *log = calloc(1, sizeof(*log) + trace->log_rows * sizeof(log->row[0]));

    if (!log)
        return NULL;
    atomic_store(&log->users, 2);
    log->vcpu = vcpu->object.handle;
    log->rows = trace->log_rows;
    log->next = trace->logs;
    trace->logs = log;
    return log;
}

struct run_log *trace_log_of(struct vcpu *vcpu)
{
    struct run_log *log = vcpu->log;

    if (log && !atomic_load_explicit(&log->ended, memory_order_relaxed) && log->marked == vcpu->thread)
        return log;
    if (log && atomic_load(&log->ended)) {
        run_log_put(log);
        log = vcpu->log = NULL;
    }
    struct vm *vm = vcpu->object.vm;
    pthread_mutex_lock(&vm->lock);
    struct trace *trace = vm->trace;
    if (trace)
        atomic_fetch_add(&trace->object.users, 1);
    pthread_mutex_unlock(&vm->lock);
    if (!trace)
        return log;
    pthread_mutex_lock(&trace->lock);
    if (!trace->closed) {
        if (!log)
            log = vcpu->log = make_log(trace, vcpu);
        if (log)
            mark_thread(trace, log, vcpu);
    }
    pthread_mutex_unlock(&trace->lock);
    object_put(&trace->object);
    return log;
}

void trace_close(struct trace *trace)
{
    struct vm *vm = trace->object.vm;

    pthread_mutex_lock(&trace->lock);
    trace->closed = true;
    /* Within the other lock, or a KB_TRACE_SET could still switch on what belongs to nobody, or to the next trace. */
    pthread_mutex_lock(&vm->lock);
    if (vm->trace == trace) {
        vm->trace = NULL;
        atomic_store(&vm->traced, false);
    }
    pthread_mutex_unlock(&vm->lock);
    struct run_log *log = trace->logs;
    trace->logs = NULL;
    while (log) {
        struct run_log *next = log->next;
        atomic_store(&log->ended, true);
        run_log_put(log);
        log = next;
    }
    if (trace->has_events)
        tracefs_close(&trace->fs);
    trace->has_events = false;
    pthread_mutex_unlock(&trace->lock);
}

void trace_free(struct trace *trace)
{
    pthread_mutex_destroy(&trace->lock);
    free(trace);
}

static struct trace *trace_get(struct exchange *x, uint32_t handle)
{
    struct trace *trace = (struct trace *)object_get(x->core, handle, SORT_TRACE);

    if (!trace)
        return NULL;
    pthread_mutex_lock(&trace->lock);
    if (!trace->closed)
        return trace;
    pthread_mutex_unlock(&trace->lock);
    object_put(&trace->object);
    return NULL;
}

static void trace_put(struct trace *trace)
{
    pthread_mutex_unlock(&trace->lock);
    object_put(&trace->object);
}

/* Whether these are names of events that may be traced, a line each. */
static bool names_are_sound(const char *names, size_t bytes)
{
    for (const char *name = names, *end = names + bytes; name < end;) {
        const char *stop = memchr(name, '\n', (size_t)(end - name));
        if (!stop || !tracefs_is_traced(name, (size_t)(stop - name)))
            return false;
        name = stop + 1;
    }
    return true;
}

static int check_open(const struct exchange *x)
{
    const struct kb_trace_open *request = (const struct kb_trace_open *)x->request;

    if (x->capacity < sizeof(struct kb_trace_open_reply))
        return KB_TOO_LARGE;
    if (x->request_bytes - sizeof(*request) != request->names_bytes || request->names_bytes > KB_MAX_TRACE_NAMES)
        return KB_BAD_LENGTH;
    if (!request->flags || request->flags & ~(uint32_t)(KB_TRACE_LOG | KB_TRACE_EVENTS | KB_TRACE_OWN) ||
        request->buffer_kb > KB_MAX_TRACE_BUFFER_KB || request->reserved)
        return KB_BAD_VALUE;
    if (request->flags & KB_TRACE_EVENTS && !request->buffer_kb)
        return KB_BAD_VALUE;
    if (request->flags & KB_TRACE_LOG && (request->log_rows < LOG_ROWS_LEAST || request->log_rows > KB_MAX_TRACE_LOG_ROWS ||
                                          request->log_rows & (request->log_rows - 1)))
        return KB_BAD_VALUE;
    return names_are_sound((const char *)(request + 1), request->names_bytes) ? 0 : KB_NOT_ALLOWED;
}

/* Makes the trace the VM's one; KB_BUSY if it has another. */
static int take_vm(struct vm *vm, struct trace *trace)
{
    pthread_mutex_lock(&vm->lock);
    int status = vm->trace ? KB_BUSY : 0;
    if (status == 0)
        vm->trace = trace;
    pthread_mutex_unlock(&vm->lock);
    return status;
}

int trace_open(struct exchange *x)
{
    const struct kb_trace_open *request = (const struct kb_trace_open *)x->request;
    struct kb_trace_open_reply *reply = (struct kb_trace_open_reply *)x->reply;
    struct tracefs_trouble trouble = {0};
    bool filtered = false;

    int status = check_open(x);
    if (status != 0)
        return status;
    struct vm *vm = (struct vm *)object_get(x->core, request->vm, SORT_VM);
    if (!vm)
        return KB_BAD_HANDLE;
    struct trace *trace = calloc(1, sizeof(*trace));
    if (!trace) {
        object_put(&vm->object);
        return KB_NO_MEMORY;
    }
    trace->object.sort = SORT_TRACE;
    trace->object.core = x->core;
    trace->object.fd = -1;
    trace->object.vm = vm; /* takes over the hold */
    atomic_store(&trace->object.users, 1);
    pthread_mutex_init(&trace->lock, NULL);
    trace->flags = request->flags;
    /* Without a log, a vcpu's thread is marked all the same. */
    trace->log_rows = request->flags & KB_TRACE_LOG ? request->log_rows : 0;
    status = take_vm(vm, trace);
    if (status == 0) {
        if (request->flags & KB_TRACE_EVENTS)
            trace->has_events = tracefs_open(&trace->fs, (const char *)(request + 1), request->names_bytes,
                                             request->buffer_kb, request->flags & KB_TRACE_OWN, &filtered, &trouble);
        status = object_publish(x->core, &trace->object);
    }
    if (status != 0) {
        trace_close(trace);
        object_put(&trace->object);
        return status;
    }
    reply->handle = trace->object.handle;
    reply->events_status = trouble.status;
    reply->step = trouble.step;
    reply->cpus = trace->has_events ? trace->fs.cpus : trouble.name;
    reply->page_bytes = trace->has_events ? trace->fs.page_bytes : 0;
    reply->filtered = filtered;
    x->reply_bytes = sizeof(*reply);
    return 0;
}

/* The KVM_RUNs under way began unnoticed, and may last: they end, and the next ones are noted. */
static void nudge_all(struct core *core, const struct vm *vm)
{
    for (uint32_t index = 2; index < KB_MAX_OBJECTS; index++) {
        pthread_mutex_lock(&core->lock);
        struct object *object = core->table[index];
        bool is_ours = object && object->sort == SORT_VCPU && object->vm == vm;
        if (is_ours)
            atomic_fetch_add(&object->users, 1);
        pthread_mutex_unlock(&core->lock);
        if (is_ours) {
            vcpu_nudge((struct vcpu *)object);
            object_put(object);
        }
    }
}

int trace_set(struct exchange *x)
{
    const struct kb_trace_set *request = (const struct kb_trace_set *)x->request;

    if (request->on > 1)
        return KB_BAD_VALUE;
    struct trace *trace = trace_get(x, request->handle);
    if (!trace)
        return KB_BAD_HANDLE;
    /* Events first and last, so that a KVM_RUN that is noted has its events, too. */
    if (!request->on)
        atomic_store(&trace->object.vm->traced, false);
    int status = trace->has_events ? tracefs_set(&trace->fs, request->on) : 0;
    if (status == 0) {
        atomic_store(&trace->object.vm->traced, request->on);
        if (request->on)
            nudge_all(x->core, trace->object.vm);
    }
    trace_put(trace);
    return status;
}

/* The lines of available_events, "system:name", that may be traced, as "system/name". */
static size_t keep_traced(char *text, size_t bytes)
{
    size_t kept = 0;

    for (size_t from = 0; from < bytes;) {
        const char *stop = memchr(text + from, '\n', bytes - from);
        size_t length = stop ? (size_t)(stop - (text + from)) : bytes - from;
        char *colon = memchr(text + from, ':', length);
        if (colon)
            *colon = '/';
        if (stop && tracefs_is_traced(text + from, length)) {
            memmove(text + kept, text + from, length + 1);
            kept += length + 1;
        }
        from += length + 1;
    }
    return kept;
}

static int read_description(struct exchange *x, uint32_t what, const char *name, size_t name_bytes)
{
    char path[256];
    char *text = (char *)x->reply + sizeof(struct kb_header);
    size_t room = x->capacity - sizeof(struct kb_header);

    if (what == KB_TRACE_FORMAT) {
        if (!tracefs_is_described(name, name_bytes))
            return KB_NOT_ALLOWED;
        snprintf(path, sizeof(path), "events/%.*s/format", (int)name_bytes, name);
    } else {
        snprintf(path, sizeof(path), "%s", what == KB_TRACE_HEADER ? "events/header_page" : "available_events");
    }
    int root = tracefs_root();
    if (root < 0)
        return root;
    ssize_t n = tracefs_read_file(root, path, text, room);
    close(root);
    if (n < 0)
        return (int)n;
    x->reply_bytes += what == KB_TRACE_AVAILABLE ? keep_traced(text, (size_t)n) : (size_t)n;
    return 0;
}

int trace_text(struct exchange *x)
{
    const struct kb_trace_text *request = (const struct kb_trace_text *)x->request;
    const char *name = (const char *)(request + 1);
    char path[64];

    if (x->request_bytes - sizeof(*request) != request->name_bytes)
        return KB_BAD_LENGTH;
    if (request->what < KB_TRACE_AVAILABLE || request->what > KB_TRACE_STATS)
        return KB_BAD_VALUE;
    if (request->what != KB_TRACE_STATS)
        return read_description(x, request->what, name, request->name_bytes);
    struct trace *trace = trace_get(x, request->handle);
    if (!trace)
        return KB_BAD_HANDLE;
    int status = trace->has_events && request->index < trace->fs.cpus ? 0 : KB_BAD_RANGE;
    if (status == 0) {
        snprintf(path, sizeof(path), "per_cpu/cpu%u/stats", request->index);
        ssize_t n = tracefs_read_file(trace->fs.instance, path, (char *)x->reply + sizeof(struct kb_header),
                                      x->capacity - sizeof(struct kb_header));
        if (n < 0)
            status = (int)n;
        else
            x->reply_bytes += (size_t)n;
    }
    trace_put(trace);
    return status;
}

size_t trace_read_room(const struct kb_trace_read *request)
{
    size_t wanted = request->max_bytes < KB_MAX_MESSAGE_BYTES / 2 ? request->max_bytes : KB_MAX_MESSAGE_BYTES / 2;
    return sizeof(struct kb_trace_read_reply) + wanted;
}

/* A chunk that is being put together. */
struct filling {
    struct exchange *x;
    size_t end; /* of the room */
};

static struct kb_trace_chunk *begin_chunk(struct filling *f, uint32_t sort, uint32_t index)
{
    if (f->end - f->x->reply_bytes < sizeof(struct kb_trace_chunk))
        return NULL;
    struct kb_trace_chunk *chunk = (struct kb_trace_chunk *)(f->x->reply + f->x->reply_bytes);
    *chunk = (struct kb_trace_chunk){.sort = sort, .index = index};
    return chunk;
}

static void end_chunk(struct filling *f, struct kb_trace_chunk *chunk)
{
    struct kb_trace_read_reply *reply = (struct kb_trace_read_reply *)f->x->reply;

    /* Rows are a multiple of 8 bytes, and so are pages. */
    f->x->reply_bytes += sizeof(*chunk) + chunk->bytes;
    reply->n_chunks++;
}

/* Pages of one processor; 0, or -errno where the ring cannot be read. */
static int read_pages(struct trace *trace, struct filling *f, uint32_t cpu, bool *more)
{
    uint32_t page = trace->fs.page_bytes;
    struct kb_trace_chunk *chunk = begin_chunk(f, KB_TRACE_CHUNK_PAGE, cpu);

    for (;;) {
        size_t used = sizeof(*chunk) + (chunk ? chunk->bytes : 0);
        if (!chunk || f->end - f->x->reply_bytes < used + page) {
            *more = true;
            break;
        }
        uint8_t *at = (uint8_t *)(chunk + 1) + chunk->bytes;
        ssize_t n = read(trace->fs.pipes[cpu], at, page);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno != EAGAIN)
            return -errno;
        if (n <= 0)
            break;
        /* A short page says itself how much of it holds. */
        memset(at + n, 0, page - (size_t)n);
        chunk->bytes += page;
    }
    if (chunk && chunk->bytes)
        end_chunk(f, chunk);
    return 0;
}

int trace_read(struct exchange *x)
{
    const struct kb_trace_read *request = (const struct kb_trace_read *)x->request;
    struct kb_trace_read_reply *reply = (struct kb_trace_read_reply *)x->reply;
    bool more = false;
    int status = 0;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct trace *trace = trace_get(x, request->handle);
    if (!trace)
        return KB_BAD_HANDLE;
    size_t room = trace_read_room(request);
    struct filling f = {x, room < x->capacity ? room : x->capacity};
    reply->n_chunks = 0;
    x->reply_bytes = sizeof(*reply);
    for (struct run_log *log = trace->logs; log; log = log->next) {
        bool rest = true;
        struct kb_trace_chunk *chunk = begin_chunk(&f, KB_TRACE_CHUNK_LOG, log->vcpu);
        if (chunk) {
            /* Events must have their part of the room. */
            size_t left = (f.end - x->reply_bytes - sizeof(*chunk)) / (trace->has_events ? 2 : 1);
            chunk->bytes = run_log_take(log, (uint8_t *)(chunk + 1), left, &chunk->lost, &rest);
            if (chunk->bytes || chunk->lost)
                end_chunk(&f, chunk);
        }
        more |= rest;
    }
    for (uint32_t n = 0; trace->has_events && n < trace->fs.cpus && status == 0; n++) {
        uint32_t cpu = (trace->next_cpu + n) % trace->fs.cpus;
        if (trace->fs.pipes[cpu] >= 0)
            status = read_pages(trace, &f, cpu, &more);
    }
    if (trace->has_events)
        trace->next_cpu = (trace->next_cpu + 1) % trace->fs.cpus;
    /* What was taken out of a ring is gone from there, so it is told; the next reading fails in turn. */
    if (reply->n_chunks)
        status = 0;
    reply->more = more;
    trace_put(trace);
    return status;
}

int trace_mark(struct exchange *x)
{
    const struct kb_trace_mark *request = (const struct kb_trace_mark *)x->request;
    struct kb_trace_mark_reply *reply = (struct kb_trace_mark_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    if (x->request_bytes - sizeof(*request) != request->text_bytes || request->text_bytes > KB_MAX_TRACE_MARK)
        return KB_BAD_LENGTH;
    struct trace *trace = trace_get(x, request->handle);
    if (!trace)
        return KB_BAD_HANDLE;
    reply->events_status = -ENOENT;
    reply->reserved = 0;
    reply->before_ns = now_ns();
    if (trace->has_events && trace->fs.marker >= 0) {
        ssize_t n = write(trace->fs.marker, request + 1, request->text_bytes);
        reply->events_status = n < 0 ? -errno : 0;
    }
    reply->after_ns = now_ns();
    trace_put(trace);
    x->reply_bytes = sizeof(*reply);
    return 0;
}
