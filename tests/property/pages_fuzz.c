/* SPDX-License-Identifier: Apache-2.0
 *
 * The page loops under the address and undefined-behaviour sanitizers, without Python: random
 * histories of a small guest must arrive, and damaged batches must be refused or applied without a
 * byte out of bounds.  Every buffer is exactly as large as its contents, so that any overrun is
 * seen.  Usage: pages_fuzz ROUNDS SEED
 */
#define PAGES_PLAIN
#include "_pages.h"

#include <stdio.h>
#include <stdlib.h>

#define PAGES 16u

static uint64_t state;

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

static void write_page(uint8_t *page)
{
    size_t at;
    switch (draw(5)) {
    case 0:
        break;
    case 1:
        for (uint64_t n = draw(9); n > 0; n--)
            page[draw(PAGE_BYTES)] ^= (uint8_t)draw(256);
        break;
    case 2:
        memset(page, 0, PAGE_BYTES);
        break;
    case 3:
        for (at = 0; at < PAGE_BYTES; at += 8)
            store64(page + at, draw(0) + state);
        break;
    default:
        at = draw(PAGE_BYTES);
        memset(page + at, (int)draw(256), PAGE_BYTES - at);
    }
}

/* Flip some bits of a copy of body, cut it anywhere, and see that it does no harm. */
static int damage(const uint8_t *body, size_t length, uint8_t *memory)
{
    size_t cut = draw(2) ? length : draw(length + 1), bad = 0;
    uint8_t *copy = take(cut);
    memcpy(copy, body, cut);
    for (uint64_t n = draw(4); n > 0 && cut > 0; n--)
        copy[draw(2) ? draw(cut) : draw(cut < 64 ? cut : 64)] ^= (uint8_t)(1u << draw(8));
    uint64_t count = pages_verify(copy, cut, PAGES, &bad);
    if (count != UINT64_MAX)
        pages_apply(copy, cut, memory);
    else
        check(bad < cut, "a refused byte lies within the batch");
    free(copy);
    return count != UINT64_MAX;
}

static void epoch(uint8_t *guest, uint8_t *reference, uint8_t *have, uint8_t *shell,
                  uint64_t tally[2])
{
    uint64_t count = draw(PAGES + 1), first = draw(PAGES);
    uint64_t *gfns = take(count * 8);
    uint8_t *data = take(count * PAGE_BYTES), *out = take(count * RECORD_MOST);
    struct figures figures;
    size_t bad = 0;

    for (uint64_t i = 0; i < count; i++) {
        gfns[i] = (first + i) % PAGES;
        write_page(guest + gfns[i] * PAGE_BYTES);
    }
    check(gfns_check(gfns, count, PAGES) == count, "frames are within the guest");
    pages_gather(guest, gfns, count, data);
    pages_encode(gfns, count, data, reference, have, out, &figures);

    uint8_t *body = take(figures.used);
    memcpy(body, out, figures.used);
    check(pages_verify(body, figures.used, PAGES, &bad) ==
              figures.zero + figures.delta + figures.raw,
          "what was encoded is a good batch");
    pages_apply(body, figures.used, shell);
    for (uint64_t i = 0; i < count; i++) {
        size_t at = gfns[i] * PAGE_BYTES;
        check(!memcmp(shell + at, guest + at, PAGE_BYTES), "the page arrived");
        check(!memcmp(reference + at, guest + at, PAGE_BYTES), "the reference is what arrived");
    }
    uint64_t room = draw(PAGES + 1), hand = draw(PAGES), *forgotten = take(room * 8);
    uint64_t gone = reference_forget(have, PAGES, &hand, room, forgotten);
    check(gone <= room && hand < PAGES, "no more is forgotten than asked for");
    for (uint64_t i = 0; i < gone; i++) {
        check((have[forgotten[i]] & (REF_HELD | REF_STATE)) != (REF_HELD | REF_SAME), "it is gone");
        memset(reference + forgotten[i] * PAGE_BYTES, 0, PAGE_BYTES);
    }
    free(forgotten);
    uint8_t *scratch = take(PAGES * PAGE_BYTES);
    memset(scratch, 0, PAGES * PAGE_BYTES);
    for (int n = 0; n < 8; n++)
        tally[damage(body, figures.used, scratch)]++;

    uint64_t exclude[4];
    for (unsigned i = 0; i < 4; i++)
        exclude[i] = (i ? exclude[i - 1] + 1 : 0) + draw(4);
    check(is_ascending(exclude, 4), "what is excluded ascends");
    check(gfns_subtract(gfns, count, exclude, 4) <= count, "subtracting adds nothing");
    free(scratch), free(body), free(out), free(data), free(gfns);
}

static void bitmaps(void)
{
    size_t bytes = draw(40);
    uint8_t *bitmap = take(bytes);
    for (size_t i = 0; i < bytes; i++)
        bitmap[i] = (uint8_t)draw(256);
    uint64_t nbits = draw(bytes * 8 + 1), total = bitmap_count(bitmap, nbits);
    uint64_t room = draw(total + 1), *out = take(room * 8), grant;
    uint64_t first = draw(1000), found = bitmap_scan(bitmap, nbits, first, out, room);
    check(found == room, "a scan fills the room there is");
    check(room == 0 || (out[0] >= first && out[room - 1] < first + nbits), "a scan stays inside");
    grants_writable(bitmap, bytes / 8, &grant, 1);
    uint64_t gfns[4], exclude[4];
    for (unsigned i = 0; i < 4; i++) {
        gfns[i] = draw(400);
        exclude[i] = (i ? exclude[i - 1] + 1 : 0) + draw(100);
    }
    uint64_t left = bitmap_without(bitmap, nbits, exclude, 4, out, room);
    check(left <= total && left + 4 >= total, "four frames at most are left out");
    bitmap_mark(bitmap, nbits, gfns, 4, exclude, 4);
    check(bitmap_count(bitmap, nbits) >= total, "marking takes nothing away");
    check(bitmap_first(bitmap, nbits, gfns, 4) <= 4, "a frame that is set, or none");
    uint8_t *guest = take(nbits * PAGE_BYTES), *data = take(room * PAGE_BYTES);
    memset(guest, 7, nbits * PAGE_BYTES);
    found = pages_stage(guest, bitmap, nbits, gfns, 4, exclude, 4, out, data, room);
    check(found <= nbits, "a page is staged once");
    check(found > room || !found || data[found * PAGE_BYTES - 1] == 7, "what fits is copied");
    free(data), free(guest), free(out), free(bitmap);
}

static void conditions(void)
{
    uint64_t bytes = draw(40), words[2 * CONDITION_WORDS];
    uint8_t *memory = take(bytes);
    memset(memory, (int)draw(256), bytes);
    for (unsigned i = 0; i < 2 * CONDITION_WORDS; i++)
        words[i] = draw(8) ? draw(48) : UINT64_MAX;
    if (conditions_within(words, 2, bytes))
        check(conditions_check(memory, words, 2) <= 2, "a condition that does not hold, or none");
    free(memory);
}

static void rings(void)
{
    uint8_t *page = take(PAGE_BYTES), *other = take(PAGE_BYTES), *out = take(PAGE_BYTES);
    for (size_t i = 0; i < PAGE_BYTES; i += 8)
        store64(page + i, draw(0) + state);
    uint32_t answered = (uint32_t)(draw(0) + state), waiting = (uint32_t)draw(300);
    uint32_t asked = answered + waiting;
    memcpy(page, &asked, sizeof asked);
    memcpy(page + 8, &answered, sizeof answered);
    check(!receive_ring_whole(page, RESERVED_GRANTS) || !waiting, "no request names such a grant");
    memcpy(other, page, PAGE_BYTES);
    bytes_xor(page, other, PAGE_BYTES, out);
    check(page_is_zero(out), "what is equal has no difference");
    free(out), free(other), free(page);
}

int main(int argc, char **argv)
{
    uint64_t tally[2] = {0, 0};
    long rounds = argc > 1 ? atol(argv[1]) : 1000;
    state = argc > 2 ? strtoull(argv[2], NULL, 0) | 1 : 1;
    for (long round = 0; round < rounds; round++) {
        uint8_t *guest = take(PAGES * PAGE_BYTES), *shell = take(PAGES * PAGE_BYTES);
        uint8_t *reference = take(PAGES * PAGE_BYTES), *have = take(PAGES);
        memset(guest, 0, PAGES * PAGE_BYTES);
        memset(shell, 0x5a, PAGES * PAGE_BYTES);
        memset(reference, 0, PAGES * PAGE_BYTES);
        for (unsigned i = 0; i < PAGES; i++)
            have[i] = draw(10) ? REF_NONE : REF_WHOLE;
        for (int n = 0; n < 4; n++) {
            epoch(guest, reference, have, shell, tally);
            bitmaps();
            conditions();
            rings();
        }
        free(guest), free(shell), free(reference), free(have);
    }
    printf("damaged batches: %llu refused, %llu harmless\n", (unsigned long long)tally[0],
           (unsigned long long)tally[1]);
    return tally[0] && tally[1] ? 0 : 1;
}
