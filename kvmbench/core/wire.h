/*
 * The messages between Python and the core: every request and every reply.
 *
 * A request is one of the structs below, a reply another; both begin with
 * struct kb_header and may be followed by a payload.  In the Python process
 * the bytes are handed to core_call() where they lie; for every other host
 * the same bytes travel over a byte stream to kvmbench-agent, one message
 * after the other, framed by kb_header.size_bytes.
 *
 * Rules that both sides keep:
 *  - little-endian, fixed-width types only, natural alignment, no pointers;
 *  - a handle names an object the core owns (system, VM, vcpu, region,
 *    device, statistics file, eventfd); handle 1 is the system;
 *  - every length in a request is checked against the bytes received and
 *    every handle, offset and count against the object before any use;
 *  - a request that cannot be served gets a reply that is a bare header
 *    with status != 0; the core's state is then as it was before.
 *
 * The file is read by two compilers: the C compiler, and the generator of
 * kvmbench/core/_wire.py.  It therefore holds only #define NAME NUMBER,
 * enums and structs.
 */
#ifndef KVMBENCH_WIRE_H
#define KVMBENCH_WIRE_H

#include <stdint.h>

#define KB_WIRE_VERSION 4
#define KB_SYSTEM_HANDLE 1
#define KB_MAX_MESSAGE_BYTES 67108864 /* 64 MiB; longer transfers are split */
#define KB_MAX_STEPS_ROWS 262144      /* rows that one reply may hold */
#define KB_MAX_STOPS 1024             /* addresses compared by the stepping loop */
#define KB_MAX_WATCHES 64             /* ranges compared by the stepping loop */
#define KB_MAX_WATCH_BYTES 4096       /* bytes of all such ranges together */
#define KB_PACKED_ROW_BYTES 156       /* a packed row at its largest: a mask and every column */
#define KB_COLUMNS 19                 /* 64-bit columns of a kb_row */
#define KB_MAX_LOCKSTEP_VCPUS 64      /* vcpus that one KB_LOCKSTEP may step */
#define KB_HISTORY 8                  /* handlers entered that a kb_history tells */
#define KB_MAX_TRACE_NAMES 16384      /* bytes of the names of a trace's events */
#define KB_MAX_TRACE_BUFFER_KB 1048576 /* a processor's ring buffer */
#define KB_MAX_TRACE_LOG_ROWS 16777216 /* a vcpu's log */
#define KB_MAX_TRACE_TEXT 1048576     /* bytes of a file of tracefs */
#define KB_MAX_TRACE_MARK 1024        /* bytes of a mark */
#define KB_MAX_KERNEL_BYTES 33554432  /* of the kernel's memory or BTF in one reply */
#define KB_RUN_BYTES 288              /* kvm_run up to the end of its exit union */

/* What a request asks for; the reply carries the same number. */
enum kb_kind {
    KB_HELLO = 1,          /* kb_header                -> kb_hello_reply */
    KB_HOST_INFO = 2,      /* kb_header                -> kb_header + "key=value\n" lines */
    KB_CREATE_VM = 3,      /* kb_create                -> kb_handle_reply */
    KB_CREATE_VCPU = 4,    /* kb_create                -> kb_handle_reply */
    KB_CREATE_DEVICE = 5,  /* kb_create                -> kb_handle_reply */
    KB_OPEN_STATS = 6,     /* kb_create                -> kb_handle_reply */
    KB_READ_STATS = 7,     /* kb_range                 -> kb_header + bytes */
    KB_CLOSE = 8,          /* kb_handle                -> kb_header */
    KB_IOCTL = 9,          /* kb_ioctl + argument      -> kb_ioctl_reply + argument */
    KB_ADD_REGION = 10,    /* kb_add_region            -> kb_handle_reply */
    KB_SET_REGION = 11,    /* kb_set_region            -> kb_header */
    KB_READ_REGION = 12,   /* kb_range                 -> kb_header + bytes */
    KB_WRITE_REGION = 13,  /* kb_range + bytes         -> kb_header */
    KB_DIRTY_LOG = 14,     /* kb_handle                -> kb_header + bitmap, 1 bit a page */
    KB_PROTECT = 15,       /* kb_protect               -> kb_header */
    KB_EXECUTE = 16,       /* kb_execute + payload     -> kb_stop + payload */
    KB_KICK = 17,          /* kb_handle                -> kb_header; stops a running vcpu */
    KB_FILL_REGION = 18,   /* kb_fill                  -> kb_header */
    KB_RAW_LOOP = 19,      /* kb_raw_loop              -> kb_raw_loop_reply; for benchmarks */
    KB_LOCKSTEP = 20,      /* kb_lockstep + payload    -> kb_lockstep_reply + payload */
    KB_TRACE_OPEN = 21,    /* kb_trace_open + names    -> kb_trace_open_reply */
    KB_TRACE_TEXT = 22,    /* kb_trace_text + name     -> kb_header + text of tracefs */
    KB_TRACE_SET = 23,     /* kb_trace_set             -> kb_header; starts or stops a trace */
    KB_TRACE_READ = 24,    /* kb_trace_read            -> kb_trace_read_reply + chunks */
    KB_TRACE_MARK = 25,    /* kb_trace_mark + text     -> kb_trace_mark_reply */
    KB_CREATE_EVENTFD = 26, /* kb_create               -> kb_handle_reply */
    KB_READ_EVENTFD = 27,  /* kb_handle                -> kb_eventfd_reply */
    KB_WRITE_EVENTFD = 28, /* kb_eventfd               -> kb_header */
    KB_TAKE_COALESCED = 29, /* kb_handle of a vcpu     -> kb_coalesced_reply + kvm_coalesced_mmio */
    KB_KERNEL_OPEN = 30,   /* kb_header                -> kb_handle_reply */
    KB_KERNEL_TEXT = 31,   /* kb_kernel_text + name    -> kb_header + bytes */
    KB_KERNEL_READ = 32,   /* kb_kernel_read + ranges  -> kb_header + kb_kernel_got + bytes */
    KB_KERNEL_LIST = 33,   /* kb_kernel_list           -> kb_kernel_list_reply + objects */
    KB_KERNEL_DESCRIPTOR = 34, /* kb_handle, VM or vcpu -> kb_kernel_descriptor_reply */
    KB_KIND_END = 35,
};

/* kb_header.status: 0, a negative errno of the kernel, or one of these. */
enum kb_status {
    KB_OK = 0,
    KB_BAD_LENGTH = 1,    /* message shorter or longer than its kind and counts say */
    KB_BAD_KIND = 2,      /* no such message */
    KB_BAD_HANDLE = 3,    /* no such object, or one of another sort */
    KB_BAD_RANGE = 4,     /* offset and length leave the object */
    KB_BAD_ALIGNMENT = 5, /* address or size is not a multiple of the page */
    KB_BAD_VALUE = 6,     /* a field has a value that is not defined */
    KB_NOT_ALLOWED = 7,   /* the ioctl is not in the table for this object */
    KB_BUSY = 8,          /* the vcpu is running; kick it or wait */
    KB_OVERLAP = 9,       /* the region overlaps another of the same VM */
    KB_TOO_LARGE = 10,    /* the reply would not fit its buffer */
    KB_NO_MEMORY = 11,    /* out of memory, or of handles */
};

struct kb_header {
    uint32_t size_bytes; /* whole message, header included */
    uint32_t id;         /* chosen by the requester, repeated in the reply */
    uint32_t kind;       /* enum kb_kind */
    int32_t status;      /* 0 in requests; enum kb_status or -errno in replies */
};

struct kb_hello_reply {
    struct kb_header header;
    uint32_t wire_version;
    uint32_t page_bytes;
    int32_t kvm_api_version;  /* KVM_GET_API_VERSION, or -errno of opening /dev/kvm */
    uint32_t row_bytes;       /* sizeof(struct kb_row) */
    uint32_t agent_pid;       /* 1 in the appliance */
    uint32_t agent_uid;
};

/* A message about one object. */
struct kb_handle {
    struct kb_header header;
    uint32_t handle;
    uint32_t reserved;
};

struct kb_handle_reply {
    struct kb_header header;
    uint32_t handle;
    uint32_t reserved;
    uint64_t size_bytes; /* of a region; of the vcpu's kvm_run mapping; else 0 */
};

/* Make a VM (parent: the system), a vcpu, device or eventfd (parent: a VM), or a
 * statistics file (parent: a VM or a vcpu). */
struct kb_create {
    struct kb_header header;
    uint32_t parent;
    uint32_t type;  /* VM type; vcpu id; device type; 0 */
    uint32_t flags; /* KVM_CREATE_DEVICE flags; else 0 */
    uint32_t reserved;
};

/* Bytes [offset, offset + length) of a region or statistics file. */
struct kb_range {
    struct kb_header header;
    uint32_t handle;
    uint32_t reserved;
    uint64_t offset;
    uint64_t length_bytes;
};

struct kb_fill {
    struct kb_header header;
    uint32_t handle;
    uint32_t byte; /* 0 to 255 */
    uint64_t offset;
    uint64_t length_bytes;
};

/* One ioctl from the table in ioctls.c.  For an ioctl that takes a number the
 * argument is `value`; for one that takes a struct it follows this message,
 * and as many bytes as the ioctl writes follow the reply. */
struct kb_ioctl {
    struct kb_header header;
    uint32_t handle;
    uint32_t request;   /* the ioctl's number */
    uint64_t value;     /* argument of ioctls that take a number */
    uint32_t out_bytes; /* room wanted for ioctls of variable length; else 0 */
    uint32_t reserved;
};

struct kb_ioctl_reply {
    struct kb_header header;
    int32_t result; /* what ioctl() returned, >= 0 */
    uint32_t reserved;
};

/* Anonymous memory of the core, put into the guest at gpa. */
struct kb_add_region {
    struct kb_header header;
    uint32_t vm;
    uint32_t flags; /* KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY */
    uint64_t gpa;
    uint64_t size_bytes;
};

/* Change a region's place or flags; its bytes stay. */
struct kb_set_region {
    struct kb_header header;
    uint32_t handle;
    uint32_t flags;
    uint64_t gpa;
};

/* What the guest may do with pages [offset, offset + length) of a region. */
enum kb_protection {
    KB_PROTECT_NONE = 0,  /* as the region's flags say */
    KB_PROTECT_WRITE = 1, /* writes leave the guest as MMIO exits */
    KB_PROTECT_ALL = 2,   /* reads and writes leave the guest as MMIO exits */
};

struct kb_protect {
    struct kb_header header;
    uint32_t handle;
    uint32_t protection; /* enum kb_protection */
    uint64_t offset;
    uint64_t length_bytes;
};

/* kb_execute.mode */
enum kb_mode {
    KB_RUN = 0,  /* until something stops it */
    KB_STEP = 1, /* `steps` single steps, or until something stops it */
};

/* kb_execute.flags */
enum kb_execute_flag {
    KB_RECORD = 1,    /* append a kb_row after each step */
    KB_FULL_SYNC = 2, /* sregs also after I/O and MMIO exits, and events: an ioctl more */
    KB_COMPLETE = 4,  /* only complete the pending I/O or MMIO exit; run nothing more */
    KB_PACK = 8,      /* rows packed, for channels that are slower than memory; see kb_row */
    KB_HANDLERS = 16, /* KB_STEP: a step ends where it enters a handler; see handlers.h */
    KB_OVER_HANDLERS = 32, /* and a handler's own steps do not count, unless it began inside */
    KB_WHOLE_REP = 64,     /* KB_STEP: a string instruction with REP is one step */
    KB_BARE = 128,         /* KB_RUN: one KVM_RUN; nothing is handed on to the guest, and SINGLESTEP is KVM's own */
};

/* kb_row.flags: bits 0 and 1 are the width of the code that the next step runs, */
enum kb_width {
    KB_WIDTH_UNKNOWN = 0,
    KB_WIDTH_BITS16 = 1,
    KB_WIDTH_BITS32 = 2,
    KB_WIDTH_BITS64 = 3,
};

/* and these bits, also in kb_stop.tainted, say what the step did besides. */
enum kb_taint {
    KB_TAINT_PUSHF = 4,  /* an image of RFLAGS in guest memory shows our TF, and could not be mended */
    KB_TAINT_JUMPED = 8, /* no branch, yet rip is elsewhere: a handler was entered */
    KB_TAINT_ENTERED = 16, /* the step ended at the first instruction of a handler, */
    KB_TAINT_SHARED = 32,  /* which several vectors have: the one given is the lowest */
    KB_TAINT_OVER = 64,    /* a handler was entered and left within the step (KB_OVER_HANDLERS) */
    KB_VECTOR_SHIFT = 8,   /* where the vector is in kb_row.flags, 8 bits */
};

/*
 * Run or step one vcpu.  Payload, in this order: io_bytes bytes that complete
 * the exit of the last stop (an IN, an MMIO read); n_stops addresses (u64);
 * n_watches struct kb_watch.  Stops and watches are compared after every
 * step, so they need KB_STEP (with steps = 0 for "no limit").
 */
struct kb_execute {
    struct kb_header header;
    uint32_t vcpu;
    uint32_t mode;          /* enum kb_mode */
    uint64_t steps;         /* KB_STEP: at most this many; 0: no limit */
    uint64_t deadline_ns;   /* from receipt; 0: none */
    uint32_t flags;         /* enum kb_execute_flag */
    uint32_t debug_control; /* KVM_GUESTDBG_* beside ENABLE, and SINGLESTEP but for KB_BARE */
    uint64_t debugreg[8];   /* for KVM_GUESTDBG_USE_HW_BP */
    uint32_t io_bytes;
    uint32_t n_stops;
    uint32_t n_watches;
    uint32_t max_rows;      /* KB_RECORD: room for rows in the reply */
};

/* A range of a region whose bytes are compared after every step. */
struct kb_watch {
    uint32_t region;
    uint32_t length_bytes; /* 1 to KB_MAX_WATCH_BYTES */
    uint64_t offset;
};

/* Why KB_EXECUTE came back. */
enum kb_cause {
    KB_CAUSE_EXIT = 1,     /* KVM left to user space: see exit_reason and run */
    KB_CAUSE_STEPS = 2,    /* the steps asked for are done, or max_rows are full */
    KB_CAUSE_DEBUG = 3,    /* KVM_EXIT_DEBUG that is no plain step: INT3, debug register */
    KB_CAUSE_STOP = 4,     /* rip is stops[index] */
    KB_CAUSE_WATCH = 5,    /* the bytes of watches[index] changed */
    KB_CAUSE_DEADLINE = 6, /* deadline_ns passed */
    KB_CAUSE_KICK = 7,     /* KB_KICK came */
    KB_CAUSE_SIGNAL = 8,   /* a signal came to the thread (Ctrl-C in the process) */
    KB_CAUSE_ERROR = 9,    /* KVM_RUN failed: see error */
    KB_CAUSE_HLT = 10,     /* a step retired HLT, and KVM reported the step but no HLT exit */
};

/* kb_stop.valid */
enum kb_valid {
    KB_VALID_REGS = 1,
    KB_VALID_SREGS = 2,
    KB_VALID_EVENTS = 4,
};

/*
 * The state at the stop.  code comes with sregs.  run holds the first KB_RUN_BYTES of struct kvm_run,
 * whose exit union says the rest.  Payload: n_rows kb_row at rows_offset, and
 * for KVM_EXIT_IO the io_bytes of data (size * count) at io_offset; offsets
 * count from the start of the message.
 */
struct kb_stop {
    struct kb_header header;
    uint32_t cause;       /* enum kb_cause */
    uint32_t exit_reason; /* KVM_EXIT_*, of the last KVM_RUN */
    uint64_t steps;       /* steps completed by this request */
    uint64_t elapsed_ns;  /* CLOCK_MONOTONIC of the core, emulator time in an appliance */
    uint32_t valid;       /* enum kb_valid: which of the states below hold */
    int32_t error;        /* KB_CAUSE_ERROR: errno of KVM_RUN */
    uint32_t index;       /* which stop or watch */
    uint32_t n_rows;
    uint32_t rows_offset;
    uint32_t io_offset;
    uint32_t io_bytes;
    uint32_t completed;   /* 1: the instruction of an I/O or MMIO exit has already retired */
    uint64_t debug_pc;    /* KVM_EXIT_DEBUG: arch.pc, */
    uint64_t debug_dr6;   /* arch.dr6, */
    uint64_t debug_dr7;   /* arch.dr7, */
    uint32_t debug_exception; /* and arch.exception */
    uint32_t io_port;     /* KVM_EXIT_IO, decoded for quick dispatch, */
    uint32_t io_size;     /* bytes an access, */
    uint32_t io_count;    /* accesses (REP), */
    uint32_t io_is_out;   /* direction, */
    uint32_t mmio_is_write; /* and KVM_EXIT_MMIO likewise, */
    uint32_t mmio_size;   /* in bytes, */
    uint32_t tainted;     /* enum kb_taint of any step of this request; JUMPED, ENTERED, SHARED of its last */
    uint64_t mmio_gpa;
    uint64_t value;       /* first 8 bytes of data of either; KB_CAUSE_WATCH: which changed, a bit each */
    uint64_t total_ns;    /* elapsed_ns of all requests of this vcpu so far */
    uint32_t plain;       /* 1: cause is KB_CAUSE_STEPS and nothing is tainted */
    uint32_t quick;       /* KVM_EXIT_IO of one access: 1 << 31 | out << 30 | size << 16 | port; else 0 */
    uint32_t rows_bytes;  /* bytes of rows at rows_offset */
    uint32_t code_bytes;  /* how much of code could be read */
    uint32_t vector;      /* of the last handler entered, if tainted says so */
    uint32_t history_offset; /* stepping, and the guest has died: a kb_history, else 0 */
    uint8_t regs[144];    /* struct kvm_regs */
    uint8_t sregs[312];   /* struct kvm_sregs */
    uint8_t code[16];     /* what memory holds at rip, as far as the page goes */
    uint8_t events[64];   /* struct kvm_vcpu_events */
    uint8_t run[KB_RUN_BYTES];
};

/* A handler that was entered. */
struct kb_entry {
    uint64_t from_pc;  /* linear address of the instruction that was interrupted, or had run last */
    uint32_t vector;
    uint32_t shared;   /* 1: the lowest of several that lead there */
};

/* What led to a stop at which the guest's registers may be lost: the last instruction tried, the handlers before. */
struct kb_history {
    uint64_t rip;      /* offset in the code segment, */
    uint64_t pc;       /* and linear, of the instruction that was to be stepped */
    uint32_t width;    /* enum kb_width */
    uint32_t code_bytes;
    uint8_t code[16];
    uint32_t entries;  /* how many of entry hold, oldest first */
    uint32_t reserved;
    struct kb_entry entry[KB_HISTORY];
};

/*
 * One recorded step: the state after it.  Order of registers as in kvm_regs.
 * Packed (KB_PACK), rows are n_rows masks (u32), up to the next multiple of 8
 * bytes, and then values (u64): for each row in turn those columns whose bit
 * is set in its mask, because they differ from the row before (from 0 in the
 * first).  Column 18 is exit and flags together.
 */
struct kb_row {
    uint64_t rax;
    uint64_t rbx;
    uint64_t rcx;
    uint64_t rdx;
    uint64_t rsi;
    uint64_t rdi;
    uint64_t rsp;
    uint64_t rbp;
    uint64_t r8;
    uint64_t r9;
    uint64_t r10;
    uint64_t r11;
    uint64_t r12;
    uint64_t r13;
    uint64_t r14;
    uint64_t r15;
    uint64_t rip;
    uint64_t rflags;
    uint32_t exit;  /* KVM_EXIT_* that the step made: 4 (debug) for a plain step */
    uint32_t flags; /* enum kb_width, enum kb_taint, and the vector of a handler entered */
};

/*
 * Step several vcpus of one VM turn by turn.  Payload: n_vcpus struct kb_execute, complete messages each with its own
 * payload and padded to a multiple of 8 bytes; then n_turns bytes, each the place in that list of the vcpu whose turn
 * it is.  Each kb_execute is KB_STEP; its steps and deadline_ns are not looked at; with KB_RECORD its max_rows is at
 * least the number of its turns.  The first turn that does not end in a plain step ends the request.
 */
struct kb_lockstep {
    struct kb_header header;
    uint32_t vcpu;        /* that of the first kb_execute; its thread serves the request */
    uint32_t n_vcpus;     /* 1 to KB_MAX_LOCKSTEP_VCPUS */
    uint64_t n_turns;     /* 1 to KB_MAX_STEPS_ROWS */
    uint64_t deadline_ns; /* from receipt; 0: none */
};

/*
 * Payload: n_vcpus struct kb_stop, complete messages as KB_EXECUTE would bring them, each padded to a multiple of 8
 * bytes, with the steps, rows and cause of this vcpu (a vcpu that made no step and is not `last`: all zero); then
 * `turns` bytes: 1 where the vcpu made a step, 0 where it waited in the kernel (HLT, INIT, SIPI) and was passed over.
 * A turn that ended in an exit before its instruction was done is not counted, and neither is one that was interrupted.
 */
struct kb_lockstep_reply {
    struct kb_header header;
    uint32_t n_vcpus;
    uint32_t last;  /* whose turn was the last, by place; its kb_stop says how it ended */
    uint64_t turns; /* gone through */
    uint32_t completed; /* 1: the last turn made its step */
    uint32_t reserved;
};

/*
 * Traces.  A trace belongs to a VM and ends with it.  It has two sources: the log, in which the core notes each
 * KVM_RUN of the VM's vcpus, and events, which the kernel's own tracing writes into a directory of its own below
 * instances/ of tracefs.  Both tell CLOCK_MONOTONIC.  A VM has one trace at a time.
 */

/* kb_trace_open.flags */
enum kb_trace_flag {
    KB_TRACE_LOG = 1,    /* log each KVM_RUN */
    KB_TRACE_EVENTS = 2, /* the events named; if tracefs cannot be had, the reply says why and the rest works */
    KB_TRACE_OWN = 4,    /* of these only what the core's own process does, where the kernel can tell */
};

/* Payload: the events, "system/name\n" each; systems are those of tracefs_is_traced().  Nothing is written yet. */
struct kb_trace_open {
    struct kb_header header;
    uint32_t vm;
    uint32_t flags;     /* enum kb_trace_flag */
    uint32_t buffer_kb; /* of each processor's ring of events */
    uint32_t log_rows;  /* of each vcpu's ring of rows, a power of two */
    uint32_t names_bytes;
    uint32_t reserved;
};

struct kb_trace_open_reply {
    struct kb_header header;
    uint32_t handle;
    int32_t events_status; /* 0, or -errno of what kept the events away */
    uint32_t step;         /* enum kb_trace_step: at what */
    uint32_t cpus;         /* processors with a ring */
    uint32_t page_bytes;   /* of a chunk of events */
    uint32_t filtered;     /* 1: the kernel leaves other processes' events out */
};

enum kb_trace_step {
    KB_TRACE_STEP_NONE = 0,
    KB_TRACE_STEP_MOUNT = 1,  /* tracefs cannot be found or mounted */
    KB_TRACE_STEP_CREATE = 2, /* no directory can be made in instances/ */
    KB_TRACE_STEP_CLOCK = 3,  /* no trace clock `mono` */
    KB_TRACE_STEP_BUFFER = 4, /* not that large a ring */
    KB_TRACE_STEP_EVENT = 5,  /* an event cannot be switched on; `cpus` is which one of the names, from 0 */
    KB_TRACE_STEP_PIPE = 6,   /* a processor's ring cannot be opened */
};

/* kb_trace_text.what */
enum kb_trace_what {
    KB_TRACE_AVAILABLE = 1, /* events there are, of the systems that may be traced, a line each */
    KB_TRACE_FORMAT = 2,    /* the format of the event that follows, "system/name" */
    KB_TRACE_HEADER = 3,    /* events/header_page */
    KB_TRACE_STATS = 4,     /* of a trace: stats of the processor `index` */
};

struct kb_trace_text {
    struct kb_header header;
    uint32_t handle; /* of the trace; 0: no trace is needed */
    uint32_t what;   /* enum kb_trace_what */
    uint32_t index;
    uint32_t name_bytes;
};

struct kb_trace_set {
    struct kb_header header;
    uint32_t handle;
    uint32_t on; /* 1: write; 0: write no more, what there is can still be read */
};

struct kb_trace_read {
    struct kb_header header;
    uint32_t handle;
    uint32_t max_bytes; /* of chunks; at least two pages */
};

enum kb_trace_chunk_sort {
    KB_TRACE_CHUNK_PAGE = 1, /* pages of the ring buffer, as trace_pipe_raw gives them */
    KB_TRACE_CHUNK_LOG = 2,  /* kb_log_row */
};

/* Payload: n_chunks chunks, a struct kb_trace_chunk and its bytes each, padded to a multiple of 8. */
struct kb_trace_read_reply {
    struct kb_header header;
    uint32_t n_chunks;
    uint32_t more; /* 1: there was no room for all */
};

struct kb_trace_chunk {
    uint32_t sort;  /* enum kb_trace_chunk_sort */
    uint32_t index; /* processor; handle of the vcpu */
    uint64_t bytes;
    uint64_t lost;  /* rows that the log had no room for, behind these */
};

/* One KVM_RUN. */
struct kb_log_row {
    uint64_t enter_ns; /* CLOCK_MONOTONIC before, */
    uint64_t leave_ns; /* and after it; 0: it is under way, and the rest but `thread` is 0 */
    uint64_t rip;      /* then; 0: KVM gave no registers */
    uint64_t where;    /* port, guest-physical address, MSR; else the first word of the exit union */
    uint64_t value;    /* what was written, its first 8 bytes */
    uint32_t exit;     /* KVM_EXIT_*, */
    int32_t error;     /* or errno */
    uint32_t thread;   /* gettid() */
    uint32_t detail;   /* I/O, MMIO: bytes an access | write << 8 | accesses << 16 */
};

/* Text that the kernel writes into the trace. */
struct kb_trace_mark {
    struct kb_header header;
    uint32_t handle;
    uint32_t text_bytes;
};

struct kb_trace_mark_reply {
    struct kb_header header;
    uint64_t before_ns;    /* CLOCK_MONOTONIC before, */
    uint64_t after_ns;     /* and after the kernel wrote it */
    int32_t events_status; /* 0, or -errno: it is in no ring buffer */
    uint32_t reserved;
};

/* eventfd: what ioeventfd and irqfd speak. */
struct kb_eventfd {
    struct kb_header header;
    uint32_t handle;
    uint32_t reserved;
    uint64_t add;
};

struct kb_eventfd_reply {
    struct kb_header header;
    uint64_t count; /* since the last reading */
};

/* Writes that KVM kept back in the ring of the vcpu's VM, oldest first, and now no longer does.  Payload: count
 * struct kvm_coalesced_mmio. */
struct kb_coalesced_reply {
    struct kb_header header;
    uint32_t count;
    uint32_t reserved;
};

/* The host kernel's memory, read only. */
enum kb_kernel_what {
    KB_KERNEL_BTF = 1,     /* of the module that is named, or of "vmlinux" */
    KB_KERNEL_SYMBOLS = 2, /* lines of /proc/kallsyms with the symbols that are named, a line each */
    KB_KERNEL_NOTES = 3,   /* the notes of /proc/kcore, ELF's; VMCOREINFO is one */
};

struct kb_kernel_text {
    struct kb_header header;
    uint32_t handle;
    uint32_t what;       /* enum kb_kernel_what */
    uint32_t name_bytes;
    uint32_t reserved;
    uint64_t offset;     /* BTF comes in pieces: from here, */
    uint64_t max_bytes;  /* so many at most */
};

enum kb_kernel_flags {
    KB_KERNEL_SPARSE = 1, /* of at most 4096 bytes, words of 8 that are 0 left out: a bit a word, then the others */
};

/* Payload: n_ranges kb_kernel_range. */
struct kb_kernel_read {
    struct kb_header header;
    uint32_t handle;
    uint32_t flags;
    uint32_t n_ranges;
    uint32_t reserved;
};

struct kb_kernel_range {
    uint64_t address;
    uint32_t bytes;
    uint32_t reserved;
};

/* Of each range; then the bytes of each, padded to a multiple of 8. */
struct kb_kernel_got {
    uint32_t there; /* 0: cannot be read */
    uint32_t bytes;
};

/* What a struct list_head or hlist_head leads to. */
struct kb_kernel_list {
    struct kb_header header;
    uint32_t handle;
    uint32_t node_offset;  /* of the list_head or hlist_node in an object */
    uint64_t head;
    uint32_t object_bytes;
    uint32_t max_objects;
};

enum kb_kernel_list_end {
    KB_KERNEL_LIST_WHOLE = 0,
    KB_KERNEL_LIST_LONGER = 1, /* than max_objects */
    KB_KERNEL_LIST_BROKEN = 2, /* it led where nothing can be read */
};

/* Payload: for each object its address, 64 bits, and its bytes, padded to a multiple of 8. */
struct kb_kernel_list_reply {
    struct kb_header header;
    uint32_t n_objects;
    uint32_t end; /* enum kb_kernel_list_end */
};

/* By what the kernel's memory shows a VM or vcpu: a process and its descriptor. */
struct kb_kernel_descriptor_reply {
    struct kb_header header;
    int32_t pid;
    int32_t fd;
};

/* The loops that benchmarks compare with: KVM_RUN and nothing that is ours. */
enum kb_raw_loop_sort {
    KB_RAW_STEPS = 1, /* single steps, a kb_row each into a buffer of the core */
    KB_RAW_EXITS = 2, /* user-space exits, data discarded */
};

struct kb_raw_loop {
    struct kb_header header;
    uint32_t vcpu;
    uint32_t sort; /* enum kb_raw_loop_sort */
    uint64_t count;
};

struct kb_raw_loop_reply {
    struct kb_header header;
    uint64_t count;      /* steps or exits done */
    uint64_t elapsed_ns; /* CLOCK_MONOTONIC of the core */
};

#endif
