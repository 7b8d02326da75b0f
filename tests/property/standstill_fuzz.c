/* SPDX-License-Identifier: Apache-2.0
 *
 * The native standstill under the address and undefined-behaviour sanitizers, without Python or
 * Xen: guests that say anything in their rings, grants and log, staging buffers of any size.  Every
 * buffer is exactly as large as its contents, so that any overrun is seen.
 * Usage: standstill_fuzz ROUNDS SEED
 */
#define PAGES_PLAIN
#include "_standstill.h"

#include <stdio.h>
#include <stdlib.h>

#define PAGES 70u
#define ENTRIES 4u
#define CONTEXT 200u
#define GRANT_ENTRIES 40u
#define OUTSIDE 2u

static uint64_t state;
static uint64_t answers[3];

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return below ? state % below : 0;
}

static void check(int holds, const char *what)
{
    if (!holds) {
        fprintf(stderr, "does not hold: %s\n", what);
        exit(1);
    }
}

static void *take(size_t bytes)
{
    void *memory = malloc(bytes ? bytes : 1);
    check(memory != NULL, "memory for the test");
    return memory;
}

static void scatter(uint8_t *at, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        at[i] = draw(3) ? 0 : (uint8_t)draw(256);
}

static struct words some(uint64_t most, uint64_t below)
{
    struct words words = {.count = draw(most + 1)};
    uint64_t *numbers = take(8 * words.count), last = 0;
    for (uint64_t i = 0; i < words.count; i++) {
        last = numbers[i] = last + (i > 0) + draw(below / (most + 1));
        check(last < below, "a number of the test is in range");
    }
    words.at = numbers;
    return words;
}

static int xen(void *still_, unsigned int operation, uint64_t entries, uint64_t count)
{
    struct standstill *still = still_;
    uint8_t *first = (uint8_t *)(uintptr_t)entries;

    check(operation == MULTICALL, "a multicall is asked for");
    for (uint64_t i = 0; i < count; i++)
        if (!draw(20))
            store64(first + i * ENTRY_BYTES + RESULT_AT, (uint64_t)-(int64_t)(1 + draw(40)));
    if (first >= still->stop.buffer && first < still->stop.buffer + 2 * ENTRY_BYTES) {
        uint32_t used = draw(10) ? CONTEXT : (uint32_t)draw(1 << 20);
        memcpy(still->stop.buffer + still->used_at, &used, sizeof used);
        scatter(still->stop.buffer + still->context_at, CONTEXT);
        if (!draw(10))
            answers[draw(3)]++;
        memcpy(still->stop.buffer + still->answers_at, answers, sizeof answers);
    }
    errno = draw(2) ? (int)draw(40) : 0;
    return draw(20) ? 0 : -1;
}

static long long log_call(void *still_, uint32_t domid, unsigned int operation, void *buffer,
                          unsigned long pages, unsigned int mode, void *stats)
{
    struct standstill *still = still_;
    check(domid == 7 && operation == LOG_PEEK && buffer == still && !mode && !stats, "a peek");
    scatter(still->bitmap, (pages + 7) / 8);
    if (draw(5))
        still->bitmap[still->mark / 8] |= (uint8_t)(1u << still->mark % 8);
    return draw(20) ? (long long)pages : -1;
}

static void one_round(void)
{
    struct standstill still = {.multicall = xen, .log_control = log_call, .domid = 7, .mark = 0};
    uint64_t used_at = ENTRIES * ENTRY_BYTES, context_at = used_at + 8;
    uint64_t answers_at = context_at + CONTEXT, buffer = answers_at + sizeof answers;
    uint8_t *ram = take(PAGES * PAGE_BYTES), *outside = take(OUTSIDE * PAGE_BYTES);
    uint8_t *grants = take(8 * GRANT_ENTRIES), *request = take(buffer);
    uint64_t known[3];

    still.multicall_handle = still.log_handle = still.log_buffer = &still;
    scatter(ram, PAGES * PAGE_BYTES);
    scatter(outside, OUTSIDE * PAGE_BYTES);
    scatter(grants, 8 * GRANT_ENTRIES);
    memset(request, 0, buffer);
    memcpy(known, answers, sizeof known);
    still.stop = (struct trip){take(buffer), request, buffer, ENTRIES};
    still.go = (struct trip){take(2 * ENTRY_BYTES), request, 2 * ENTRY_BYTES, 2};
    still.used_at = used_at, still.context_at = context_at, still.answers_at = answers_at;
    still.context_size = CONTEXT;
    still.answers = (struct words){known, 3};
    still.ram = ram, still.pages = PAGES;
    still.pointers_at = some(3, CONTEXT - 7);
    still.clock_code = some(4, 1 << 16), still.rereads = some(2, 1 << 16);
    uint64_t condition[3] = {draw(PAGES * PAGE_BYTES - 7), draw(4), 0};
    still.conditions = (struct words){condition, 3 * draw(2)};
    still.outside = (struct copied){outside, take(OUTSIDE * PAGE_BYTES), OUTSIDE * PAGE_BYTES};
    if (draw(4))
        memset(outside + STORE_INDICES_AT, 0, 16);
    still.awaited = some(2, PAGES);
    for (uint64_t i = 0; draw(3) && i < still.awaited.count; i++)
        memset(ram + still.awaited.at[i] * PAGE_BYTES, 0, 16);
    still.grants = (struct copied){grants, take(8 * GRANT_ENTRIES), 8 * GRANT_ENTRIES};
    still.granted = take(8 * GRANT_ENTRIES);
    still.shared = some(6, PAGES);
    still.receiving = some(1, still.shared.count + 1);
    if (still.receiving.count && still.receiving.at[0] >= still.shared.count)
        still.receiving.count = 0;
    still.bitmap = take((PAGES + 63) / 64 * 8);
    still.absent = some(2, PAGES), still.left_out = some(5, PAGES);
    still.capacity = draw(PAGES + 20);
    still.gfns = take(8 * still.capacity), still.data = take(still.capacity * PAGE_BYTES);

    kemari_stop(&still, (int)draw(2));
    if (kemari_copy_shared(&still) == 0) {
        uint64_t staged = still.shared.count;
        check(staged <= still.capacity, "shared pages fit");
        kemari_read_log(&still, draw(PAGES));
        uint64_t count = kemari_copy_dirty(&still, staged);
        check(count == UINT64_MAX || count <= still.capacity, "pages fit");
        for (uint64_t i = 0; count != UINT64_MAX && i < count; i++)
            check(still.gfns[i] < PAGES && !memcmp(still.data + i * PAGE_BYTES,
                                                   ram + still.gfns[i] * PAGE_BYTES, PAGE_BYTES),
                  "what is staged is the guest's");
    }
    kemari_let_go(&still);

    void *made[] = {ram, outside, grants, request, still.stop.buffer, still.go.buffer,
                    (void *)still.pointers_at.at, (void *)still.clock_code.at,
                    (void *)still.rereads.at, still.outside.to, (void *)still.awaited.at,
                    still.grants.to, still.granted, (void *)still.shared.at,
                    (void *)still.receiving.at, still.bitmap, (void *)still.absent.at,
                    (void *)still.left_out.at, still.gfns, still.data};
    for (size_t i = 0; i < sizeof made / sizeof *made; i++)
        free(made[i]);
}

int main(int argc, char **argv)
{
    check(argc == 3, "usage: standstill_fuzz ROUNDS SEED");
    uint64_t rounds = strtoull(argv[1], NULL, 10);
    state = strtoull(argv[2], NULL, 10) | 1;
    for (uint64_t round = 0; round < rounds; round++)
        one_round();
    printf("%llu standstills\n", (unsigned long long)rounds);
    return 0;
}
