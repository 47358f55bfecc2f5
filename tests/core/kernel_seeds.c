/* Valid requests about the host kernel's memory, of which kernel_file.py makes a small file; see seeds.c. */
#include "generator.h"

#include <string.h>

/* As in kernel_file.py. */
#define FIRST 0xffff888000000000ull
#define FIRST_BYTES 65536u
#define SECOND 0xffffffff81000000ull
#define SECOND_BYTES 16384u

static uint64_t place(struct generator *g)
{
    if (one_in(g, 8))
        return odd_number(g);
    return one_in(g, 2) ? FIRST + below(g, FIRST_BYTES) : SECOND + below(g, SECOND_BYTES);
}

static size_t read(struct generator *g, uint8_t *message)
{
    struct kb_kernel_read read = {
        .header.kind = KB_KERNEL_READ,
        .handle = pick(g, OF_KERNEL),
        .flags = one_in(g, 2) ? KB_KERNEL_SPARSE : 0,
        .n_ranges = (uint32_t)below(g, 20),
    };

    memcpy(message, &read, sizeof(read));
    for (uint32_t n = 0; n < read.n_ranges; n++) {
        struct kb_kernel_range range = {.address = place(g), .bytes = (uint32_t)(8 * below(g, one_in(g, 4) ? 513 : 9))};
        memcpy(message + sizeof(read) + n * sizeof(range), &range, sizeof(range));
    }
    return sizeof(read) + read.n_ranges * sizeof(struct kb_kernel_range);
}

static size_t text(struct generator *g, uint8_t *message)
{
    static const char *const names[] = {"vmlinux", "kvm", "no_such", "../kvm", "init_task\nvm_list", ""};
    struct kb_kernel_text text = {
        .header.kind = KB_KERNEL_TEXT,
        .handle = pick(g, OF_KERNEL),
        /* /proc/kallsyms takes a tenth of a second. */
        .what = one_in(g, 200) ? KB_KERNEL_SYMBOLS : one_in(g, 2) ? KB_KERNEL_BTF : KB_KERNEL_NOTES,
        .offset = one_in(g, 2) ? 0 : odd_number(g),
        .max_bytes = one_in(g, 8) ? odd_number(g) : 4096,
    };
    const char *name = names[below(g, COUNT_OF(names))];

    text.name_bytes = (uint32_t)strlen(name);
    memcpy(message, &text, sizeof(text));
    memcpy(message + sizeof(text), name, text.name_bytes);
    return sizeof(text) + text.name_bytes;
}

size_t kernel_message(struct generator *g, uint8_t *message)
{
    struct kb_header open = {.kind = KB_KERNEL_OPEN};
    struct kb_handle handle = {.header.kind = KB_CLOSE, .handle = pick(g, OF_KERNEL)};
    struct kb_kernel_list list = {
        .header.kind = KB_KERNEL_LIST,
        .handle = pick(g, OF_KERNEL),
        .head = place(g) & ~7ull,
        .node_offset = (uint32_t)(8 * below(g, 4)),
        .object_bytes = (uint32_t)(8 + below(g, 64)),
        .max_objects = (uint32_t)below(g, 100),
    };

    if (!g->count[OF_KERNEL] && !one_in(g, 4)) {
        memcpy(message, &open, sizeof(open));
        return sizeof(open);
    }
    switch (below(g, 12)) {
    case 0:
        if (g->count[OF_KERNEL] < 4) {
            memcpy(message, &open, sizeof(open));
            return sizeof(open);
        }
        memcpy(message, &handle, sizeof(handle));
        return sizeof(handle);
    case 1:
        handle.header.kind = KB_KERNEL_DESCRIPTOR;
        handle.handle = pick(g, one_in(g, 2) ? OF_VM : OF_VCPU);
        memcpy(message, &handle, sizeof(handle));
        return sizeof(handle);
    case 2:
    case 3:
        return text(g, message);
    case 4:
    case 5:
    case 6:
        memcpy(message, &list, sizeof(list));
        return sizeof(list);
    default:
        return read(g, message);
    }
}
