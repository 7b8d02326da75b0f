// SPDX-License-Identifier: Apache-2.0
// Synchronisation: what is left to copy is read under the disk's lock and appended to the stream
// between the guest's own writes, so that the order of both is right by construction.

#ifndef KEMARI_SYNC_H
#define KEMARI_SYNC_H

#include "_stream.h"

#define SYNC_MOST (256u << 10)    // bytes that are copied under one hold of the lock

static struct sync {
    bool on;
    uint64_t rate;                // bytes per second, 0 for no limit
    uint64_t cursor;              // chunk at which to look next
    double allowance_since;
    double spent;                 // bytes read since then
} syncing;

// Begin, or go on with another limit.  With the lock held.
static void sync_start(uint64_t rate)
{
    syncing.on = true;
    syncing.rate = rate;
    syncing.allowance_since = now();
    syncing.spent = 0;
    set_flag(FLAG_SYNCING, true);
    pthread_cond_broadcast(&disk.sync);
}

// A range that a failed write left in an unknown state: the standby gets what is there now.
static void sync_again(uint64_t offset, uint64_t length)
{
    if (bitmap.fd < 0 || length == 0)
        return;
    uint64_t last = (offset + length - 1) >> bitmap.shift, added = 0;
    for (uint64_t number = offset >> bitmap.shift; number <= last; number++)
        if (!bit(bitmap.todo, number)) {
            set_bit(bitmap.todo, number);
            added++;
        }
    if (streaming() && added) {
        count(&disk.status->sync_total, added);
        count(&disk.status->sync_left, added);
        sync_start(syncing.rate);
    }
}

// The next run of chunks to copy, at most SYNC_MOST bytes; false when nothing is left.
static bool sync_next(uint64_t *first, uint64_t *end)
{
    for (uint64_t seen = 0; seen < bitmap.chunks;) {
        uint64_t at = syncing.cursor >= bitmap.chunks ? 0 : syncing.cursor;
        if (at % 8 == 0 && bitmap.todo[at / 8] == 0) {
            // Less at the end of the disk: what lies before the cursor has to be seen as well.
            uint64_t step = bitmap.chunks - at < 8 ? bitmap.chunks - at : 8;
            syncing.cursor = at + step, seen += step;
            continue;
        }
        if (!bit(bitmap.todo, at)) {
            syncing.cursor = at + 1, seen++;
            continue;
        }
        uint64_t most = SYNC_MOST >> bitmap.shift;
        *first = *end = at;
        while (*end < bitmap.chunks && bit(bitmap.todo, *end) && *end - at < (most ? most : 1))
            (*end)++;
        return true;
    }
    return false;
}

// Whether the limit of the rate was waited for, and the state has to be looked at again.
static bool sync_throttled(void)
{
    if (syncing.rate == 0)
        return false;
    double ahead = syncing.spent / (double)syncing.rate - (now() - syncing.allowance_since);
    if (ahead <= 0) {
        if (ahead < -1)  // no more than one second's worth is saved up
            syncing.allowance_since = now(), syncing.spent = 0;
        return false;
    }
    struct timespec end = in_future(ahead);
    pthread_cond_timedwait(&disk.sync, &disk.lock, &end);
    return true;
}

// Append one chunk as it is on the disk now.  With the lock held.
static int sync_copy(uint64_t number, uint8_t *buffer)
{
    uint64_t offset = number << bitmap.shift;
    uint64_t length = UINT64_C(1) << bitmap.shift;
    if (offset + length > disk.size)
        length = disk.size - offset;
    for (uint64_t done = 0; done < length;) {
        uint32_t part = length - done < SYNC_MOST ? (uint32_t)(length - done) : SYNC_MOST;
        await_room(sizeof(struct record) + part, stream.limit / 2, false);
        if (!streaming() || disk.stopping || bitmap.fd < 0)
            return 0;
        if (read_all(disk.fd, buffer, part, offset + done) < 0)
            return -1;
        bool zero = is_zero(buffer, part);
        struct record record = make_record(
            zero ? RECORD_ZERO : RECORD_WRITE, zero ? RECORD_PUNCH | RECORD_SYNC : RECORD_SYNC,
            offset + done, part, buffer, zero ? 0 : part);
        append(&record, buffer);
        syncing.spent += part;
        done += part;
    }
    return 0;
}

static void sync_step(uint8_t *buffer)
{
    uint64_t first = 0, end = 0, session = stream.session;
    if (!sync_next(&first, &end)) {
        syncing.on = false;
        set_flag(FLAG_SYNCING, false);
        wake_control();
        return;
    }
    // Read once without the lock: under it the data then comes from memory, and no write of the
    // guest waits for the disk's arm.
    uint64_t offset = first << bitmap.shift, length = (end - first) << bitmap.shift;
    if (length <= SYNC_MOST && offset + length <= disk.size) {
        pthread_mutex_unlock(&disk.lock);
        int failed = read_all(disk.fd, buffer, (size_t)length, offset);
        (void)failed;  // read again below, where a failure counts
        pthread_mutex_lock(&disk.lock);
    }
    for (uint64_t number = first; number < end; number++) {
        if (session != stream.session || !streaming() || disk.stopping || bitmap.fd < 0)
            return;
        if (!bit(bitmap.todo, number))
            continue;
        if (sync_copy(number, buffer) < 0) {
            stream_break("%s cannot be read at byte %" PRIu64 ": %s", disk.target,
                         number << bitmap.shift, strerror(errno));
            return;
        }
        if (session != stream.session || !streaming() || bitmap.fd < 0)
            return;
        clear_bit(bitmap.todo, number);
        set_bit(bitmap.touched, number);
        atomic_fetch_sub(&disk.status->sync_left, 1);
        syncing.cursor = number + 1;
    }
}

static void *sync_thread(void *unused)
{
    (void)unused;
    uint8_t *buffer = malloc(SYNC_MOST);
    pthread_mutex_lock(&disk.lock);
    if (!buffer)
        nbdkit_error("there is no memory for the synchronisation");
    while (buffer && !disk.stopping) {
        if (!streaming() || !syncing.on || bitmap.fd < 0)
            pthread_cond_wait(&disk.sync, &disk.lock);
        else if (!sync_throttled())
            sync_step(buffer);
    }
    pthread_mutex_unlock(&disk.lock);
    free(buffer);
    return NULL;
}

#endif
