// SPDX-License-Identifier: Apache-2.0
// The write-intent bitmap.  A bit is durable before the write that it stands for touches the disk;
// it is cleared when that write is on stable storage here and on the standby (docs/disk.md).
//
// The file is written with pwrite and fdatasync rather than through a mapping: with a full or
// failing file system that is an error code, not a signal.

#ifndef KEMARI_BITMAP_H
#define KEMARI_BITMAP_H

#include <fcntl.h>
#include <sys/stat.h>
#include <zlib.h>

#include "_disk.h"

#define BITMAP_HEADER 4096
#define BITMAP_BLOCK 4096u

struct bitmap_header {
    char magic[8];
    uint32_t version, shift;
    uint64_t size, generation;
    uint8_t pair[16], peer[16];
    uint32_t reserved, crc;
};

static struct bitmap {
    int fd;
    unsigned shift;
    uint64_t chunks;
    size_t bytes;       // of each of the three, a multiple of BITMAP_BLOCK
    uint8_t *dirty;     // as in the file
    uint8_t *touched;   // written or copied since the cleaning cycle began
    uint8_t *todo;      // not yet copied to the standby in this session
    uint64_t last_end;  // where the last write ended: sequential writes mark ahead
    bool torn;          // a write failed: the file may lack bits that are set here
    bool unread;        // there is a file that could not be read, and may be believed later
    bool cycle;
    uint64_t cycle_position;
    double cycle_began;
} bitmap = {.fd = -1};

// Bytes that are marked ahead of a sequential write: one durable mark for so many.
#define AHEAD (1u << 20)

static inline bool bit(const uint8_t *bits, uint64_t number)
{
    return bits[number / 8] >> (number % 8) & 1;
}

static inline void set_bit(uint8_t *bits, uint64_t number)
{
    bits[number / 8] |= (uint8_t)(1u << (number % 8));
}

static inline void clear_bit(uint8_t *bits, uint64_t number)
{
    bits[number / 8] &= (uint8_t)~(1u << (number % 8));
}

static uint64_t count_bits(const uint8_t *bits)
{
    uint64_t total = 0;
    for (size_t at = 0; at < bitmap.bytes; at += 8) {
        uint64_t word;
        memcpy(&word, bits + at, 8);
        total += (uint64_t)__builtin_popcountll(word);
    }
    return total;
}

static void bitmap_close(void)
{
    if (bitmap.fd >= 0)
        close(bitmap.fd);
    free(bitmap.dirty);
    free(bitmap.touched);
    free(bitmap.todo);
    memset(&bitmap, 0, sizeof bitmap);
    bitmap.fd = -1;
    set_flag(FLAG_TRACKING, false);
}

// Take the bitmap file into use.  With the lock held.  NULL, or why not: the disk is then served
// without one, and has to be copied whole when it is protected again.
static const char *bitmap_load(void)
{
    bitmap_close();
    if (!disk.bitmap_path)
        return "no folder for a bitmap was given";
    int fd = open(disk.bitmap_path, O_RDWR | O_CLOEXEC);
    if (fd < 0 && errno == ENOENT)
        return "there is no bitmap";
    if (fd < 0) {
        bitmap.unread = true;
        return "the bitmap cannot be opened";
    }
    struct bitmap_header head;
    struct stat about;
    const char *wrong = NULL;
    bitmap.unread = read_all(fd, &head, sizeof head, 0) < 0 || fstat(fd, &about) < 0;
    if (bitmap.unread)
        wrong = "the bitmap cannot be read";
    else if (memcmp(head.magic, "KMRIBMAP", 8) || head.version != 1 ||
             head.crc != crc32(0, (const Bytef *)&head, sizeof head - 4))
        wrong = "the bitmap's header is damaged";
    else if (head.shift < 12 || head.shift > 30)
        wrong = "the bitmap has chunks of an impossible size";
    else if (head.size != disk.size)
        wrong = "the bitmap is of a disk of another size";
    if (wrong) {
        close(fd);
        return wrong;
    }
    uint64_t chunks = (disk.size + (UINT64_C(1) << head.shift) - 1) >> head.shift;
    size_t bytes = (size_t)((chunks + 8 * BITMAP_BLOCK - 1) / (8 * BITMAP_BLOCK)) * BITMAP_BLOCK;
    if ((uint64_t)about.st_size != BITMAP_HEADER + bytes) {
        close(fd);
        return "the bitmap file is of another length than its disk needs";
    }
    bitmap.dirty = malloc(bytes);
    bitmap.touched = calloc(1, bytes);
    bitmap.todo = calloc(1, bytes);
    if (!bitmap.dirty || !bitmap.touched || !bitmap.todo ||
        read_all(fd, bitmap.dirty, bytes, BITMAP_HEADER) < 0) {
        bitmap_close();
        bitmap.unread = true;
        close(fd);
        return "the bitmap cannot be read";
    }
    bitmap.fd = fd;
    bitmap.shift = head.shift;
    bitmap.chunks = chunks;
    bitmap.bytes = bytes;
    // Bits behind the end of the disk stand for nothing.
    for (uint64_t number = chunks; number < (uint64_t)bytes * 8; number++)
        clear_bit(bitmap.dirty, number);
    put(&disk.status->dirty, count_bits(bitmap.dirty));
    set_flag(FLAG_TRACKING, true);
    return NULL;
}

// Make it impossible that a file that misses writes is ever believed.  0 if that worked.
static int bitmap_invalidate(void)
{
    char zeros[sizeof(struct bitmap_header)] = {0};
    bool good = bitmap.fd >= 0 && write_all(bitmap.fd, zeros, sizeof zeros, 0) == 0 &&
                fdatasync(bitmap.fd) == 0;
    if (!good) {
        char *folder = strdup(disk.bitmap_path);
        char *slash = folder ? strrchr(folder, '/') : NULL;
        // One that is gone already may be gone from memory only.
        if (slash && (unlink(disk.bitmap_path) == 0 || errno == ENOENT)) {
            *slash = 0;
            int fd = open(*folder ? folder : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            good = fd >= 0 && fsync(fd) == 0;
            if (fd >= 0)
                close(fd);
        }
        free(folder);
    }
    return good ? 0 : -1;
}

// Write the blocks of the file that hold chunks first to last.
static int bitmap_write(uint64_t first, uint64_t last)
{
    size_t from = (size_t)(first / 8) & ~(size_t)(BITMAP_BLOCK - 1);
    size_t to = ((size_t)(last / 8) | (BITMAP_BLOCK - 1)) + 1;
    return write_all(bitmap.fd, bitmap.dirty + from, to - from, BITMAP_HEADER + from);
}

// Have chunks first to last on stable storage as they are here, or, after a failure, all of them:
// which ones the file lacks is unknown then.  0, or -1 with errno.
static int bitmap_save(uint64_t first, uint64_t last)
{
    if (bitmap.torn)
        first = 0, last = bitmap.chunks - 1;
    bitmap.torn = true;
    if (bitmap_write(first, last) < 0 || fdatasync(bitmap.fd) < 0)
        return -1;
    bitmap.torn = false;
    return 0;
}

enum marked { MARKED, UNTRACKED, REFUSED };

// Mark a range before it is written.  With the lock held.  UNTRACKED: the bitmap is lost, and
// durably known to be; REFUSED: not even that could be written down, so the disk must not change.
static enum marked bitmap_mark(uint64_t offset, uint64_t length)
{
    if (length == 0 || (bitmap.fd < 0 && !bitmap.unread))
        return MARKED;
    if (bitmap.fd < 0)
        return bitmap_invalidate() == 0 ? UNTRACKED : REFUSED;
    uint64_t first = offset >> bitmap.shift, last = (offset + length - 1) >> bitmap.shift;
    bool fresh = false;
    for (uint64_t number = first; number <= last; number++) {
        set_bit(bitmap.touched, number);
        fresh |= !bit(bitmap.dirty, number);
    }
    bool sequential = offset == bitmap.last_end;
    bitmap.last_end = offset + length;
    // What is set here only because the write of it failed is no mark yet.
    if (!fresh && !bitmap.torn)
        return MARKED;
    if (sequential) {
        last += AHEAD >> bitmap.shift;
        if (last >= bitmap.chunks)
            last = bitmap.chunks - 1;
    }
    uint64_t added = 0;
    for (uint64_t number = first; number <= last; number++)
        if (!bit(bitmap.dirty, number)) {
            set_bit(bitmap.dirty, number);
            added++;
        }
    count(&disk.status->dirty, added);
    if (bitmap_save(first, last) == 0)
        return MARKED;
    return bitmap_invalidate() == 0 ? UNTRACKED : REFUSED;
}

// What is marked has to be copied to the standby of a new session.  With the lock held.
static void bitmap_begin(void)
{
    memcpy(bitmap.todo, bitmap.dirty, bitmap.bytes);
    bitmap.cycle = false;
    uint64_t left = count_bits(bitmap.todo);
    put(&disk.status->sync_total, left);
    put(&disk.status->sync_left, left);
}

// Clear the bits of all that is settled: not touched since the cycle began, and not left to copy.
// Called when the standby has applied all up to the position at which the cycle began and the disk
// was flushed here after that.  With the lock held.
static int bitmap_clean(void)
{
    int result = 0;
    for (size_t block = 0; block < bitmap.bytes; block += BITMAP_BLOCK) {
        bool changed = false;
        for (size_t at = block; at < block + BITMAP_BLOCK; at++) {
            uint8_t kept = bitmap.dirty[at] & (bitmap.touched[at] | bitmap.todo[at]);
            changed |= kept != bitmap.dirty[at];
            bitmap.dirty[at] = kept;
        }
        if (changed && bitmap_write((uint64_t)block * 8, (uint64_t)block * 8) < 0)
            result = -1;
    }
    put(&disk.status->dirty, count_bits(bitmap.dirty));
    return result;
}

#endif
