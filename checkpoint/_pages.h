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

/* Numbers of the set bits, of which the first one's is given, ascending, at most room of them.
 * Returns how many were written. */
static uint64_t bitmap_scan(const uint8_t *bitmap, uint64_t nbits, uint64_t first, uint64_t *out,
                            uint64_t room)
{
    uint64_t used = 0;
    uint64_t words = nbits / 64;
    for (uint64_t i = 0; i < words; i++) {
        uint64_t word = load64(bitmap + 8 * i);
        while (word) {
            if (used == room)
                return used;
            out[used++] = first + i * 64 + (uint64_t)__builtin_ctzll(word);
            word &= word - 1;
        }
    }
    for (uint64_t bit = words * 64; bit < nbits; bit++) {
        if ((bitmap[bit / 8] >> (bit % 8)) & 1u) {
            if (used == room)
                return used;
            out[used++] = first + bit;
        }
    }
    return used;
}

/* Index of the first frame number whose bit is set; count when none is.  Bits from nbits on are not
 * looked at. */
static uint64_t bitmap_first(const uint8_t *bitmap, uint64_t nbits, const uint64_t *gfns,
                             uint64_t count)
{
    for (uint64_t i = 0; i < count; i++)
        if (gfns[i] < nbits && (bitmap[gfns[i] / 8] >> (gfns[i] % 8)) & 1u)
            return i;
    return count;
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

/* ---- Grant tables ---- */

/* xen/include/public/grant_table.h: grant_entry_v1 is {u16 flags, u16 domid, u32 frame}. */
#define GRANT_TYPE_MASK 3u
#define GRANT_PERMIT_ACCESS 1u
#define GRANT_WRITING (1u << 4)

typedef uint64_t unaligned64 __attribute__((aligned(1), may_alias));

/* Frames that the entries have under an active writable grant, at most room of them.  Returns how
 * many there are, which may be more than room. */
static uint64_t grants_writable(const uint8_t *entries, uint64_t count, uint64_t *out, uint64_t room)
{
    uint64_t found = 0;
    for (uint64_t i = 0; i < count; i++) {
        /* One load for the entry: the guest may change it between two. */
        uint64_t entry = *(const volatile unaligned64 *)(entries + 8 * i);
        if ((entry & GRANT_TYPE_MASK) == GRANT_PERMIT_ACCESS && (entry & GRANT_WRITING)) {
            if (found < room)
                out[found] = entry >> 32;
            found++;
        }
    }
    return found;
}

/* ---- Receive rings of network interfaces ---- */

/* xen/include/public/io/ring.h: req_prod, req_event, rsp_prod, rsp_event, then slots from byte 64;
 * io/netif.h: a slot is {u16 id, u16 pad, u32 grant}. */
#define RX_SLOTS 256u
#define RX_SLOTS_AT 64u
#define RESERVED_GRANTS 8u /* GNTTAB_NR_RESERVED_ENTRIES, xen/include/public/grant_table.h */

/* Whether every slot that waits for an answer still holds its request; checkpoint/xen/rings.py says
 * why a reference tells.  page is a copy that nobody writes. */
static int receive_ring_whole(const uint8_t *page, uint64_t grants)
{
    uint32_t indices[4];
    memcpy(indices, page, sizeof indices);
    uint32_t answered = indices[2], waiting = indices[0] - answered;
    if (waiting > RX_SLOTS)
        return 0;
    for (uint32_t i = 0; i < waiting; i++) {
        uint64_t slot = load64(page + RX_SLOTS_AT + 8 * ((answered + i) % RX_SLOTS));
        if (slot >> 32 < RESERVED_GRANTS || slot >> 32 >= grants)
            return 0;
    }
    return 1;
}

/* ---- Conditions on guest memory ---- */

#define CONDITION_WORDS 3u /* offset, mask, value */

/* Index of the first condition that does not hold; count when all do.  The caller has checked that
 * every offset has a word behind it. */
static uint64_t conditions_check(const uint8_t *memory, const uint64_t *words, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++, words += CONDITION_WORDS)
        if ((*(const volatile unaligned64 *)(memory + words[0]) & words[1]) != words[2])
            return i;
    return count;
}

/* Whether a word lies behind every offset. */
static int conditions_within(const uint64_t *words, uint64_t count, uint64_t length)
{
    for (uint64_t i = 0; i < count; i++)
        if (length < 8 || words[i * CONDITION_WORDS] > length - 8)
            return 0;
    return 1;
}

/* ---- Machine states ---- */

static void bytes_xor(const uint8_t *one, const uint8_t *other, size_t length, uint8_t *out)
{
    for (size_t i = 0; i < length; i++)
        out[i] = one[i] ^ other[i];
}

/* ---- Sorted sets of frame numbers ---- */

/* Whether values ascend strictly. */
static int is_ascending(const uint64_t *values, uint64_t count)
{
    for (uint64_t i = 1; i < count; i++)
        if (values[i - 1] >= values[i])
            return 0;
    return 1;
}

/* Place of gfn in values, which ascend, or where it would be. */
static uint64_t gfns_place(const uint64_t *values, uint64_t count, uint64_t gfn)
{
    uint64_t low = 0, high = count;
    while (low < high) {
        uint64_t middle = low + (high - low) / 2;
        if (values[middle] < gfn)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* Remove from gfns what exclude, which ascends, holds; keep the order.  Returns the new count.
 * Walks both in step while gfns ascend, and searches when they do not. */
static uint64_t gfns_subtract(uint64_t *gfns, uint64_t count, const uint64_t *exclude, uint64_t many)
{
    uint64_t kept = 0, at = 0, last = 0;
    for (uint64_t i = 0; i < count; i++) {
        uint64_t gfn = gfns[i];
        if (gfn < last) {
            at = gfns_place(exclude, at, gfn);
        } else {
            while (at < many && exclude[at] < gfn)
                at++;
        }
        last = gfn;
        if (at == many || exclude[at] != gfn)
            gfns[kept++] = gfn;
    }
    return kept;
}

/* Set the bits of those frames below nbits that exclude, which ascends, does not hold. */
static void bitmap_mark(uint8_t *bitmap, uint64_t nbits, const uint64_t *gfns, uint64_t count,
                        const uint64_t *exclude, uint64_t many)
{
    for (uint64_t i = 0; i < count; i++) {
        uint64_t gfn = gfns[i], at = gfns_place(exclude, many, gfn);
        if (gfn < nbits && (at == many || exclude[at] != gfn))
            bitmap[gfn / 8] |= (uint8_t)(1u << (gfn % 8));
    }
}

/* Numbers of the set bits that exclude, which ascends, does not hold, ascending, at most room of
 * them.  Returns how many there are, which may be more than room. */
static uint64_t bitmap_without(const uint8_t *bitmap, uint64_t nbits, const uint64_t *exclude,
                               uint64_t many, uint64_t *out, uint64_t room)
{
    uint64_t found = 0, at = 0;
    for (uint64_t first = 0; first < nbits; first += 64) {
        uint64_t word = 0, left = nbits - first;
        memcpy(&word, bitmap + first / 8, left < 64 ? (left + 7) / 8 : 8);
        if (left < 64)
            word &= ((uint64_t)1 << left) - 1;
        if (!word)
            continue;
        while (at < many && exclude[at] < first)
            at++;
        for (; at < many && exclude[at] - first < 64; at++)
            word &= ~((uint64_t)1 << (exclude[at] - first));
        for (; word; word &= word - 1, found++)
            if (found < room)
                out[found] = first + (uint64_t)__builtin_ctzll(word);
    }
    return found;
}

/* Copy the pages whose bits are set, and those of also, but none of exclude, which ascends, each
 * once, ascending, if there is room for all; the bitmap gets the bits of also.  Returns how many
 * they are, which may be more than room. */
static uint64_t pages_stage(const uint8_t *memory, uint8_t *bitmap, uint64_t nbits,
                            const uint64_t *also, uint64_t count, const uint64_t *exclude,
                            uint64_t many, uint64_t *gfns, uint8_t *data, uint64_t room)
{
    bitmap_mark(bitmap, nbits, also, count, exclude, many);
    uint64_t found = bitmap_without(bitmap, nbits, exclude, many, gfns, room);
    if (found <= room)
        pages_gather(memory, gfns, found, data);
    return found;
}

/* ---- The batch body ---- */

#define PAGE_WORDS 512u
#define LINES 64u      /* 64-byte lines of a page */
#define GROUPS 8u      /* groups of 64 words of a page: one bit each in a head's mask */
#define RECORD_MOST (8u + PAGE_BYTES)

#define KIND_ZERO 0u
#define KIND_RAW 1u
#define KIND_DELTA 2u

#define GFN_BITS 40
#define MASK_SHIFT 40
#define WORDS_SHIFT 48
#define KIND_SHIFT 60

/* More changed words than this and the page goes raw: the XOR of two different contents compresses
 * worse than the new content does. */
#define DELTA_MOST 256u

/* What the reference knows of a page ... */
#define REF_NONE 0u   /* nothing was sent yet, or it was forgotten */
#define REF_SAME 1u   /* the reference is what the standby has */
#define REF_WHOLE 2u  /* never a delta: somebody else may write the page on the standby */
#define REF_STATE 3u  /* mask of the three */
/* ... and of the memory that this takes. */
#define REF_HELD 4u   /* the page of the reference was written: it is in memory */
#define REF_USED 8u   /* it was of use since the hand of reference_forget passed it */

struct figures {
    uint64_t used, unchanged, zero, delta, raw, held;
};

static inline uint64_t record_head(uint64_t gfn, uint64_t mask, uint64_t words, uint64_t kind)
{
    return gfn | mask << MASK_SHIFT | words << WORDS_SHIFT | kind << KIND_SHIFT;
}

static inline void store64(void *to, uint64_t value)
{
    memcpy(to, &value, sizeof value);
}

#if defined(__x86_64__) && defined(__GNUC__)
#define PAGES_AVX2
#include <immintrin.h>
#endif

/* The loops that the compiler is asked to vectorise, once plainly and once for AVX2; the choice is
 * made when the module is loaded.  Sanitizers do not bear the resolver that this needs. */
#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && !defined(PAGES_PLAIN)
#define VECTORISED __attribute__((target_clones("avx2", "default"), noinline))
#else
#define VECTORISED
#endif

/* A bit for each 64-byte line in which the pages differ. */
static uint64_t lines_changed_plain(const uint8_t *page, const uint8_t *reference)
{
    uint64_t lines = 0;
    for (unsigned line = 0; line < LINES; line++) {
        uint64_t difference = 0;
        for (unsigned word = 0; word < 8; word++)
            difference |= load64(page + line * 64 + word * 8) ^
                          load64(reference + line * 64 + word * 8);
        lines |= (uint64_t)(difference != 0) << line;
    }
    return lines;
}

#ifdef PAGES_AVX2
/* The compiler's own vectors take three times as many instructions: it gathers eight words into one
 * where a single test tells whether any of them is not zero. */
__attribute__((target("avx2")))
static uint64_t lines_changed_avx2(const uint8_t *page, const uint8_t *reference)
{
    uint64_t lines = 0;
    for (unsigned line = 0; line < LINES; line++) {
        const __m256i *new = (const __m256i *)(const void *)(page + line * 64);
        const __m256i *old = (const __m256i *)(const void *)(reference + line * 64);
        __m256i low = _mm256_xor_si256(_mm256_loadu_si256(new), _mm256_loadu_si256(old));
        __m256i high = _mm256_xor_si256(_mm256_loadu_si256(new + 1), _mm256_loadu_si256(old + 1));
        __m256i both = _mm256_or_si256(low, high);
        lines |= (uint64_t)!_mm256_testz_si256(both, both) << line;
    }
    return lines;
}
#endif

static uint64_t lines_changed(const uint8_t *page, const uint8_t *reference)
{
#ifdef PAGES_AVX2
    if (__builtin_cpu_supports("avx2"))
        return lines_changed_avx2(page, reference);
#endif
    return lines_changed_plain(page, reference);
}

/* Whether the page is all zero; looks no further than the first 512 bytes that are not. */
VECTORISED
static int page_is_zero(const uint8_t *page)
{
    for (unsigned group = 0; group < GROUPS; group++) {
        uint64_t seen = 0;
        for (unsigned word = 0; word < 64; word++)
            seen |= load64(page + group * 512 + word * 8);
        if (seen)
            return 0;
    }
    return 1;
}

/* The XORs of the words that differ within the given lines, to words; maps[g] gets a bit for each
 * word of group g.  Returns how many words. */
static unsigned page_xor(const uint8_t *page, const uint8_t *reference, uint64_t lines,
                         uint64_t maps[GROUPS], uint64_t words[PAGE_WORDS])
{
    unsigned used = 0;
    memset(maps, 0, GROUPS * sizeof maps[0]);
    while (lines) {
        unsigned line = (unsigned)__builtin_ctzll(lines);
        uint64_t bits = 0;
        lines &= lines - 1;
        for (unsigned word = 0; word < 8; word++) {
            size_t at = line * 64 + word * 8;
            uint64_t difference = load64(page + at) ^ load64(reference + at);
            /* without a branch: the slot is taken only when the word differs */
            words[used] = difference;
            used += difference != 0;
            bits |= (uint64_t)(difference != 0) << word;
        }
        maps[line / 8] |= bits << (line % 8 * 8);
    }
    return used;
}

/* XOR listed words into a page. */
static void page_patch(uint8_t *page, unsigned mask, const uint8_t *maps, const uint8_t *words)
{
    while (mask) {
        unsigned group = (unsigned)__builtin_ctz(mask);
        uint64_t map = load64(maps);
        mask &= mask - 1;
        maps += 8;
        while (map) {
            uint8_t *at = page + group * 512 + (unsigned)__builtin_ctzll(map) * 8;
            store64(at, load64(at) ^ load64(words));
            words += 8;
            map &= map - 1;
        }
    }
}

/* Note that a page of the reference was written; whether it takes memory only since now.  Then it has
 * not yet been of use: what is written once makes room before what is written again and again. */
static unsigned reference_written(uint8_t *have)
{
    unsigned before = *have & REF_HELD;
    *have |= before ? REF_USED : REF_HELD;
    return !before;
}

/* Encode one page; the reference then holds what the standby will hold.  Returns the bytes written,
 * at most RECORD_MOST; 0 when the page need not be sent.
 *
 * What goes out is taken from the reference after it was brought up to date, or computed once: even
 * if the page changed meanwhile, both stay the same. */
static size_t page_encode(uint64_t gfn, const uint8_t *page, uint8_t *reference, uint8_t *have,
                          uint8_t *out, struct figures *figures)
{
    unsigned state = *have & REF_STATE;
    if (page_is_zero(page)) {
        /* A page that is only read takes no memory. */
        int was_zero = page_is_zero(reference);
        if (state == REF_SAME && was_zero) {
            figures->unchanged++;
            return 0;
        }
        if (!was_zero)
            memset(reference, 0, PAGE_BYTES);
        if (state == REF_NONE)
            *have |= REF_SAME;
        store64(out, record_head(gfn, 0, 0, KIND_ZERO));
        figures->zero++;
        return 8;
    }
    if (state == REF_SAME) {
        uint64_t maps[GROUPS], words[PAGE_WORDS];
        uint64_t lines = lines_changed(page, reference);
        unsigned changed = page_xor(page, reference, lines, maps, words);
        if (changed == 0) {
            *have |= REF_USED;
            figures->unchanged++;
            return 0;
        }
        if (changed <= DELTA_MOST) {
            unsigned mask = 0, groups = 0;
            for (unsigned group = 0; group < GROUPS; group++) {
                if (maps[group]) {
                    mask |= 1u << group;
                    store64(out + 8 + 8 * groups++, maps[group]);
                }
            }
            memcpy(out + 8 + 8 * groups, words, changed * 8);
            store64(out, record_head(gfn, mask, groups + changed, KIND_DELTA));
            page_patch(reference, mask, out + 8, out + 8 + 8 * groups);
            figures->held += reference_written(have);
            figures->delta++;
            return 8 + 8 * (size_t)(groups + changed);
        }
    }
    memcpy(reference, page, PAGE_BYTES);
    memcpy(out + 8, reference, PAGE_BYTES);
    figures->held += reference_written(have);
    if (state == REF_NONE)
        *have |= REF_SAME;
    store64(out, record_head(gfn, 0, PAGE_WORDS, KIND_RAW));
    figures->raw++;
    return RECORD_MOST;
}

/* Encode count pages.  The caller has checked the frame numbers, and out has room for count times
 * RECORD_MOST. */
static void pages_encode(const uint64_t *gfns, uint64_t count, const uint8_t *data,
                         uint8_t *reference, uint8_t *have, uint8_t *out, struct figures *figures)
{
    memset(figures, 0, sizeof *figures);
    for (uint64_t i = 0; i < count; i++)
        figures->used +=
            page_encode(gfns[i], data + i * PAGE_BYTES, reference + gfns[i] * PAGE_BYTES,
                        have + gfns[i], out + figures->used, figures);
}

/* Forget up to count pages that the reference holds, their numbers to out.  Returns how many.
 *
 * The clock algorithm: the hand, a frame number, goes round; a page that was of use since it came by
 * last is spared once.  Two rounds find any. */
static uint64_t reference_forget(uint8_t *have, uint64_t pages, uint64_t *hand, uint64_t count,
                                 uint64_t *out)
{
    uint64_t found = 0, at = *hand;
    for (uint64_t left = 2 * pages; left && found < count;) {
        if (at % 8 == 0 && pages - at >= 8 && left >= 8 &&
            !(load64(have + at) & REF_HELD * UINT64_C(0x0101010101010101))) {
            at += 8, left -= 8;
        } else {
            unsigned flags = have[at];
            if (flags & REF_HELD && flags & REF_USED) {
                have[at] = (uint8_t)(flags & ~REF_USED);
            } else if (flags & REF_HELD) {
                have[at] = (flags & REF_STATE) == REF_WHOLE ? REF_WHOLE : REF_NONE;
                out[found++] = at;
            }
            at++, left--;
        }
        if (at == pages)
            at = 0;
    }
    *hand = at;
    return found;
}

/* Bytes of the record at the beginning of body, or 0 when it breaks the format. */
static size_t record_check(const uint8_t *body, size_t length, uint64_t pages)
{
    if (length < 8)
        return 0;
    uint64_t head = load64(body);
    uint64_t gfn = head & (((uint64_t)1 << GFN_BITS) - 1);
    unsigned mask = (unsigned)(head >> MASK_SHIFT) & 0xffu;
    unsigned words = (unsigned)(head >> WORDS_SHIFT) & 0xfffu;
    unsigned kind = (unsigned)(head >> KIND_SHIFT);
    unsigned expected;

    if (gfn >= pages || words > PAGE_WORDS + GROUPS || length - 8 < (size_t)words * 8)
        return 0;
    if (kind == KIND_ZERO) {
        expected = 0;
    } else if (kind == KIND_RAW) {
        expected = PAGE_WORDS;
    } else if (kind == KIND_DELTA) {
        expected = (unsigned)__builtin_popcount(mask);
        if (!mask || expected > words)
            return 0;
        for (unsigned i = 0, groups = expected; i < groups; i++) {
            uint64_t map = load64(body + 8 + 8 * i);
            if (!map)
                return 0;
            expected += (unsigned)__builtin_popcountll(map);
        }
    } else {
        return 0;
    }
    if (words != expected || (kind != KIND_DELTA && mask))
        return 0;
    return 8 + (size_t)words * 8;
}

/* Number of records that fill body exactly; UINT64_MAX when a byte of it breaks the format, its
 * record's offset then in *bad. */
static uint64_t pages_verify(const uint8_t *body, size_t length, uint64_t pages, size_t *bad)
{
    uint64_t count = 0;
    size_t at = 0;
    while (at < length) {
        size_t record = record_check(body + at, length - at, pages);
        if (!record) {
            *bad = at;
            return UINT64_MAX;
        }
        at += record;
        count++;
    }
    return count;
}

/* Apply a body that pages_verify accepted for as many pages as memory has. */
static void pages_apply(const uint8_t *body, size_t length, uint8_t *memory)
{
    for (size_t at = 0; at < length;) {
        uint64_t head = load64(body + at);
        uint8_t *page = memory + (head & (((uint64_t)1 << GFN_BITS) - 1)) * PAGE_BYTES;
        unsigned mask = (unsigned)(head >> MASK_SHIFT) & 0xffu;
        unsigned kind = (unsigned)(head >> KIND_SHIFT);
        at += 8;
        if (kind == KIND_ZERO)
            memset(page, 0, PAGE_BYTES);
        else if (kind == KIND_RAW)
            memcpy(page, body + at, PAGE_BYTES);
        else
            page_patch(page, mask, body + at, body + at + 8 * (unsigned)__builtin_popcount(mask));
        at += 8 * (size_t)((head >> WORDS_SHIFT) & 0xfffu);
    }
}

#endif
