/* SPDX-License-Identifier: Apache-2.0
 *
 * XBZRLE, the page delta of QEMU's migration, written from the description of its format in QEMU's
 * docs/devel/migration (before: docs/xbzrle.txt): runs of unchanged bytes and runs of new bytes, by
 * turns, each with its length as ULEB128.  It is what the benchmark holds this project's own deltas
 * against; nothing else uses it.
 */
#ifndef BENCH_XBZRLE_H
#define BENCH_XBZRLE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint64_t xbzrle_word(const uint8_t *from)
{
    uint64_t word;
    memcpy(&word, from, sizeof word);
    return word;
}

/* A length below 16384 as ULEB128; returns the bytes that it took. */
static size_t xbzrle_length(uint8_t *out, size_t length)
{
    if (length < 0x80) {
        out[0] = (uint8_t)length;
        return 1;
    }
    out[0] = (uint8_t)(length | 0x80);
    out[1] = (uint8_t)(length >> 7);
    return 2;
}

/* Encode a page of size bytes against old; returns the bytes written, 0 when nothing changed, -1
 * when they would not fit room. */
static int xbzrle_encode(const uint8_t *old, const uint8_t *new, size_t size, uint8_t *out,
                         size_t room)
{
    size_t at = 0, used = 0;
    while (at < size) {
        size_t from = at;
        while (at < size) {
            uint64_t difference =
                at + 8 <= size ? xbzrle_word(old + at) ^ xbzrle_word(new + at) : 1;
            if (!difference) {
                at += 8;
            } else if (at + 8 <= size) {
                at += (size_t)__builtin_ctzll(difference) / 8;
                break;
            } else if (old[at] == new[at]) {
                at++;
            } else {
                break;
            }
        }
        if (at == size)
            break;
        size_t zeros = at - from, first = at;
        while (at < size) {
            if (at + 8 <= size) {
                /* a byte of the XOR that is zero ends the run; the usual test for one in a word */
                uint64_t difference = xbzrle_word(old + at) ^ xbzrle_word(new + at);
                uint64_t zero = (difference - 0x0101010101010101u) & ~difference &
                                0x8080808080808080u;
                if (!zero) {
                    at += 8;
                    continue;
                }
                at += (size_t)__builtin_ctzll(zero) / 8;
                break;
            }
            if (old[at] == new[at])
                break;
            at++;
        }
        size_t run = at - first;
        if (used + 4 + run > room)
            return -1;
        used += xbzrle_length(out + used, zeros);
        used += xbzrle_length(out + used, run);
        memcpy(out + used, new + first, run);
        used += run;
    }
    return (int)used;
}

/* Apply what xbzrle_encode wrote; -1 when it breaks the format. */
static int xbzrle_decode(const uint8_t *in, size_t length, uint8_t *page, size_t size)
{
    size_t at = 0, where = 0;
    while (at < length) {
        size_t run[2];
        for (int i = 0; i < 2; i++) {
            if (at >= length)
                return -1;
            run[i] = in[at++];
            if (run[i] & 0x80) {
                if (at >= length)
                    return -1;
                run[i] = (run[i] & 0x7f) | (size_t)in[at++] << 7;
            }
        }
        where += run[0];
        if (where + run[1] > size || at + run[1] > length)
            return -1;
        memcpy(page + where, in + at, run[1]);
        where += run[1];
        at += run[1];
    }
    return 0;
}

#endif
