/* See generator.h. */
#include "generator.h"

#include <linux/kvm.h>
#include <string.h>

#define MOST_REGION_BYTES (16u << 20)

static const uint64_t interesting[] = {
    0, 1, 2, 4, 7, 8, 15, 16, 63, 64, 65, 255, 256, 1023, 1024, 1025, 4095, 4096, 4097, 8192, 65535, 65536,
    KB_MAX_STEPS_ROWS, KB_MAX_STEPS_ROWS + 1, KB_MAX_MESSAGE_BYTES, KB_MAX_MESSAGE_BYTES + 1,
    0x7fffffff, 0x80000000, 0xfffff000, 0xffffffff, 0x100000000, 1ull << 52, (1ull << 52) - 4096,
    0x7fffffffffffffff, 0x8000000000000000, 0xfffffffffffff000, 0xffffffffffffffff,
};

static uint64_t draw(struct generator *g)
{
    /* SplitMix64: every seed is as good as another. */
    uint64_t z = (g->random += 0x9e3779b97f4a7c15u);
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

uint64_t below(struct generator *g, uint64_t end)
{
    return draw(g) % end;
}

bool one_in(struct generator *g, uint64_t n)
{
    return below(g, n) == 0;
}

void scribble(struct generator *g, uint8_t *bytes, size_t count)
{
    for (size_t n = 0; n < count; n++)
        bytes[n] = (uint8_t)draw(g);
}

uint64_t odd_number(struct generator *g)
{
    if (one_in(g, 4))
        return draw(g);
    return interesting[below(g, COUNT_OF(interesting))] + (one_in(g, 4) ? below(g, 17) - 8 : 0);
}

uint32_t pick(struct generator *g, enum family family)
{
    if (one_in(g, 40))
        family = (enum family)below(g, FAMILIES);
    if (!g->count[family])
        return one_in(g, 2) ? 1 : (uint32_t)odd_number(g);
    return g->handles[family][below(g, g->count[family])];
}

void generator_init(struct generator *g, uint64_t seed)
{
    memset(g, 0, sizeof(*g));
    g->random = seed;
    g->handles[OF_SYSTEM][0] = KB_SYSTEM_HANDLE;
    g->count[OF_SYSTEM] = 1;
}

/* Damage */

static size_t damage(struct generator *g, uint8_t *message, size_t size)
{
    struct kb_header header;
    size_t at = sizeof(header) + below(g, size > sizeof(header) ? size - sizeof(header) : 1);
    uint64_t value = odd_number(g);

    switch (below(g, 10)) {
    case 0: /* a bit */
        if (at < size)
            message[at] ^= (uint8_t)(1u << below(g, 8));
        break;
    case 1: /* a byte */
        if (at < size)
            message[at] = (uint8_t)value;
        break;
    case 2: /* a field of 32 bits, */
    case 3:
        at &= ~(size_t)3;
        if (at + 4 <= size)
            memcpy(message + at, &value, 4);
        break;
    case 4: /* of 64 bits, */
    case 5:
        at &= ~(size_t)7;
        if (at + 8 <= size)
            memcpy(message + at, &value, 8);
        break;
    case 6: /* the handle */
        if (size >= sizeof(header) + 4) {
            uint32_t handle = pick(g, (enum family)below(g, FAMILIES));
            memcpy(message + sizeof(header), &handle, sizeof(handle));
        }
        break;
    case 7: /* too short, */
        size = below(g, size + 1);
        break;
    case 8: /* too long */
        if (size + 64 < MOST_MESSAGE_BYTES) {
            size_t more = 1 + below(g, 64);
            scribble(g, message + size, more);
            size += more;
        }
        break;
    default: /* another kind with this one's body */
        if (size >= sizeof(header)) {
            memcpy(&header, message, sizeof(header));
            header.kind = (uint32_t)below(g, KB_KIND_END + 2);
            memcpy(message, &header, sizeof(header));
        }
        break;
    }
    return size;
}

/* Keeps what damage has made from eating the machine: a region of terabytes is a valid request. */
static void tame(struct generator *g, uint8_t *message, size_t size)
{
    struct kb_header header;

    if (size < sizeof(header))
        return;
    memcpy(&header, message, sizeof(header));
    if (header.kind == KB_ADD_REGION && size == sizeof(struct kb_add_region)) {
        struct kb_add_region add;
        memcpy(&add, message, sizeof(add));
        if (add.size_bytes > MOST_REGION_BYTES && add.size_bytes <= 1ull << 52)
            add.size_bytes %= MOST_REGION_BYTES;
        memcpy(message, &add, sizeof(add));
    } else if (header.kind == KB_EXECUTE && size >= sizeof(struct kb_execute)) {
        struct kb_execute run;
        memcpy(&run, message, sizeof(run));
        /* Reply buffers of tens of megabytes are slow to make here, so they are rare. */
        if (run.max_rows > 1000 && run.max_rows <= KB_MAX_STEPS_ROWS && !one_in(g, 50))
            run.max_rows = 1000;
        if (!one_in(g, 100) && (run.deadline_ns == 0 || run.deadline_ns > 10000000))
            run.deadline_ns = 100000;
        memcpy(message, &run, sizeof(run));
    } else if (header.kind == KB_TRACE_OPEN) {
        trace_tame(message, size);
    } else if ((header.kind == KB_RAW_LOOP || header.kind == KB_CREATE_VM || header.kind == KB_CREATE_VCPU) &&
               !one_in(g, 4) && !g->planned) {
        header.kind = KB_HELLO;
        memcpy(message, &header, sizeof(header));
    }
}

size_t next_message(struct generator *g, uint8_t *message)
{
    memset(message, 0, MOST_MESSAGE_BYTES);
    bool careful = g->planned;
    size_t size = valid_message(g, message);
    uint64_t rounds = careful || one_in(g, 3) ? 0 : 1 + below(g, 3);
    struct kb_header header;

    for (uint64_t n = 0; n < rounds; n++)
        size = damage(g, message, size);
    if (rounds)
        tame(g, message, size);
    if (g->whole_frames && size < sizeof(header))
        size = sizeof(header);
    if (size >= sizeof(header)) {
        memcpy(&header, message, sizeof(header));
        header.size_bytes = (uint32_t)size;
        header.id = ++g->id;
        if (rounds && !g->whole_frames && one_in(g, 20))
            header.size_bytes = (uint32_t)odd_number(g);
        memcpy(message, &header, sizeof(header));
    }
    return size;
}

/* Learning */

static enum family family_made(uint32_t kind)
{
    switch (kind) {
    case KB_CREATE_VM:
        return OF_VM;
    case KB_CREATE_VCPU:
        return OF_VCPU;
    case KB_CREATE_DEVICE:
        return OF_DEVICE;
    case KB_OPEN_STATS:
        return OF_STATS;
    case KB_CREATE_EVENTFD:
        return OF_EVENTFD;
    case KB_TRACE_OPEN:
        return OF_TRACE;
    case KB_ADD_REGION:
        return OF_REGION;
    case KB_KERNEL_OPEN:
        return OF_KERNEL;
    default:
        return OF_NOTHING;
    }
}

static void forget(struct generator *g, uint32_t handle)
{
    for (int family = OF_VM; family < OF_NOTHING; family++)
        for (size_t n = 0; n < g->count[family];) {
            /* A VM takes its children with it. */
            if (g->handles[family][n] != handle && g->parents[family][n] != handle) {
                n++;
                continue;
            }
            size_t dead = g->count[OF_NOTHING] < MOST_HANDLES ? g->count[OF_NOTHING]++ : below(g, MOST_HANDLES);
            g->handles[OF_NOTHING][dead] = g->handles[family][n];
            size_t last = --g->count[family];
            g->handles[family][n] = g->handles[family][last];
            g->parents[family][n] = g->parents[family][last];
        }
}

void learn(struct generator *g, const uint8_t *message, const uint8_t *reply, size_t reply_bytes)
{
    struct kb_header answer;

    memcpy(&answer, reply, sizeof(answer));
    if (answer.status != 0)
        return;
    enum family family = family_made(answer.kind);
    uint32_t named; /* the first field after the header: what is closed, or the parent */
    memcpy(&named, message + sizeof(answer), answer.kind > KB_HOST_INFO ? sizeof(named) : 0);
    if (family != OF_NOTHING) {
        struct kb_handle_reply made;
        memcpy(&made, reply, sizeof(made));
        if (made.handle && g->count[family] < MOST_HANDLES) {
            g->handles[family][g->count[family]] = made.handle;
            g->parents[family][g->count[family]++] = named;
        }
    } else if (answer.kind == KB_CLOSE) {
        forget(g, named);
    } else if (answer.kind == KB_EXECUTE && reply_bytes >= sizeof(struct kb_stop)) {
        struct kb_stop stop;
        memcpy(&stop, reply, sizeof(stop));
        g->io_wanted = stop.exit_reason == KVM_EXIT_IO && !stop.io_is_out        ? stop.io_size * stop.io_count
                       : stop.exit_reason == KVM_EXIT_MMIO && !stop.mmio_is_write ? stop.mmio_size
                                                                                  : 0;
    }
}
