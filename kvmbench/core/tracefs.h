/*
 * The kernel's own tracing, as far as a trace of ours uses it: a directory of its own below instances/ of
 * tracefs, so that nobody else's tracing is touched, with the trace clock `mono`, which is CLOCK_MONOTONIC.
 *
 * tracefs is used where it is mounted; where it is not, the core mounts it for itself alone (fsmount), which
 * nobody else sees.  Both take root.  A directory that a killed process left behind would go on tracing: whoever
 * opens the next one removes it (the kernel refuses while somebody has it open).
 */
#ifndef KVMBENCH_TRACEFS_H
#define KVMBENCH_TRACEFS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

struct tracefs {
    int root;       /* directory of tracefs, or -1 */
    int instances;  /* its directory, */
    int instance;   /* and ours therein */
    char name[64];  /* of ours; "": none was made */
    int *pipes;     /* trace_pipe_raw of each processor */
    int marker;     /* trace_marker, */
    int raw_marker; /* and trace_marker_raw */
    uint32_t cpus;
    uint32_t page_bytes;
};

#define TRACEFS_NONE                                                                               \
    {                                                                                              \
        .root = -1, .instances = -1, .instance = -1, .marker = -1, .raw_marker = -1                \
    }

/* Where opening came to an end. */
struct tracefs_trouble {
    int32_t status; /* -errno */
    uint32_t step;  /* enum kb_trace_step */
    uint32_t name;  /* KB_TRACE_STEP_EVENT: which */
};

/* Whether "system/event" is one that may be traced, and nothing but a name. */
bool tracefs_is_traced(const char *name, size_t bytes);
/* Likewise, whether its format may be read. */
bool tracefs_is_described(const char *name, size_t bytes);

/* Makes the directory, switched off, with these events ("system/name\n" each) enabled in it.
 * Returns false after telling why; *fs is as tracefs_close() leaves it then. */
bool tracefs_open(struct tracefs *fs, const char *names, size_t names_bytes, uint32_t buffer_kb, bool own_only,
                  bool *filtered, struct tracefs_trouble *trouble);
void tracefs_close(struct tracefs *fs);
int tracefs_set(struct tracefs *fs, bool on);

/* Only the root, to read what describes events: -errno or a descriptor that the caller closes. */
int tracefs_root(void);
/* A whole file below `directory`, or as much as there is room for: its size or -errno. */
ssize_t tracefs_read_file(int directory, const char *path, char *bytes, size_t room);

#endif
