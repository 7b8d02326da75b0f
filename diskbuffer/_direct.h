// SPDX-License-Identifier: Apache-2.0
// A target that another host reaches too, read and written past this host's page cache: pages of it
// would be stale here, or be written back when the disk is somebody else's (docs/disk.md).

#ifndef KEMARI_DIRECT_H
#define KEMARI_DIRECT_H

#include <fcntl.h>
#include <linux/falloc.h>

#include "_disk.h"

#define MEMORY_ALIGN 4096u  // of buffers: no device wants more

static struct direct {
    uint64_t align;         // of offsets and lengths, bytes
    // Held while blocks are read, changed in part and written back.
    pthread_mutex_t edges;
} direct = {.align = SECTOR, .edges = PTHREAD_MUTEX_INITIALIZER};

static uint8_t *direct_buffer(void)
{
    void *buffer = NULL;
    int error = posix_memalign(&buffer, MEMORY_ALIGN, SLICE + 2 * MEMORY_ALIGN);
    errno = error;
    return error ? NULL : buffer;
}

// Find out what the target wants its requests to be multiples of; -1 with errno.
static int direct_probe(int fd)
{
    uint8_t *buffer = direct_buffer();
    if (!buffer)
        return -1;
    ssize_t got = -1;
    for (direct.align = SECTOR; direct.align <= MEMORY_ALIGN; direct.align *= 2)
        if ((got = pread(fd, buffer, direct.align, 0)) >= 0 || errno != EINVAL)
            break;
    int error = errno;
    free(buffer);
    errno = error;
    return got < 0 ? -1 : 0;
}

static int direct_read(int fd, void *to, uint64_t length, uint64_t offset)
{
    uint8_t *buffer = direct_buffer(), *at = to;
    int result = buffer ? 0 : -1;
    while (result == 0 && length > 0) {
        uint64_t skip = offset % direct.align;
        uint64_t part = length < SLICE ? length : SLICE;
        uint64_t whole = (skip + part + direct.align - 1) / direct.align * direct.align;
        result = read_all(fd, buffer, whole, offset - skip);
        if (result == 0)
            memcpy(at, buffer + skip, part);
        at += part, offset += part, length -= part;
    }
    int error = errno;
    free(buffer);
    errno = error;
    return result;
}

// Write one slice at most, through `buffer`; of `from` NULL, zeros.
static int direct_write_slice(int fd, uint8_t *buffer, const uint8_t *from, uint64_t length,
                              uint64_t offset)
{
    uint64_t skip = offset % direct.align, end = skip + length;
    uint64_t whole = (end + direct.align - 1) / direct.align * direct.align;
    bool edges = skip || end != whole || direct.align > SECTOR;
    int result = 0;
    if (edges)
        pthread_mutex_lock(&direct.edges);
    if (skip)
        result = read_all(fd, buffer, direct.align, offset - skip);
    if (result == 0 && end != whole && !(skip && whole == direct.align))
        result = read_all(fd, buffer + whole - direct.align, direct.align,
                          offset - skip + whole - direct.align);
    if (result == 0) {
        if (from)
            memcpy(buffer + skip, from, length);
        else
            memset(buffer + skip, 0, length);
        result = write_all(fd, buffer, whole, offset - skip);
    }
    if (edges)
        pthread_mutex_unlock(&direct.edges);
    return result;
}

enum direct_kind { DIRECT_WRITE, DIRECT_ZERO, DIRECT_PUNCH };

// Make a change, in slices, before each of which `may` is asked unless it is NULL.  -1 with errno;
// ECANCELED when that said no.
static int direct_change(int fd, enum direct_kind kind, const uint8_t *from, uint64_t length,
                         uint64_t offset, bool (*may)(void))
{
    static const int modes[] = {
        [DIRECT_ZERO] = FALLOC_FL_ZERO_RANGE,
        [DIRECT_PUNCH] = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
    };
    uint8_t *buffer = direct_buffer();
    int result = buffer ? 0 : -1;
    while (result == 0 && length > 0) {
        uint64_t part = length < SLICE ? length : SLICE;
        if (may && !may()) {
            errno = ECANCELED;
            result = -1;
            break;
        }
        bool done = false;
        if (kind != DIRECT_WRITE) {
            done = fallocate(fd, modes[kind], (off_t)offset, (off_t)part) == 0;
            if (!done && errno != EOPNOTSUPP && errno != EINVAL)
                result = -1;
        }
        if (!done && result == 0)
            result = direct_write_slice(fd, buffer, kind == DIRECT_WRITE ? from : NULL, part,
                                        offset);
        if (from)
            from += part;
        offset += part, length -= part;
    }
    int error = errno;
    free(buffer);
    errno = error;
    return result;
}

#endif
