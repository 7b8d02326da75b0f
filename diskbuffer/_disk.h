// SPDX-License-Identifier: Apache-2.0
// What all parts of the plug-in share: the disk, its lock, and the status page.
// docs/disk.md has the layout of the status page, of the records and of the bitmap.

#ifndef KEMARI_DISK_H
#define KEMARI_DISK_H

#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "diskbuffer/_plugin.c writes its integers as they are: expected a little-endian machine"
#endif

#define SLICE (1u << 20)          // greatest payload of a record, bytes
#define SECTOR 512

enum state { IDLE, STREAMING, BROKEN };

enum {
    FLAG_READONLY = 1,
    FLAG_REPLICA = 2,
    FLAG_TRACKING = 4,
    FLAG_SYNCING = 8,
    FLAG_SHARED = 16,
    FLAG_HOLDING = 32,
};

// The shared page.  Every field is one 64-bit integer that is stored at once.
struct status {
    char magic[8];
    _Atomic uint64_t version, pid, size, flags;
    _Atomic uint64_t session, state, position, drained, limit;
    _Atomic uint64_t sync_total, sync_left, dirty;
    _Atomic uint64_t reads, read_bytes, writes, written_bytes, flushes, waits, errors;
    _Atomic uint64_t issued;
};

static struct disk {
    int fd;
    // The same target opened once more, for the flush before marks are cleared: the kernel tells each
    // open file of a failed write-back once (errseq_t), and what is told to this one is not kept from
    // the guest.  -1 where no marks are kept.
    int clean_fd;
    uint64_t size;
    bool readonly;
    bool stopping;
    char *target, *folder, *bitmap_path;
    struct status *status;
    // Held for each mutation: what is done first locally is first in the stream.
    pthread_mutex_t lock;
    pthread_cond_t room, data, sync;  // the queue shrank; it grew; there is something to copy
    // A write that the kernel could not bring to the device is lost without a further word, so
    // that no bit of the bitmap may be cleared any more.  Changed under the lock.
    bool sync_failed;
    // Whether the target makes holes, as far as is known.  Changed under the lock.
    _Atomic bool holes;
} disk = {.fd = -1, .clean_fd = -1, .holes = true, .lock = PTHREAD_MUTEX_INITIALIZER};

static inline void put(_Atomic uint64_t *field, uint64_t value)
{
    atomic_store_explicit(field, value, memory_order_release);
}

static inline void count(_Atomic uint64_t *field, uint64_t more)
{
    atomic_fetch_add_explicit(field, more, memory_order_relaxed);
}

static inline void set_flag(uint64_t flag, bool on)
{
    if (on)
        atomic_fetch_or(&disk.status->flags, flag);
    else
        atomic_fetch_and(&disk.status->flags, ~flag);
}

static inline bool has_flag(uint64_t flag)
{
    return atomic_load(&disk.status->flags) & flag;
}

static inline struct timespec in_future(double seconds)
{
    struct timespec when;
    clock_gettime(CLOCK_MONOTONIC, &when);
    uint64_t ns = (uint64_t)when.tv_nsec + (uint64_t)(seconds * 1e9);
    when.tv_sec += (time_t)(ns / 1000000000u);
    when.tv_nsec = (long)(ns % 1000000000u);
    return when;
}

static inline double now(void)
{
    struct timespec when = in_future(0);
    return (double)when.tv_sec + (double)when.tv_nsec / 1e9;
}

// Read or write all of it.  0, or -1 with errno; a short read is EIO: the disk has shrunk.
static inline int read_all(int fd, void *buffer, size_t length, uint64_t offset)
{
    char *at = buffer;
    while (length > 0) {
        ssize_t done = pread(fd, at, length, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        if (done == 0) {
            errno = EIO;
            return -1;
        }
        at += done, offset += (uint64_t)done, length -= (size_t)done;
    }
    return 0;
}

static inline int write_all(int fd, const void *buffer, size_t length, uint64_t offset)
{
    const char *at = buffer;
    while (length > 0) {
        ssize_t done = pwrite(fd, at, length, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done < 0)
            return -1;
        at += done, offset += (uint64_t)done, length -= (size_t)done;
    }
    return 0;
}

static inline bool is_zero(const uint8_t *data, size_t length)
{
    return length == 0 || (data[0] == 0 && memcmp(data, data + 1, length - 1) == 0);
}

// Flush by one of the target's descriptors.  Without the lock.  -1 with errno.
static inline int flush_target(int fd)
{
    if (fdatasync(fd) == 0)
        return 0;
    int saved = errno;
    pthread_mutex_lock(&disk.lock);
    disk.sync_failed = true;
    pthread_mutex_unlock(&disk.lock);
    errno = saved;
    return -1;
}

#endif
