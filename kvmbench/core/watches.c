/* What the stepping loop compares after every step: bytes of memory, and addresses. */
#include "job.h"

#include <string.h>

/* Holds the watched regions; each must belong to the vcpu's VM. */
int watches_open(struct job *job, uint8_t *before, size_t room)
{
    job->before = before;
    for (uint32_t n = 0; n < job->request->n_watches; n++) {
        struct kb_watch *watch = &job->watch[n];
        memcpy(watch, job->watches + n * sizeof(*watch), sizeof(*watch));
        struct region *region =
            (struct region *)object_get(job->x->core, watch->region, SORT_REGION);
        job->regions[n] = region;
        if (!region || region->object.vm != job->vcpu->object.vm)
            return KB_BAD_HANDLE;
        if (watch->length_bytes == 0 || watch->length_bytes > KB_MAX_WATCH_BYTES)
            return KB_BAD_VALUE;
        if (watch->offset > region->size_bytes ||
            watch->length_bytes > region->size_bytes - watch->offset)
            return KB_BAD_RANGE;
        if (watch->length_bytes > room)
            return KB_TOO_LARGE;
        room -= watch->length_bytes;
        job->live[n] = region->mapping->address + watch->offset;
        memcpy(before, job->live[n], watch->length_bytes);
        before += watch->length_bytes;
    }
    return 0;
}

void watches_forget(struct job *job)
{
    uint8_t *before = job->before;

    for (uint32_t n = 0; n < job->request->n_watches; n++) {
        memcpy(before, job->live[n], job->watch[n].length_bytes);
        before += job->watch[n].length_bytes;
    }
}

void watches_close(struct job *job)
{
    for (uint32_t n = 0; n < KB_MAX_WATCHES && job->regions[n]; n++)
        object_put(&job->regions[n]->object);
}

/* Which of them changed also goes into stop->value, a bit each. */
bool watch_changed(struct job *job, uint32_t *index)
{
    _Static_assert(KB_MAX_WATCHES <= 64, "a bit each");
    uint8_t *before = job->before;
    bool changed = false;

    for (uint32_t n = 0; n < job->request->n_watches; n++) {
        size_t length = job->watch[n].length_bytes;
        if (memcmp(before, job->live[n], length) != 0) {
            memcpy(before, job->live[n], length);
            if (!changed)
                *index = n;
            changed = true;
            job->stop->value |= 1ull << n;
        }
        before += length;
    }
    return changed;
}

bool stop_at(const struct job *job, uint64_t linear_pc, uint32_t *index)
{
    for (uint32_t n = 0; n < job->request->n_stops; n++) {
        uint64_t stop;
        memcpy(&stop, job->stops + 8ull * n, sizeof(stop));
        if (stop == linear_pc) {
            *index = n;
            return true;
        }
    }
    return false;
}
