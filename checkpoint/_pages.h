/* SPDX-License-Identifier: Apache-2.0
 *
 * The loops over guest pages, free of Python.  docs/protocol.md ("Batch body") is the law of the
 * format that pages_encode writes and pages_verify checks.
 *
 * Guest memory and grant tables are mapped from a running guest and change while they are read:
 * every word that decides something is read once.  Nothing here allocates.
 */
#ifndef CHECKPOINT_PAGES_H
#define CHECKPOINT_PAGES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines, as every host that Xen's dirty log exists on"
#endif

#define PAGE_BYTES 4096u

static inline uint64_t load64(const void *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* Number of set bits among the first nbits of bitmap. */
static uint64_t bitmap_count(const uint8_t *bitmap, uint64_t nbits)
{
    uint64_t total = 0;
    uint64_t words = nbits / 64;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = load64(bitmap + 8 * i);
        if (word)
            total += (uint64_t)__builtin_popcountll(word);
    }
    for (uint64_t bit = words * 64; bit < nbits; bit++)
        total += (bitmap[bit / 8] >> (bit % 8)) & 1u;
    return total;
}

/* Numbers of the set bits, ascending, at most room of them.  Returns how many were written. */
static uint64_t bitmap_scan(const uint8_t *bitmap, uint64_t nbits, uint64_t *out, uint64_t room)
{
    uint64_t used = 0;
    uint64_t words = nbits / 64;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = load64(bitmap + 8 * i);
        while (word) {
            if (used == room)
                return used;
            out[used++] = i * 64 + (uint64_t)__builtin_ctzll(word);
            word &= word - 1;
        }
    }
    for (uint64_t bit = words * 64; bit < nbits; bit++) {
        if ((bitmap[bit / 8] >> (bit % 8)) & 1u) {
            if (used == room)
                return used;
            out[used++] = bit;
        }
    }
    return used;
}

/* Index of the first frame number that is not below pages; count when all are. */
static uint64_t gfns_check(const uint64_t *gfns, uint64_t count, uint64_t pages)
{
    for (uint64_t i = 0; i < count; i++)
        if (gfns[i] >= pages)
            return i;
    return count;
}

/* Copy page gfns[i] of memory to place i of out.  The caller has checked the frame numbers. */
static void pages_gather(const uint8_t *memory, const uint64_t *gfns, uint64_t count, uint8_t *out)
{
    for (uint64_t i = 0; i < count; i++)
        memcpy(out + i * PAGE_BYTES, memory + gfns[i] * PAGE_BYTES, PAGE_BYTES);
}

#endif
