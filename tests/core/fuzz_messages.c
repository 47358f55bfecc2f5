/*
 * Serves hundreds of thousands of broken requests and looks for a fault.
 *
 *     fuzz_messages SEED COUNT             against /dev/kvm, if there is one
 *     fuzz_messages SEED COUNT --absent    with an empty /dev, so that there is none
 *     fuzz_messages SEED COUNT --stream    writes the messages to standard output instead
 *
 * Built with the core's own files under the address and undefined-behaviour
 * sanitizers.  Requests and replies lie in heap blocks of just their size, so
 * a read or write one byte past them is seen; or they end where a page does
 * behind which there is nothing, for the sanitizers do not see what the kernel
 * does for an ioctl.  It answers EFAULT then, which is a failure here.  What
 * the core maps has such a page behind it, too.  Besides, each reply is checked
 * for what wire.h promises, the descriptors are counted at the end, and a call
 * that does not come back is a failure: what runs too long is interrupted from
 * another thread, as a user would, and must then end.
 *
 * At the end it prints how many requests of each kind were served and refused.
 * Exit status 0: no fault.  77: --absent is not permitted here.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <time.h>
#include <unistd.h>

#include "core.h"
#include "generator.h"

#define INTERRUPT_AFTER_NS 5000000u   /* a request without a deadline */
#define HANG_AFTER_NS 60000000000u    /* twelve thousand interruptions had no effect */
#define LARGEST_STATUS KB_NO_MEMORY

static struct core *core;
static struct generator generator;
static uint64_t seed, number;
static uint8_t message[MOST_MESSAGE_BYTES];
static size_t message_bytes;

static uint64_t served[KB_KIND_END], refused[KB_KIND_END + 1]; /* by kind; the last is of no kind */

static _Atomic uint64_t call_started; /* 0: none is under way */
static atomic_bool finished;
static uint64_t interruptions;

static uint64_t clock_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* Also called by the sanitizers before they end the process. */
static void describe_message(void)
{
    fprintf(stderr, "\nseed %llu, message %llu, %zu bytes:", (unsigned long long)seed, (unsigned long long)number,
            message_bytes);
    for (size_t n = 0; n < message_bytes; n++)
        fprintf(stderr, "%s%02x", n % 32 ? " " : "\n  ", message[n]);
    fprintf(stderr, "\n");
}

#define EXPECT(condition)                                                                                     \
    do {                                                                                                      \
        if (!(condition)) {                                                                                   \
            fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition);                           \
            describe_message();                                                                               \
            _exit(1);                                                                                         \
        }                                                                                                     \
    } while (0)

/* The linker has the core call these two instead (--wrap): a page without access follows each mapping. */
#define PAGE_BYTES 4096u

void *__real_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void *address, size_t bytes);
void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void *address, size_t bytes);

void *__wrap_mmap(void *address, size_t bytes, int protection, int flags, int fd, off_t offset)
{
    int reserve = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

    EXPECT(address == NULL);
    address = __real_mmap(NULL, bytes + PAGE_BYTES, PROT_NONE, reserve, -1, 0);
    if (address == MAP_FAILED)
        return MAP_FAILED;
    void *mapped = __real_mmap(address, bytes, protection, flags | MAP_FIXED, fd, offset);
    if (mapped == MAP_FAILED)
        __real_munmap(address, bytes + PAGE_BYTES);
    return mapped;
}

int __wrap_munmap(void *address, size_t bytes)
{
    return __real_munmap(address, bytes + PAGE_BYTES);
}

/* Blocks for a request and a reply: on the heap, or at the end of one of these. */
#define EDGE_BYTES 65536u

struct block {
    uint8_t *edge; /* a mapping of EDGE_BYTES and no more */
    uint8_t *bytes;
    bool on_heap;
};

static void block_take(struct block *block, size_t bytes)
{
    block->on_heap = bytes > EDGE_BYTES || one_in(&generator, 2);
    if (block->on_heap)
        block->bytes = malloc(bytes ? bytes : 1); /* malloc(0) would not be one byte long */
    else /* aligned as messages are, so that up to 7 bytes too many go unseen */
        block->bytes = block->edge + EDGE_BYTES - ((bytes + 7) & ~(size_t)7);
    EXPECT(block->bytes);
}

static void block_give(struct block *block)
{
    if (block->on_heap)
        free(block->bytes);
}

static void *watch(void *unused)
{
    while (!atomic_load(&finished)) {
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
        uint64_t started = atomic_load(&call_started), now = clock_ns();
        if (!started || now < started + INTERRUPT_AFTER_NS)
            continue;
        EXPECT(now < started + HANG_AFTER_NS);
        core_interrupt(core);
        interruptions++;
    }
    return unused;
}

static void check_reply(const uint8_t *reply, size_t reply_bytes, size_t capacity, size_t room)
{
    struct kb_header header, asked = {0};

    EXPECT(reply_bytes >= sizeof(header) && reply_bytes <= capacity);
    memcpy(&header, reply, sizeof(header));
    EXPECT(header.size_bytes == reply_bytes);
    EXPECT(header.status > -4096 && header.status <= LARGEST_STATUS);
    EXPECT(header.status != -EFAULT);
    EXPECT(header.status == 0 || reply_bytes == sizeof(header));
    if (message_bytes >= sizeof(asked))
        memcpy(&asked, message, sizeof(asked));
    EXPECT(header.id == asked.id && header.kind == asked.kind);
    if (message_bytes < sizeof(asked) || asked.size_bytes != message_bytes)
        EXPECT(header.status == KB_BAD_LENGTH);
    /* What core_reply_bytes() calls enough is enough.  Watches have a limit of their own. */
    if (header.status == KB_TOO_LARGE && header.kind != KB_EXECUTE)
        EXPECT(capacity < room || room == sizeof(header));
    if (header.kind == KB_EXECUTE && header.status == 0) {
        struct kb_stop stop;
        EXPECT(reply_bytes >= sizeof(stop));
        memcpy(&stop, reply, sizeof(stop));
        EXPECT(stop.cause >= KB_CAUSE_EXIT && stop.cause <= KB_CAUSE_HLT);
        EXPECT((uint64_t)stop.rows_offset + stop.rows_bytes <= reply_bytes);
        EXPECT((uint64_t)stop.io_offset + stop.io_bytes <= reply_bytes);
        EXPECT(stop.code_bytes <= sizeof(stop.code));
    }
}

static void count_outcome(const uint8_t *reply)
{
    struct kb_header header;

    memcpy(&header, reply, sizeof(header));
    uint32_t kind = header.kind < KB_KIND_END ? header.kind : KB_KIND_END;
    if (header.status == 0)
        served[kind]++;
    else
        refused[kind]++;
}

static void one_message(struct block *request, struct block *reply)
{
    struct generator *g = &generator;
    size_t reply_bytes = 0;

    message_bytes = next_message(g, message);
    block_take(request, message_bytes);
    memcpy(request->bytes, message, message_bytes);

    uint32_t vcpu = core_vcpu_of(core, request->bytes, message_bytes);
    size_t room = core_reply_bytes(core, request->bytes, message_bytes);
    EXPECT(room >= sizeof(struct kb_header) && room <= KB_MAX_MESSAGE_BYTES);
    EXPECT(vcpu == 0 || (vcpu & 0xffff) > KB_SYSTEM_HANDLE);
    size_t capacity = room;
    if (one_in(g, 4))
        capacity = below(g, room < 8192 ? room + 1 : 8192);
    else if (one_in(g, 8))
        capacity = room + below(g, 64);
    block_take(reply, capacity);

    atomic_store(&call_started, clock_ns());
    int status = core_call(core, request->bytes, message_bytes, reply->bytes, capacity, &reply_bytes);
    atomic_store(&call_started, 0);

    EXPECT(memcmp(request->bytes, message, message_bytes) == 0);
    if (capacity < sizeof(struct kb_header)) {
        EXPECT(status == -EINVAL);
    } else {
        EXPECT(status == 0);
        check_reply(reply->bytes, reply_bytes, capacity, room);
        learn(g, message, reply->bytes, reply_bytes);
        count_outcome(reply->bytes);
    }
    block_give(reply);
    block_give(request);
}

static int open_descriptors(void)
{
    int count = 0;
    DIR *directory = opendir("/proc/self/fd");

    EXPECT(directory);
    while (readdir(directory))
        count++;
    closedir(directory);
    return count;
}

/* A name space of our own in which /dev is empty; false if that is not permitted. */
static bool hide_devices(void)
{
    if (unshare(CLONE_NEWNS) < 0 && unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
        return false;
    return mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 &&
           mount("tmpfs", "/dev", "tmpfs", 0, NULL) == 0 && access("/dev/kvm", F_OK) < 0;
}

static int stream_messages(uint64_t count)
{
    generator.whole_frames = !one_in(&generator, 4);
    generator.planned = 6;
    /* An agent gives handles in order, so they can be guessed without its answers. */
    static const enum family order[] = {OF_VM, OF_REGION, OF_VCPU, OF_REGION, OF_STATS, OF_DEVICE, OF_STATS, OF_NOTHING};
    for (uint32_t n = 0; n < COUNT_OF(order); n++)
        generator.handles[order[n]][generator.count[order[n]]++] = 0x10000 | (n + 2);
    for (number = 0; number < count; number++) {
        message_bytes = next_message(&generator, message);
        if (fwrite(message, 1, message_bytes, stdout) != message_bytes)
            return 1;
    }
    return fflush(stdout) == 0 ? 0 : 1;
}

int main(int argc, char **argv)
{
    pthread_t watcher;

    if (argc < 3) {
        fprintf(stderr, "usage: fuzz_messages SEED COUNT [--absent | --stream]\n");
        return 2;
    }
    seed = strtoull(argv[1], NULL, 0);
    uint64_t count = strtoull(argv[2], NULL, 0);
    generator_init(&generator, seed);
    if (argc > 3 && strcmp(argv[3], "--stream") == 0)
        return stream_messages(count);
    if (argc > 3 && strcmp(argv[3], "--absent") == 0 && !hide_devices()) {
        fprintf(stderr, "/dev cannot be hidden: %s\n", strerror(errno));
        return 77;
    }
    __sanitizer_set_death_callback(describe_message);
    int descriptors = open_descriptors();
    struct block request = {.edge = __wrap_mmap(NULL, EDGE_BYTES, PROT_READ | PROT_WRITE,
                                                MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)};
    struct block reply = {.edge = __wrap_mmap(NULL, EDGE_BYTES, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)};
    EXPECT(request.edge != MAP_FAILED && reply.edge != MAP_FAILED);
    EXPECT(core_create(&core) == 0);
    EXPECT(pthread_create(&watcher, NULL, watch, NULL) == 0);
    uint64_t start = clock_ns();
    for (number = 0; number < count; number++)
        one_message(&request, &reply);
    uint64_t elapsed = clock_ns() - start;
    atomic_store(&finished, true);
    pthread_join(watcher, NULL);
    core_destroy(core);
    EXPECT(open_descriptors() == descriptors);
    printf("%llu messages, seed %llu, %.1f s, %llu interruptions\n", (unsigned long long)count,
           (unsigned long long)seed, (double)elapsed / 1e9, (unsigned long long)interruptions);
    for (uint32_t kind = 0; kind <= KB_KIND_END; kind++)
        printf("kind %u served %llu refused %llu\n", kind, kind < KB_KIND_END ? (unsigned long long)served[kind] : 0,
               (unsigned long long)refused[kind]);
    return 0;
}
