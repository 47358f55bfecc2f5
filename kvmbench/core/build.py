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
    "core.c",
    "device.c",
    "execute.c",
    "handlers.c",
    "info.c",
    "ioctls.c",
    "lockstep.c",
    "loop.c",
    "memory.c",
    "peek.c",
    "raw_loop.c",
    "report.c",
    "step.c",
    "trap_flag.c",
    "vcpu.c",
    "vm.c",
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
""")
ffibuilder.set_source(
    "kvmbench.core._core",
    '#include "core.h"',
    # setuptools wants paths relative to the project's root.
    sources=[f"kvmbench/core/{name}" for name in SOURCES],
    include_dirs=[str(HERE)],
    extra_compile_args=["-std=c11", "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter"],
    py_limited_api=True,
)

if __name__ == "__main__":
    ffibuilder.compile(verbose=True)
