"""Builds the C core into the Python extension ``kvmbench.core._core`` (cffi, API mode).

setuptools calls it through ``cffi_modules``.  The limited API keeps one built
file good for every CPython from 3.11 on.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).parent

SOURCES = (
    "arrive.c",
    "coalesced.c",
    "core.c",
    "device.c",
    "dispatch.c",
    "eventfd.c",
    "execute.c",
    "handlers.c",
    "info.c",
    "ioctl_special.c",
    "ioctls.c",
    "kernel.c",
    "lockstep.c",
    "loop.c",
    "memory.c",
    "peek.c",
    "raw_loop.c",
    "report.c",
    "run_log.c",
    "step.c",
    "trace.c",
    "tracefs.c",
    "trap_flag.c",
    "vcpu.c",
    "vm.c",
    "walk.c",
    "watches.c",
)

ffibuilder = FFI()
ffibuilder.cdef("""
    struct core;
    int core_create(struct core **out);
    void core_destroy(struct core *core);
    void core_interrupt(struct core *core);
    int core_call(struct core *core, const void *request, size_t request_bytes,
                  void *reply, size_t reply_capacity, size_t *reply_bytes);
    struct core_again {
        struct core *core;
        const void *request;
        size_t request_bytes;
        void *reply;
        size_t reply_capacity;
        size_t reply_bytes;
    };
    int core_again(struct core_again *again);
    size_t core_reply_bytes(struct core *core, const void *request, size_t request_bytes);
    int core_map(struct core *core, uint32_t region, void **address, size_t *size_bytes,
                 void **token);
    void core_unmap(void *token);
    struct core_walk {
        const uint8_t *pages;
        size_t bytes;
        size_t page_bytes;
        size_t size_offset;
        size_t data_offset;
        size_t room;
        uint64_t *time;
        uint64_t *offset;
        uint32_t *length;
        uint16_t *id;
        size_t count;
        size_t gap_room;
        uint64_t *gap_time;
        uint64_t *gap_lost;
        size_t gaps;
        size_t bad;
    };
    int core_walk_pages(struct core_walk *walk);
""")
ffibuilder.set_source(
    "kvmbench.core._core",
    '#include "core.h"\n#include "walk.h"',
    # setuptools wants paths relative to the project's root.
    sources=[f"kvmbench/core/{name}" for name in SOURCES],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
