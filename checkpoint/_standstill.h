/* SPDX-License-Identifier: Apache-2.0
 *
 * The ordinary course of a standstill: what a paused guest waits for at every checkpoint, as long
 * as it is what it was at the last one.  checkpoint/xen/standstill.h says what each function does,
 * checkpoint/xen/standstill.py why.
 *
 * Whatever is out of the ordinary ends a function before it has changed anything that the same step
 * in Python would not do again.  What the guest or a backend may write is read once, and leads
 * nowhere unchecked.
 */
#ifndef CHECKPOINT_STANDSTILL_H
#define CHECKPOINT_STANDSTILL_H

#include <errno.h>

#include "_pages.h"
#include "xen/standstill.h"

/* xen/include/public/xen.h: struct multicall_entry is {u64 op, s64 result, u64 args[6]}. */
#define MULTICALL 13u /* __HYPERVISOR_multicall */
#define ENTRY_BYTES 64u
#define RESULT_AT 8u

/* xen/include/public/domctl.h: XEN_DOMCTL_SHADOW_OP_PEEK. */
#define LOG_PEEK 12u

/* xen/include/public/io/ring.h: req_prod, req_event, rsp_prod, rsp_event. */
#define REQUESTS_AT 0u
#define RESPONSES_AT 8u

/* xen/include/public/io/xs_wire.h: two buffers, then req_cons, req_prod, rsp_cons, rsp_prod. */
#define STORE_INDICES_AT 2048u

#define EXPORTED __attribute__((visibility("default")))

typedef uint32_t unaligned32 __attribute__((aligned(1), may_alias));

static inline uint32_t live32(const uint8_t *at)
{
    return *(const volatile unaligned32 *)at;
}

/* Make the calls from entry first on; 0 or -errno. */
static int trip_make(const struct standstill *still, const struct trip *trip, uint64_t first)
{
    memcpy(trip->buffer, trip->request, trip->bytes);
    errno = 0;
    if (still->multicall(still->multicall_handle, MULTICALL,
                         (uintptr_t)trip->buffer + first * ENTRY_BYTES, trip->entries - first) < 0)
        return errno > 0 ? -errno : -EIO;
    return 0;
}

/* Whether Xen refused one of an entry's calls. */
static int trip_refused(const struct trip *trip, uint64_t number)
{
    return (int64_t)load64(trip->buffer + number * ENTRY_BYTES + RESULT_AT) < 0;
}

/* Whether a vCPU is somewhere in the code that reads the clock and may not be interrupted there for
 * good. */
static int reads_clock(const struct standstill *still, const uint8_t *context)
{
    for (uint64_t i = 0; i < still->pointers_at.count; i++) {
        uint64_t pointer = load64(context + still->pointers_at.at[i]), below = 0, spared = 0;
        while (below < still->clock_code.count && still->clock_code.at[below] <= pointer)
            below++;
        for (uint64_t j = 0; j < still->rereads.count; j++)
            spared |= still->rereads.at[j] == pointer;
        if (below % 2 && !spared)
            return 1;
    }
    return 0;
}

EXPORTED int kemari_stop(struct standstill *still, int pause)
{
    const struct trip *stop = &still->stop;
    int error = trip_make(still, stop, pause ? 0 : 1);
    if (error)
        return error;
    /* An entry that was not made has the request's result, 0. */
    if (trip_refused(stop, 0) || trip_refused(stop, 1) ||
        live32(stop->buffer + still->used_at) != still->context_size ||
        reads_clock(still, stop->buffer + still->context_at))
        return 1;
    if (conditions_check(still->ram, still->conditions.at,
                         still->conditions.count / CONDITION_WORDS) !=
        still->conditions.count / CONDITION_WORDS)
        return 1;
    memcpy(still->outside.to, still->outside.of, still->outside.bytes);
    uint32_t indices[4];
    memcpy(indices, still->outside.to + STORE_INDICES_AT, sizeof indices);
    if (indices[0] != indices[1] || indices[2] != indices[3])
        return 1;
    for (uint64_t i = 0; i < still->awaited.count; i++) {
        const uint8_t *ring = still->ram + still->awaited.at[i] * PAGE_BYTES;
        if (live32(ring + REQUESTS_AT) != live32(ring + RESPONSES_AT))
            return 1;
    }
    return 0;
}

EXPORTED int kemari_copy_shared(struct standstill *still)
{
    const struct words *shared = &still->shared;
    uint64_t entries = still->grants.bytes / 8;

    if (memcmp(still->stop.buffer + still->answers_at, still->answers.at,
               8 * still->answers.count) ||
        shared->count > still->capacity)
        return 1;
    memcpy(still->grants.to, still->grants.of, still->grants.bytes);
    still->under_grants = grants_writable(still->grants.to, entries, still->granted, entries);
    memcpy(still->gfns, shared->at, 8 * shared->count);
    pages_gather(still->ram, shared->at, shared->count, still->data);
    for (uint64_t i = 0; i < still->receiving.count; i++)
        if (!receive_ring_whole(still->data + still->receiving.at[i] * PAGE_BYTES, entries))
            return 1;
    return 0;
}

EXPORTED int kemari_read_log(struct standstill *still, uint64_t keep)
{
    uint8_t *place = still->bitmap + still->mark / 8, bit = (uint8_t)(1u << still->mark % 8);

    *place &= (uint8_t)~bit;
    if (still->log_control(still->log_handle, still->domid, LOG_PEEK, still->log_buffer,
                           still->pages, 0, NULL) != (long long)still->pages ||
        !(*place & bit))
        return 1;
    return bitmap_count(still->bitmap, still->pages) > keep ? 2 : 0;
}

EXPORTED uint64_t kemari_copy_dirty(struct standstill *still, uint64_t staged)
{
    if (staged > still->capacity ||
        bitmap_first(still->bitmap, still->pages, still->absent.at, still->absent.count) !=
            still->absent.count)
        return UINT64_MAX;
    uint64_t room = still->capacity - staged;
    uint64_t found = pages_stage(still->ram, still->bitmap, still->pages, still->granted,
                                 still->under_grants, still->left_out.at, still->left_out.count,
                                 still->gfns + staged, still->data + staged * PAGE_BYTES, room);
    return found > room ? UINT64_MAX : staged + found;
}

EXPORTED int kemari_let_go(struct standstill *still)
{
    int error = trip_make(still, &still->go, 0);
    return error ? error : trip_refused(&still->go, 0) || trip_refused(&still->go, 1);
}

#endif
