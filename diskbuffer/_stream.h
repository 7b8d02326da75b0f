// SPDX-License-Identifier: Apache-2.0
// The stream of records: a bounded queue, filled under the disk's lock and drained by one thread.

#ifndef KEMARI_STREAM_H
#define KEMARI_STREAM_H

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "_hold.h"

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

enum kind { RECORD_WRITE = 1, RECORD_ZERO = 2, RECORD_FLUSH = 3, RECORD_SEEN = 4 };
enum { RECORD_PUNCH = 1, RECORD_SYNC = 2 };

struct record {
    uint8_t kind, flags;
    uint16_t reserved;
    uint32_t length;
    uint64_t offset, extent;
    uint32_t reserved2, crc;
};
_Static_assert(sizeof(struct record) == 32, "records are described in docs/disk.md");

#define MIN_QUEUE (4 * SLICE)
#define DRAIN_MOST SLICE

static struct stream {
    int fd;               // -1: there is none
    bool sending;         // the drain thread is in sendmsg and uses fd and queue
    uint8_t *queue;
    uint64_t limit, head, used;
    uint64_t session, position, applied;
    double patience;      // seconds that a write waits for room
    bool told_full;
    int wake;             // eventfd: the control thread has something to tell
    char why[200];        // why the last session broke
} stream = {.fd = -1, .limit = 64u << 20, .patience = 30, .wake = -1};

static inline bool streaming(void)
{
    return atomic_load_explicit(&disk.status->state, memory_order_relaxed) == STREAMING;
}

static void wake_control(void)
{
    uint64_t one = 1;
    if (write(stream.wake, &one, sizeof one) < 0 && errno != EAGAIN)
        nbdkit_error("the control thread cannot be woken: %s", strerror(errno));
}

// End the session: from here on writes are only marked in the bitmap.  With the lock held.
static void stream_break(const char *format, ...)
{
    if (!streaming())
        return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(stream.why, sizeof stream.why, format, arguments);
    va_end(arguments);
    put(&disk.status->state, BROKEN);
    set_flag(FLAG_SYNCING, false);
    shutdown(stream.fd, SHUT_RDWR);
    stream.used = 0;
    pthread_cond_broadcast(&disk.room);
    pthread_cond_broadcast(&disk.data);
    wake_control();
}

// Wait until `need` bytes fit below `limit`.  With the lock held, which is given up meanwhile.  A
// stream that nobody reads is given up, so that the guest goes on.
static void await_room(uint64_t need, uint64_t limit, bool bounded)
{
    struct timespec end = in_future(stream.patience);
    bool waited = false;
    uint64_t drained = atomic_load(&disk.status->drained);
    while (streaming() && stream.used + need > limit && !disk.stopping) {
        if (bounded && !waited)
            count(&disk.status->waits, 1);
        waited = true;
        int error = pthread_cond_timedwait(&disk.room, &disk.lock, &end);
        uint64_t current = atomic_load(&disk.status->drained);
        if (current != drained || !bounded)
            end = in_future(stream.patience);
        else if (error == ETIMEDOUT && streaming() && stream.used + need > limit)
            stream_break("Nothing was taken from the stream for %g s", stream.patience);
        drained = current;
    }
}

static void queue_put(const void *data, size_t length)
{
    uint64_t at = stream.position % stream.limit;
    size_t first = stream.limit - at < length ? (size_t)(stream.limit - at) : length;
    memcpy(stream.queue + at, data, first);
    memcpy(stream.queue, (const uint8_t *)data + first, length - first);
    stream.position += length;
    stream.used += length;
}

// Copy what was put at `position` and is still there.
static void queue_get(void *data, uint64_t position, size_t length)
{
    uint64_t at = position % stream.limit;
    size_t first = stream.limit - at < length ? (size_t)(stream.limit - at) : length;
    memcpy(data, stream.queue + at, first);
    memcpy((uint8_t *)data + first, stream.queue, length - first);
}

static struct record make_record(enum kind kind, unsigned flags, uint64_t offset, uint64_t extent,
                                 const void *payload, uint32_t length)
{
    struct record record = {
        .kind = (uint8_t)kind, .flags = (uint8_t)flags, .length = length, .offset = offset,
        .extent = extent,
    };
    uLong crc = crc32(0, (const Bytef *)&record, sizeof record - 4);
    record.crc = (uint32_t)(length ? crc32(crc, payload, length) : crc);
    return record;
}

// Append a record for which there is room.  With the lock held.
static void append(const struct record *record, const void *payload)
{
    if (!streaming() && !holding())
        return;
    queue_put(record, sizeof *record);
    if (record->length)
        queue_put(payload, record->length);
    if (holding()) {
        bool change = record->kind == RECORD_WRITE || record->kind == RECORD_ZERO;
        *held_at(hold.count++) = (struct held){
            .offset = record->offset, .extent = change ? record->extent : 0,
            .payload = stream.position - record->length, .end = stream.position,
            .kind = record->kind, .flags = record->flags,
        };
    }
    put(&disk.status->position, stream.position);
    pthread_cond_signal(&disk.data);
    uint64_t waiting = holding() ? stream.position - hold.allowed : stream.used;
    bool full = waiting > stream.limit / 2 || hold.count > MAX_HELD / 2;
    if (full && !stream.told_full) {
        stream.told_full = true;
        wake_control();
    }
}

static void *drain_thread(void *unused)
{
    (void)unused;
    pthread_mutex_lock(&disk.lock);
    while (!disk.stopping) {
        if (!streaming() || stream.used == 0) {
            pthread_cond_wait(&disk.data, &disk.lock);
            continue;
        }
        uint64_t session = stream.session;
        uint64_t size = stream.used < DRAIN_MOST ? stream.used : DRAIN_MOST;
        uint64_t first = stream.limit - stream.head < size ? stream.limit - stream.head : size;
        struct iovec parts[2] = {{stream.queue + stream.head, (size_t)first},
                                 {stream.queue, (size_t)(size - first)}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        int fd = stream.fd;
        stream.sending = true;
        pthread_mutex_unlock(&disk.lock);
        ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
        int error = errno;
        pthread_mutex_lock(&disk.lock);
        stream.sending = false;
        if (session != stream.session || !streaming()) {
            wake_control();
            continue;
        }
        if (sent < 0) {
            if (error != EINTR)
                stream_break("The stream could not be sent: %s", strerror(error));
            continue;
        }
        stream.head = (stream.head + (uint64_t)sent) % stream.limit;
        stream.used -= (uint64_t)sent;
        if (!holding() && stream.used < stream.limit / 4)
            stream.told_full = false;
        count(&disk.status->drained, (uint64_t)sent);
        pthread_cond_broadcast(&disk.room);
    }
    pthread_mutex_unlock(&disk.lock);
    return NULL;
}

#endif
