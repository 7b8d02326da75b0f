/* SPDX-License-Identifier: Apache-2.0
 *
 * The page loops of checkpoint/_pages.h, each against memcpy of the same bytes, without Python.
 *
 *     loops check TRACE                 whether both deltas bring every page to the other side
 *     loops time TRACE REPETITIONS     a line for each loop and repetition: name, nanoseconds,
 *                                      bytes that it made, pages that it went through
 *     loops once TRACE LOOP            run one loop once; for callgrind, which is told to count
 *                                      only inside of the functions measured_*
 *
 * TRACE is what bench/traces.py writes: little-endian 64-bit words {pages of the guest, epochs},
 * then for each epoch {count}, count frame numbers, count pages as they were, count pages as they
 * became.
 */
#include "_pages.h"
#include "xbzrle.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define BATCH 256u
#define EACH(i, n) for (uint64_t i = 0; i < (n); i++)
#define MEASURED __attribute__((noinline, noclone)) static

/* Pages one after the other, over all epochs: gfn, what it was, what it became. */
static uint64_t guest_pages, total;
static uint64_t *gfns, *places;
static uint8_t *before, *after;

/* Working memory of the loops. */
static uint8_t *reference, *have, *out, *shell, *bodies;
static size_t *lengths;
static uint64_t *scanned, *left_out, batches, bitmap_bytes;
static uint8_t *bitmap;
static volatile uint64_t sink;

static void *take(size_t bytes)
{
    void *memory = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096 + 4096);
    if (!memory) {
        fprintf(stderr, "loops: no memory for %zu bytes\n", bytes);
        exit(1);
    }
    return memset(memory, 0, (bytes + 4095) / 4096 * 4096);
}

static void want(void *to, size_t size, FILE *file)
{
    if (size && fread(to, size, 1, file) != 1) {
        fprintf(stderr, "loops: the trace ends early\n");
        exit(1);
    }
}

static void load(const char *path)
{
    FILE *file = fopen(path, "rb");
    uint64_t head[2], count;
    if (!file) {
        perror(path);
        exit(1);
    }
    want(head, sizeof head, file);
    guest_pages = head[0];
    long first = ftell(file);
    EACH(epoch, head[1]) {
        want(&count, sizeof count, file);
        total += count;
        fseek(file, (long)(count * (8 + 2 * PAGE_BYTES)), SEEK_CUR);
    }
    fseek(file, first, SEEK_SET);
    gfns = take(total * 8);
    places = take(total * 8);
    before = take(total * PAGE_BYTES);
    after = take(total * PAGE_BYTES);
    uint64_t at = 0;
    EACH(epoch, head[1]) {
        want(&count, sizeof count, file);
        want(gfns + at, count * 8, file);
        want(before + at * PAGE_BYTES, count * PAGE_BYTES, file);
        want(after + at * PAGE_BYTES, count * PAGE_BYTES, file);
        at += count;
    }
    fclose(file);
    if (gfns_check(gfns, total, guest_pages) != total) {
        fprintf(stderr, "loops: a frame of the trace is outside of its guest\n");
        exit(1);
    }
    EACH(i, total) places[i] = i;
}

/* ---- The loops ---- */

MEASURED void measured_memcpy(void)
{
    EACH(i, total) memcpy(out + i * PAGE_BYTES, after + i * PAGE_BYTES, PAGE_BYTES);
}

MEASURED void measured_zero(void) /* of pages that are: no other takes longer */
{
    uint64_t found = 0;
    EACH(i, total) found += (uint64_t)page_is_zero(shell + i * PAGE_BYTES);
    sink = found;
}

MEASURED void measured_compare(void) /* of pages that did not change: no other takes longer */
{
    uint64_t found = 0;
    EACH(i, total) found += lines_changed(after + i * PAGE_BYTES, reference + i * PAGE_BYTES);
    sink = found;
}

MEASURED void measured_gather(void)
{
    pages_gather(after, places, total, out);
}

MEASURED void measured_delta(void)
{
    struct figures figures;
    size_t used = 0;
    for (uint64_t at = 0; at < total; at += BATCH) {
        uint64_t count = total - at < BATCH ? total - at : BATCH;
        pages_encode(places + at, count, after + at * PAGE_BYTES, reference, have, out, &figures);
        used += figures.used;
    }
    sink = used;
}

MEASURED void measured_verify(void)
{
    size_t at = 0, bad = 0;
    uint64_t found = 0;
    EACH(i, batches) {
        found += pages_verify(bodies + at, lengths[i], total, &bad);
        at += lengths[i];
    }
    sink = found;
}

MEASURED void measured_apply(void)
{
    size_t at = 0;
    EACH(i, batches) {
        pages_apply(bodies + at, lengths[i], shell);
        at += lengths[i];
    }
}

MEASURED void measured_scan(void)
{
    uint64_t found = bitmap_count(bitmap, bitmap_bytes * 8);
    sink = bitmap_scan(bitmap, bitmap_bytes * 8, 0, scanned, found);
}

MEASURED void measured_stage(void) /* a scan that leaves out what was staged before */
{
    sink = bitmap_without(bitmap, bitmap_bytes * 8, left_out, total / 8, scanned, total);
}

MEASURED void measured_xbzrle(void)
{
    uint64_t used = 0;
    EACH(i, total) {
        int size = xbzrle_encode(before + i * PAGE_BYTES, after + i * PAGE_BYTES, PAGE_BYTES, out,
                                 PAGE_BYTES);
        /* as QEMU does: what does not shrink goes whole, and the cache takes the new content */
        used += size < 0 ? PAGE_BYTES : (uint64_t)size;
        if (size)
            memcpy(reference + i * PAGE_BYTES, after + i * PAGE_BYTES, PAGE_BYTES);
    }
    sink = used;
}

/* ---- What must be there before a loop runs ---- */

static void with_reference_before(void)
{
    memcpy(reference, before, total * PAGE_BYTES);
    memset(have, REF_SAME, total);
}

static void with_reference_after(void)
{
    memcpy(reference, after, total * PAGE_BYTES);
}

static void with_zero_shell(void)
{
    memset(shell, 0, total * PAGE_BYTES);
}

static void with_bodies(void)
{
    struct figures figures;
    size_t at = 0;
    with_reference_before();
    memcpy(shell, before, total * PAGE_BYTES);
    batches = 0;
    for (uint64_t i = 0; i < total; i += BATCH) {
        uint64_t count = total - i < BATCH ? total - i : BATCH;
        pages_encode(places + i, count, after + i * PAGE_BYTES, reference, have, bodies + at,
                     &figures);
        lengths[batches++] = figures.used;
        at += figures.used;
    }
}

static void with_bitmap(void)
{
    memset(bitmap, 0, bitmap_bytes);
    EACH(i, total) bitmap[gfns[i] / 8] |= (uint8_t)(1u << (gfns[i] % 8));
}

static int by_number(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return (a > b) - (a < b);
}

static void with_left_out(void)
{
    with_bitmap();
    memcpy(left_out, gfns, total / 8 * 8);
    qsort(left_out, total / 8, 8, by_number);
}

static void with_nothing(void)
{
}

static const struct loop {
    const char *name;
    void (*prepare)(void), (*run)(void);
} loops[] = {
    {"memcpy", with_nothing, measured_memcpy},
    {"zero", with_zero_shell, measured_zero},
    {"compare", with_reference_after, measured_compare},
    {"gather", with_nothing, measured_gather},
    {"delta", with_reference_before, measured_delta},
    {"xbzrle", with_reference_before, measured_xbzrle},
    {"verify", with_bodies, measured_verify},
    {"apply", with_bodies, measured_apply},
    {"scan", with_bitmap, measured_scan},
    {"stage", with_left_out, measured_stage},
};
#define LOOPS (sizeof loops / sizeof loops[0])

/* Whether what was encoded makes every page what it became, by either way of encoding. */
static int check(void)
{
    with_bodies();
    measured_apply();
    if (memcmp(shell, after, total * PAGE_BYTES) || memcmp(reference, after, total * PAGE_BYTES))
        return 0;
    EACH(i, total) {
        const uint8_t *new = after + i * PAGE_BYTES;
        int size = xbzrle_encode(before + i * PAGE_BYTES, new, PAGE_BYTES, out, PAGE_BYTES);
        memcpy(shell, before + i * PAGE_BYTES, PAGE_BYTES);
        if (size >= 0 && (xbzrle_decode(out, (size_t)size, shell, PAGE_BYTES) ||
                          memcmp(shell, new, PAGE_BYTES)))
            return 0;
    }
    return 1;
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static size_t bytes_out(const struct loop *loop)
{
    /* what delta and XBZRLE make of the trace; of the others, the bytes that they go through */
    int encodes = loop->run == measured_delta || loop->run == measured_xbzrle;
    return encodes ? (size_t)sink : total * PAGE_BYTES;
}

int main(int argc, char **argv)
{
    if (argc != (argc > 1 && !strcmp(argv[1], "check") ? 3 : 4)) {
        fprintf(stderr, "usage: loops check TRACE | time TRACE REPETITIONS | once TRACE LOOP\n");
        return 2;
    }
    load(argv[2]);
    reference = take(total * PAGE_BYTES);
    have = take(total);
    out = take((total > BATCH ? total : BATCH) * (uint64_t)RECORD_MOST);
    shell = take(total * PAGE_BYTES);
    bodies = take(total * (uint64_t)RECORD_MOST);
    lengths = take((total / BATCH + 1) * sizeof *lengths);
    bitmap_bytes = (guest_pages + 63) / 64 * 8;
    bitmap = take(bitmap_bytes);
    scanned = take(bitmap_bytes * 8 * 8);
    left_out = take(total * 8);
    if (!strcmp(argv[1], "check")) {
        puts(check() ? "good" : "a page did not arrive");
        return !check();
    }
    if (!strcmp(argv[1], "once")) {
        for (size_t i = 0; i < LOOPS; i++) {
            if (!strcmp(argv[3], loops[i].name)) {
                loops[i].prepare();
                loops[i].run();
                printf("%" PRIu64 " pages\n", total);
                return 0;
            }
        }
        fprintf(stderr, "loops: no loop %s\n", argv[3]);
        return 2;
    }
    /* By turns, so that a change of the machine's speed meets all of them. */
    for (long repetition = 0; repetition < atol(argv[3]); repetition++) {
        for (size_t i = 0; i < LOOPS; i++) {
            loops[i].prepare();
            int64_t begin = now();
            loops[i].run();
            int64_t end = now();
            printf("%s %" PRId64 " %zu %" PRIu64 "\n", loops[i].name, end - begin,
                   bytes_out(&loops[i]), total);
        }
    }
    return 0;
}
