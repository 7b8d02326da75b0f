// SPDX-License-Identifier: Apache-2.0
// Shared mode: the guest's requests while changes are held, and the thread that issues them.

#ifndef KEMARI_ISSUE_H
#define KEMARI_ISSUE_H

#include "_sync.h"
#include "_target.h"

#define ISSUE_MOST 1024u      // records written between two flushes
#define RETRY_SECONDS 1
#define HALT_SECONDS 30
#define LAST_SECONDS 25       // block-kemari waits for 30 s before it kills

static uint64_t boot_time(void)
{
    struct timespec when;
    clock_gettime(CLOCK_BOOTTIME, &when);
    return (uint64_t)when.tv_sec * 1000000000u + (uint64_t)when.tv_nsec;
}

static bool may_issue(void)
{
    return boot_time() < atomic_load(&hold.until);
}

// ---- Requests ----

// Wait until a change may be made; whether it is to be held.  With the lock held, which is given
// up meanwhile.
static bool hold_enter(uint64_t need)
{
    bool waited = false;
    while (!disk.stopping && !has_flag(FLAG_REPLICA)) {
        if (hold.on ? stream.position + need - hold.issued <= stream.limit &&
                          hold.count < MAX_HELD
                    : hold.count == 0 && !hold.entering)
            break;
        if (!waited)
            count(&disk.status->waits, 1);
        waited = true;
        pthread_cond_wait(&disk.room, &disk.lock);
    }
    return hold.on;
}

static void hold_pass_end(uint64_t offset)
{
    pthread_mutex_lock(&disk.lock);
    hold.passing--;
    remember(offset);
    pthread_cond_broadcast(&disk.room);
    pthread_mutex_unlock(&disk.lock);
}

// Make one change: hold it, or do it at once.  -1 with errno.
static int hold_change(enum direct_kind kind, const struct record *record, const void *payload)
{
    pthread_mutex_lock(&disk.lock);
    bool held = hold_enter(sizeof *record + record->length);
    if (disk.readonly || has_flag(FLAG_REPLICA)) {
        pthread_mutex_unlock(&disk.lock);
        errno = EROFS;
        return -1;
    }
    if (held)
        append(record, payload);
    else
        hold.passing++;
    pthread_mutex_unlock(&disk.lock);
    if (held)
        return 0;
    int result = direct_change(disk.fd, kind, payload, record->extent, record->offset, NULL);
    int error = errno;
    hold_pass_end(record->offset);
    errno = error;
    return result;
}

static int hold_flush(void)
{
    struct record record = make_record(RECORD_FLUSH, 0, 0, 0, NULL, 0);
    pthread_mutex_lock(&disk.lock);
    bool held = hold_enter(sizeof record);
    if (held)
        append(&record, NULL);
    pthread_mutex_unlock(&disk.lock);
    return held ? 0 : flush_target(disk.fd);
}

// Lay what is held over what was read.  With the lock held.
static void hold_overlay(uint8_t *data, uint64_t offset, uint64_t length)
{
    for (size_t i = 0; i < hold.count; i++) {
        const struct held *held = held_at(i);
        uint64_t from = held->offset > offset ? held->offset : offset;
        uint64_t end = held->offset + held->extent;
        if (end > offset + length)
            end = offset + length;
        if (from >= end)
            continue;
        if (held->kind == RECORD_ZERO)
            memset(data + (from - offset), 0, end - from);
        else
            queue_get(data + (from - offset), held->payload + (from - held->offset), end - from);
    }
}

// Read what the guest last wrote, wherever it is.  -1 with errno.
static int hold_read(void *buffer, uint64_t length, uint64_t offset)
{
    pthread_mutex_lock(&disk.lock);
    if (!hold_overlaps(offset, length)) {
        // What is held from now on was written at the same time as this is read.
        pthread_mutex_unlock(&disk.lock);
        return direct_read(disk.fd, buffer, length, offset);
    }
    // Under the lock nothing leaves the queue: what is not yet in the target is in there.
    int result = direct_read(disk.fd, buffer, length, offset);
    int error = errno;
    if (result == 0)
        hold_overlay(buffer, offset, length);
    pthread_mutex_unlock(&disk.lock);
    errno = error;
    return result;
}

// ---- Issuing ----

static int issue_one(const struct held *held, const uint8_t *payload)
{
    switch (held->kind) {
    case RECORD_WRITE:
        return direct_change(disk.fd, DIRECT_WRITE, payload, held->extent, held->offset, may_issue);
    case RECORD_ZERO:
        return direct_change(disk.fd, held->flags & RECORD_PUNCH ? DIRECT_PUNCH : DIRECT_ZERO,
                             NULL, held->extent, held->offset, may_issue);
    }
    return 0;
}

// One that fails was answered long ago: it is tried again until it succeeds.  With the lock held.
static void issue_failed(int error, bool flushing)
{
    count(&disk.status->errors, 1);
    if (flushing)
        hold.written = 0;  // what became of these is unknown
    if (!hold.failing) {
        snprintf(hold.why, sizeof hold.why, "%s: %s", disk.target, strerror(error));
        hold.failing = true;
        hold.told_failing = false;
        wake_control();
    }
    struct timespec end = in_future(RETRY_SECONDS);
    while (!disk.stopping && pthread_cond_timedwait(&hold.moved, &disk.lock, &end) == 0)
        continue;
}

// Write the next record, or flush those that were.  With the lock held, which is given up
// meanwhile.
static void issue_step(uint8_t *payload, bool ready)
{
    struct held held = {.kind = RECORD_FLUSH};
    if (ready)
        held = *held_at(hold.written);
    if (held.kind == RECORD_WRITE)
        queue_get(payload, held.payload, held.extent);
    bool flushing = held.kind == RECORD_FLUSH || hold.written + 1 >= ISSUE_MOST;
    hold.issuing = true;
    pthread_mutex_unlock(&disk.lock);
    int failed = issue_one(&held, payload);
    bool flushed = failed == 0 && flushing;
    if (flushed)
        failed = flush_target(disk.fd);
    int error = errno;
    pthread_mutex_lock(&disk.lock);
    hold.issuing = false;
    pthread_cond_broadcast(&disk.room);  // for who waits for this
    if (failed) {
        if (error != ECANCELED)
            issue_failed(error, flushed);
        return;
    }
    hold.failing = false;
    if (ready)
        hold.written++;
    if (flushed)
        hold_free(hold.written);
}

static void *issue_thread(void *unused)
{
    (void)unused;
    uint8_t *payload = malloc(SLICE);
    if (!payload)
        nbdkit_error("there is no memory to issue changes");
    pthread_mutex_lock(&disk.lock);
    while (payload && !disk.stopping) {
        bool due = hold.written < hold.count && held_at(hold.written)->end <= hold.allowed;
        bool ready = due && may_issue();
        if (ready || hold.written > 0) {
            issue_step(payload, ready);
            continue;
        }
        hold.late = due && !hold.halted;
        if (hold.late && !hold.told_late)
            wake_control();
        pthread_cond_wait(&hold.moved, &disk.lock);
    }
    pthread_mutex_unlock(&disk.lock);
    free(payload);
    return NULL;
}

// ---- What the daemon says ----

// Wait until `*busy` is not, a while.  With the lock held.  Whether it came about.
static bool hold_await(const bool *busy, const unsigned *number)
{
    struct timespec end = in_future(HALT_SECONDS);
    while ((busy && *busy) || (number && *number > 0))
        if (pthread_cond_timedwait(&disk.room, &disk.lock, &end) == ETIMEDOUT)
            return false;
    return true;
}

// Begin to hold: the stream is empty.  With the lock held.  NULL, or why not.
static const char *hold_begin(void)
{
    if (hold.on || hold.count > 0)
        return "changes of an earlier stream are still held";
    hold.entering = true;
    bool still = hold_await(NULL, &hold.passing);
    hold.entering = false;
    pthread_cond_broadcast(&disk.room);
    return still ? NULL : "changes are still on their way to the target";
}

// With the lock held, and nothing held.
static void hold_start(void)
{
    hold.first = hold.count = hold.written = 0;
    hold.allowed = hold.issued = 0;
    hold.halted = hold.failing = hold.late = hold.told_late = false;
    atomic_store(&hold.until, 0);
    put(&disk.status->issued, 0);
    set_holding(true);
}

// Note what the target holds where the guest wrote last: the other host compares.  Nothing is
// issued meanwhile.  With the lock held.  NULL, or why not.
static const char *hold_note_seen(void)
{
    static uint8_t block[SEEN_BYTES];
    for (unsigned i = 0; i <= hold.recents; i++) {
        uint64_t offset = i < hold.recents ? hold.recent[i] : 0;
        uint64_t left = disk.size - offset;
        uint32_t length = left < SEEN_BYTES ? (uint32_t)left : SEEN_BYTES;
        if (direct_read(disk.fd, block, length, offset) < 0)
            return "the target cannot be read";
        struct record record = make_record(RECORD_SEEN, 0, offset, length, block, length);
        append(&record, block);
    }
    return NULL;
}

static const char *hold_issue(uint64_t session, uint64_t position, uint64_t until)
{
    if (!hold.on || session != stream.session || position > stream.position)
        return "that position is not of this stream";
    if (hold.halted)
        return "issuing was halted";
    if (position > hold.allowed)
        hold.allowed = position;
    if (until > atomic_load(&hold.until)) {
        atomic_store(&hold.until, until);
        hold.late = hold.told_late = false;
    }
    if (stream.position - hold.allowed < stream.limit / 4)
        stream.told_full = false;
    pthread_cond_signal(&hold.moved);
    return NULL;
}

// Issue no more: the other host will.  Returns when nothing is on its way.
static const char *hold_halt(void)
{
    hold.halted = true;
    atomic_store(&hold.until, 0);
    if (!hold_await(&hold.issuing, NULL))
        return "a change is still on its way to the target";
    target_lock(disk.fd, F_UNLCK);  // on a cluster's file system the other host wants it
    return NULL;
}

static void hold_end(uint64_t until)
{
    set_holding(false);
    hold.halted = false;
    atomic_store(&hold.until, until);
    put(&disk.status->state, IDLE);
    pthread_cond_broadcast(&disk.room);
    pthread_cond_broadcast(&disk.data);
    pthread_cond_signal(&hold.moved);
}

// Nobody else has this disk: issue everything, then hold no more.
static const char *hold_release(void)
{
    if (has_flag(FLAG_REPLICA))
        return "the disk is a replica";
    if (hold.halted && !target_lock(disk.fd, F_WRLCK))
        return "the target is in use by another host";
    hold.allowed = stream.position;
    hold_end(UINT64_MAX);
    return NULL;
}

// Somebody else has this disk: nothing of what is held may ever reach it.
static const char *hold_drop(void)
{
    const char *wrong = hold_halt();
    if (wrong)
        return wrong;
    set_flag(FLAG_REPLICA, true);
    hold_free(hold.count);
    hold_end(0);
    return NULL;
}

// The server ends.  What is held waits for the daemon, which learns of the guest's end meanwhile.
// With the lock held.
static void hold_await_release(void)
{
    struct timespec end = in_future(LAST_SECONDS);
    while (hold.count > 0)
        if (pthread_cond_timedwait(&disk.room, &disk.lock, &end) == ETIMEDOUT) {
            nbdkit_error("%zu changes of %s were never acknowledged, and are dropped", hold.count,
                         disk.target);
            return;
        }
}

#endif
