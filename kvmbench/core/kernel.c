/* The host kernel's memory, types and symbols.  See kernel.h. */
#define _GNU_SOURCE
#include "kernel.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#ifndef KERNEL_MEMORY /* tests/core has a file of its own */
#define KERNEL_MEMORY "/proc/kcore"
#endif
#define MAX_SEGMENTS 1024
#define MAX_NOTES_BYTES 65536
#define MAX_WORD 64
#define MASK_BYTES 64 /* of a sparse page */

/* A piece of the kernel's address space, and where the file has it. */
struct segment {
    uint64_t address;
    uint64_t bytes;
    uint64_t offset;
};

struct kernel {
    struct object object; /* fd: /proc/kcore */
    uint32_t n_segments;
    struct segment *segments;
    uint64_t notes_offset;
    uint64_t notes_bytes;
};

/* All of the bytes, or -errno; EIO where the file ends. */
static int read_at(int fd, void *bytes, size_t count, uint64_t offset)
{
    uint8_t *to = bytes;

    while (count > 0) {
        ssize_t n = pread(fd, to, count, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        to += n;
        offset += (uint64_t)n;
        count -= (size_t)n;
    }
    return 0;
}

static int read_headers(struct kernel *kernel)
{
    Elf64_Ehdr header;
    int status = read_at(kernel->object.fd, &header, sizeof(header), 0);

    if (status != 0)
        return status;
    if (memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_ident[EI_CLASS] != ELFCLASS64 ||
        header.e_phentsize != sizeof(Elf64_Phdr) || header.e_phnum > MAX_SEGMENTS)
        return -ENOEXEC;
    kernel->segments = calloc(header.e_phnum ? header.e_phnum : 1u, sizeof(*kernel->segments));
    if (!kernel->segments)
        return KB_NO_MEMORY;
    for (uint32_t n = 0; n < header.e_phnum; n++) {
        Elf64_Phdr program;
        status = read_at(kernel->object.fd, &program, sizeof(program), header.e_phoff + n * sizeof(program));
        if (status != 0)
            return status;
        if (program.p_type == PT_LOAD) {
            struct segment *segment = &kernel->segments[kernel->n_segments++];
            segment->address = program.p_vaddr;
            segment->bytes = program.p_memsz;
            segment->offset = program.p_offset;
        } else if (program.p_type == PT_NOTE) {
            kernel->notes_offset = program.p_offset;
            kernel->notes_bytes = program.p_filesz;
        }
    }
    return 0;
}

void kernel_free(struct object *object)
{
    struct kernel *kernel = (struct kernel *)object;

    if (kernel->object.fd >= 0)
        close(kernel->object.fd);
    free(kernel->segments);
    free(kernel);
}

int kernel_open(struct exchange *x)
{
    struct kb_handle_reply *reply = (struct kb_handle_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct kernel *kernel = calloc(1, sizeof(*kernel));
    if (!kernel)
        return KB_NO_MEMORY;
    kernel->object.sort = SORT_KERNEL;
    kernel->object.core = x->core;
    atomic_store(&kernel->object.users, 1);
    kernel->object.fd = open(KERNEL_MEMORY, O_RDONLY | O_CLOEXEC);
    int status = kernel->object.fd < 0 ? -errno : read_headers(kernel);
    if (status == 0)
        status = object_publish(x->core, &kernel->object);
    if (status != 0) {
        kernel_free(&kernel->object);
        return status;
    }
    reply->handle = kernel->object.handle;
    reply->reserved = 0;
    reply->size_bytes = 0;
    x->reply_bytes = sizeof(*reply);
    return 0;
}

/* Into memory, from anywhere in the kernel; false where the file has nothing. */
static bool read_kernel(const struct kernel *kernel, uint64_t address, void *bytes, size_t count)
{
    for (uint32_t n = 0; n < kernel->n_segments; n++) {
        const struct segment *segment = &kernel->segments[n];
        if (address < segment->address || address - segment->address >= segment->bytes ||
            segment->bytes - (address - segment->address) < count)
            continue;
        return read_at(kernel->object.fd, bytes, count, segment->offset + (address - segment->address)) == 0;
    }
    return false;
}

static bool is_word(const char *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!((bytes[i] >= 'a' && bytes[i] <= 'z') || (bytes[i] >= '0' && bytes[i] <= '9') || bytes[i] == '_'))
            return false;
    return n > 0 && n <= MAX_WORD;
}

/* A part of a module's BTF, or of the kernel's ("vmlinux"). */
static int read_btf(struct exchange *x, const struct kb_kernel_text *request, const char *name)
{
    char path[32 + MAX_WORD];

    if (!is_word(name, request->name_bytes))
        return KB_BAD_VALUE;
    snprintf(path, sizeof(path), "/sys/kernel/btf/%.*s", (int)request->name_bytes, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    size_t room = x->capacity - sizeof(struct kb_header);
    size_t wanted = request->max_bytes < room ? request->max_bytes : room;
    size_t done = 0;
    int status = 0;
    while (done < wanted && status == 0) {
        ssize_t n = pread(fd, x->reply + sizeof(struct kb_header) + done, wanted - done, (off_t)(request->offset + done));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            status = -errno;
        if (n <= 0)
            break;
        done += (size_t)n;
    }
    close(fd);
    x->reply_bytes += done;
    return status;
}

/* Whether the word is among those of a list that newlines part. */
static bool is_among(const char *names, size_t names_bytes, const char *word, size_t word_bytes)
{
    const char *end = names + names_bytes;

    while (names < end) {
        const char *stop = memchr(names, '\n', (size_t)(end - names));
        size_t bytes = (size_t)((stop ? stop : end) - names);
        if (bytes == word_bytes && memcmp(names, word, bytes) == 0)
            return true;
        names += bytes + 1;
    }
    return false;
}

/* The lines of /proc/kallsyms with these symbols: "ADDRESS TYPE NAME [MODULE]". */
static int read_symbols(struct exchange *x, const char *names, size_t names_bytes)
{
    FILE *file = fopen("/proc/kallsyms", "re");
    char *line = NULL;
    size_t size = 0;
    int status = 0;

    if (!file)
        return -errno;
    for (ssize_t length; (length = getline(&line, &size, file)) > 0;) {
        char *name = memchr(line, ' ', (size_t)length);
        name = name && name + 3 < line + length ? name + 3 : NULL;
        if (!name)
            continue;
        size_t bytes = strcspn(name, "\t\n ");
        if (!is_among(names, names_bytes, name, bytes))
            continue;
        if (x->capacity - x->reply_bytes < (size_t)length) {
            status = KB_TOO_LARGE;
            break;
        }
        memcpy(x->reply + x->reply_bytes, line, (size_t)length);
        x->reply_bytes += (size_t)length;
    }
    free(line);
    fclose(file);
    return status;
}

static int read_notes(struct exchange *x, const struct kernel *kernel)
{
    if (kernel->notes_bytes > MAX_NOTES_BYTES || x->capacity - x->reply_bytes < kernel->notes_bytes)
        return KB_TOO_LARGE;
    int status = read_at(kernel->object.fd, x->reply + x->reply_bytes, kernel->notes_bytes, kernel->notes_offset);
    if (status == 0)
        x->reply_bytes += kernel->notes_bytes;
    return status;
}

size_t kernel_text_room(const struct kb_kernel_text *request)
{
    size_t bytes = request->max_bytes < KB_MAX_KERNEL_BYTES ? request->max_bytes : KB_MAX_KERNEL_BYTES;
    return sizeof(struct kb_header) + (bytes < MAX_NOTES_BYTES ? MAX_NOTES_BYTES : bytes);
}

int kernel_text(struct exchange *x)
{
    const struct kb_kernel_text *request = (const struct kb_kernel_text *)x->request;
    const char *name = (const char *)(request + 1);

    if (x->request_bytes - sizeof(*request) != request->name_bytes)
        return KB_BAD_LENGTH;
    struct kernel *kernel = (struct kernel *)object_get(x->core, request->handle, SORT_KERNEL);
    if (!kernel)
        return KB_BAD_HANDLE;
    int status = KB_BAD_VALUE;
    if (request->what == KB_KERNEL_BTF)
        status = read_btf(x, request, name);
    else if (request->what == KB_KERNEL_SYMBOLS)
        status = read_symbols(x, name, request->name_bytes);
    else if (request->what == KB_KERNEL_NOTES)
        status = read_notes(x, kernel);
    object_put(&kernel->object);
    return status;
}

/* The bytes that follow a request's struct, as ranges; their sum, or SIZE_MAX where it is too large. */
static size_t sum_of(const struct kb_kernel_range *ranges, uint32_t n)
{
    uint64_t sum = 0;

    for (uint32_t i = 0; i < n; i++)
        sum += ((uint64_t)ranges[i].bytes + 7) & ~7ull;
    return sum <= KB_MAX_KERNEL_BYTES ? (size_t)sum : SIZE_MAX;
}

size_t kernel_read_room(const uint8_t *bytes, size_t request_bytes)
{
    const struct kb_kernel_read *request = (const struct kb_kernel_read *)bytes;

    if ((request_bytes - sizeof(*request)) / sizeof(struct kb_kernel_range) < request->n_ranges)
        return sizeof(struct kb_header);
    size_t sum = sum_of((const struct kb_kernel_range *)(request + 1), request->n_ranges);
    size_t each = sizeof(struct kb_kernel_got) + MASK_BYTES;
    return sum == SIZE_MAX ? sizeof(struct kb_header) : sizeof(struct kb_header) + each * request->n_ranges + sum;
}

/* Leaves out words that are 0: a bit a word that says which are there, then those. */
static size_t pack(uint8_t *bytes, size_t count)
{
    uint64_t words[512];
    size_t n = count / 8, mask_bytes = (n + 63) / 64 * 8, kept = 0;
    uint64_t mask[8] = {0};

    memcpy(words, bytes, count);
    for (size_t i = 0; i < n; i++)
        if (words[i]) {
            mask[i / 64] |= 1ull << i % 64;
            words[kept++] = words[i];
        }
    memcpy(bytes, mask, mask_bytes);
    memcpy(bytes + mask_bytes, words, kept * 8);
    return mask_bytes + kept * 8;
}

int kernel_read(struct exchange *x)
{
    const struct kb_kernel_read *request = (const struct kb_kernel_read *)x->request;
    const struct kb_kernel_range *ranges = (const struct kb_kernel_range *)(request + 1);
    size_t rest = x->request_bytes - sizeof(*request);
    bool sparse = request->flags & KB_KERNEL_SPARSE;

    if (rest != (uint64_t)request->n_ranges * sizeof(*ranges))
        return KB_BAD_LENGTH;
    if (request->flags & ~(uint32_t)KB_KERNEL_SPARSE || sum_of(ranges, request->n_ranges) == SIZE_MAX)
        return KB_BAD_VALUE;
    for (uint32_t n = 0; n < request->n_ranges; n++)
        if (sparse && (ranges[n].bytes > 4096 || ranges[n].bytes % 8))
            return KB_BAD_VALUE;
    struct kernel *kernel = (struct kernel *)object_get(x->core, request->handle, SORT_KERNEL);
    if (!kernel)
        return KB_BAD_HANDLE;
    struct kb_kernel_got *got = (struct kb_kernel_got *)(x->reply + sizeof(struct kb_header));
    size_t at = sizeof(struct kb_header) + request->n_ranges * sizeof(*got);
    int status = 0;
    for (uint32_t n = 0; n < request->n_ranges && status == 0; n++) {
        size_t count = ranges[n].bytes;
        /* The room for a sparse page's mask is behind it. */
        if (x->capacity < at || x->capacity - at < count + MASK_BYTES) {
            status = KB_TOO_LARGE;
            break;
        }
        got[n].there = read_kernel(kernel, ranges[n].address, x->reply + at, count);
        if (!got[n].there)
            count = 0;
        else if (sparse)
            count = pack(x->reply + at, count);
        got[n].bytes = (uint32_t)count;
        memset(x->reply + at + count, 0, -count & 7);
        at += (count + 7) & ~7ul;
    }
    object_put(&kernel->object);
    x->reply_bytes = at;
    return status;
}

size_t kernel_list_room(const struct kb_kernel_list *request)
{
    uint64_t each = sizeof(uint64_t) + (((uint64_t)request->object_bytes + 7) & ~7ull);
    if (request->max_objects && each > KB_MAX_KERNEL_BYTES / request->max_objects)
        return sizeof(struct kb_header);
    return sizeof(struct kb_kernel_list_reply) + each * request->max_objects;
}

int kernel_list(struct exchange *x)
{
    const struct kb_kernel_list *request = (const struct kb_kernel_list *)x->request;
    struct kb_kernel_list_reply *reply = (struct kb_kernel_list_reply *)x->reply;
    size_t bytes = request->object_bytes, each = sizeof(uint64_t) + ((bytes + 7) & ~7ul);

    if (bytes < sizeof(uint64_t) || request->node_offset > bytes - sizeof(uint64_t) ||
        kernel_list_room(request) == sizeof(struct kb_header))
        return KB_BAD_VALUE;
    if (x->capacity < kernel_list_room(request))
        return KB_TOO_LARGE;
    struct kernel *kernel = (struct kernel *)object_get(x->core, request->handle, SORT_KERNEL);
    if (!kernel)
        return KB_BAD_HANDLE;
    uint8_t *to = x->reply + sizeof(*reply);
    uint64_t node;
    reply->n_objects = 0;
    reply->end = KB_KERNEL_LIST_BROKEN;
    if (read_kernel(kernel, request->head, &node, sizeof(node))) {
        reply->end = KB_KERNEL_LIST_WHOLE;
        while (node != request->head && node != 0) {
            if (reply->n_objects == request->max_objects) {
                reply->end = KB_KERNEL_LIST_LONGER;
                break;
            }
            uint64_t address = node - request->node_offset;
            if (!read_kernel(kernel, address, to + sizeof(address), bytes)) {
                reply->end = KB_KERNEL_LIST_BROKEN;
                break;
            }
            memcpy(to, &address, sizeof(address));
            memcpy(&node, to + sizeof(address) + request->node_offset, sizeof(node));
            memset(to + sizeof(address) + bytes, 0, each - sizeof(address) - bytes);
            to += each;
            reply->n_objects++;
        }
    }
    object_put(&kernel->object);
    x->reply_bytes = sizeof(*reply) + reply->n_objects * each;
    return 0;
}

int kernel_descriptor(struct exchange *x)
{
    const struct kb_handle *request = (const struct kb_handle *)x->request;
    struct kb_kernel_descriptor_reply *reply = (struct kb_kernel_descriptor_reply *)x->reply;

    if (x->capacity < sizeof(*reply))
        return KB_TOO_LARGE;
    struct object *object = object_get(x->core, request->handle, 0);
    if (!object || (object->sort != SORT_VM && object->sort != SORT_VCPU)) {
        object_put(object);
        return KB_BAD_HANDLE;
    }
    reply->pid = getpid();
    reply->fd = object->fd;
    object_put(object);
    x->reply_bytes = sizeof(*reply);
    return 0;
}
