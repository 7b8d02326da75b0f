// SPDX-License-Identifier: Apache-2.0
// What is held in shared mode: records in the queue that were answered and are not yet issued.
// All of this with the disk's lock held.  docs/disk.md says why.

#ifndef KEMARI_HOLD_H
#define KEMARI_HOLD_H

#include "_bitmap.h"
#include "_direct.h"

#define MAX_HELD 65536u    // records
#define SEEN_BYTES 4096u   // of each block that shows that the other host reaches the same target
#define SEEN_MOST 16u

struct held {
    uint64_t offset, extent;   // of the disk; extent 0: it changes nothing
    uint64_t payload, end;     // positions in the stream: of its payload, and behind it
    uint8_t kind, flags;
};

static struct hold {
    bool shared;               // the mode; never changes
    bool on;                   // changes are held
    bool entering;             // they will be, once none is on its way to the target
    bool halted;               // nothing may be issued any more
    bool issuing;              // the issue thread is in a call on the target
    bool failing;              // and the last one failed
    unsigned passing;          // changes on their way to the target that were not held
    struct held *records;      // a ring of MAX_HELD
    size_t first, count;
    size_t written;            // of these, from the first on, written and not yet flushed
    uint64_t allowed, issued;  // positions
    _Atomic uint64_t until;    // boot time, ns: nothing is begun at or after it
    uint64_t recent[SEEN_MOST];
    unsigned recents, next_recent;
    pthread_cond_t moved;      // there may be something to issue
    char why[200];             // why issuing fails
    bool told_failing;
    bool late, told_late;      // the time to issue what is allowed has run out
} hold;

static inline struct held *held_at(size_t number)
{
    return &hold.records[(hold.first + number) % MAX_HELD];
}

static inline bool holding(void)
{
    return hold.on;
}

static void set_holding(bool on)
{
    hold.on = on;
    set_flag(FLAG_HOLDING, on);
}

// Note where a change went that was not held.
static void remember(uint64_t offset)
{
    uint64_t block = offset / SEEN_BYTES * SEEN_BYTES;
    for (unsigned i = 0; i < hold.recents; i++)
        if (hold.recent[i] == block)
            return;
    hold.recent[hold.next_recent] = block;
    hold.next_recent = (hold.next_recent + 1) % SEEN_MOST;
    if (hold.recents < SEEN_MOST)
        hold.recents++;
}

static bool hold_overlaps(uint64_t offset, uint64_t length)
{
    for (size_t i = 0; i < hold.count; i++) {
        const struct held *held = held_at(i);
        if (held->offset < offset + length && offset < held->offset + held->extent)
            return true;
    }
    return false;
}

// What is held comes off the front: it is on stable storage, or was dropped.
static void hold_free(size_t number)
{
    if (number == 0)
        return;
    hold.issued = held_at(number - 1)->end;
    hold.first = (hold.first + number) % MAX_HELD;
    hold.count -= number;
    hold.written = 0;
    put(&disk.status->issued, hold.issued);
    pthread_cond_broadcast(&disk.room);
}

#endif
