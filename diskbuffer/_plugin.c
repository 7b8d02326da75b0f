// SPDX-License-Identifier: Apache-2.0
// A plug-in for nbdkit that serves a disk and, while asked to, writes down every change to it in
// the order in which the changes were made.  docs/disk.md says what it promises.
//
// nbdkit's plug-in interface: nbdkit-plugin(3), API version 2.

#define _GNU_SOURCE

#if !__has_include(<nbdkit-plugin.h>)
#error "nbdkit's header is missing: install the package nbdkit-plugin-dev"
#endif

#define NBDKIT_API_VERSION 2
#include <nbdkit-plugin.h>

#include "_target.h"

#include "_control.h"

#define THREAD_MODEL NBDKIT_THREAD_MODEL_PARALLEL

static struct {
    bool replica;
    pthread_t threads[3];
    unsigned running;
} plugin;

// ---- Configuration ----

static int set_flag_from(const char *value, bool *flag)
{
    int parsed = nbdkit_parse_bool(value);
    if (parsed < 0)
        return -1;
    // Not as "parsed > 0": as SETG to a page that is not present yet it comes out false in QEMU's
    // software emulation (7.2), which spends the condition before the fault and tests it again after.
    *flag = parsed;
    return 0;
}

static int set_seconds(const char *key, const char *value, double *seconds)
{
    char *end;
    *seconds = strtod(value, &end);
    if (*end || end == value || !(*seconds >= 0.01 && *seconds <= 86400)) {
        nbdkit_error("%s=%s: expected 0.01 to 86400 seconds", key, value);
        return -1;
    }
    return 0;
}

static int disk_config(const char *key, const char *value)
{
    if (strcmp(key, "target") == 0)
        return (disk.target = nbdkit_realpath(value)) ? 0 : -1;
    if (strcmp(key, "dir") == 0)
        return (disk.folder = nbdkit_realpath(value)) ? 0 : -1;
    if (strcmp(key, "bitmap") == 0)
        return (disk.bitmap_path = nbdkit_absolute_path(value)) ? 0 : -1;
    if (strcmp(key, "replica") == 0)
        return set_flag_from(value, &plugin.replica);
    if (strcmp(key, "shared") == 0)
        return set_flag_from(value, &hold.shared);
    if (strcmp(key, "readonly") == 0)
        return set_flag_from(value, &disk.readonly);
    if (strcmp(key, "clean") == 0)
        return set_seconds(key, value, &control.clean_every);
    if (strcmp(key, "patience") == 0)
        return set_seconds(key, value, &stream.patience);
    if (strcmp(key, "queue") == 0) {
        int64_t size = nbdkit_parse_size(value);
        if (size < (int64_t)MIN_QUEUE || size > INT64_C(1) << 32) {
            nbdkit_error("queue=%s: expected 4M to 4G", value);
            return -1;
        }
        stream.limit = (uint64_t)size;
        return 0;
    }
    nbdkit_error("unknown parameter %s", key);
    return -1;
}

static int disk_config_complete(void)
{
    if (disk.target && disk.folder)
        return 0;
    nbdkit_error("%s=... is missing", disk.target ? "dir" : "target");
    return -1;
}

// ---- Life ----

static int make_status(void)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/status", disk.folder);
    // A new file each time: whoever has the former one mapped keeps what it said last.
    unlink(path);
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, 4096) < 0) {
        nbdkit_error("%s: %s", path, strerror(errno));
        return -1;
    }
    disk.status = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (disk.status == MAP_FAILED) {
        nbdkit_error("%s: %s", path, strerror(errno));
        return -1;
    }
    put(&disk.status->size, disk.size);
    put(&disk.status->limit, stream.limit);
    set_flag(FLAG_READONLY, disk.readonly);
    set_flag(FLAG_REPLICA, plugin.replica);
    set_flag(FLAG_SHARED, hold.shared);
    put(&disk.status->version, 1);
    memcpy(disk.status->magic, "KMRIDISK", 8);
    return 0;
}

static int disk_get_ready(void)
{
    char path[4096];
    // A shared target is another host's while this one stands by.
    const char *wrong = target_open(!disk.readonly && !(hold.shared && plugin.replica));
    if (wrong) {
        nbdkit_error("%s", wrong);
        return -1;
    }
    if (make_status() < 0)
        return -1;
    if (hold.shared && !(hold.records = calloc(MAX_HELD, sizeof *hold.records))) {
        nbdkit_error("no memory for a list of %u changes", MAX_HELD);
        return -1;
    }
    snprintf(path, sizeof path, "%s/control", disk.folder);
    if (control_listen(path) < 0)
        return -1;
    stream.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    stream.queue = mmap(NULL, stream.limit, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stream.wake < 0 || stream.queue == MAP_FAILED) {
        nbdkit_error("no memory for a queue of %" PRIu64 " bytes", stream.limit);
        return -1;
    }
    // A replica's bitmap is of an earlier time: it is read when the replica becomes a disk.
    if (disk.bitmap_path && !disk.readonly && !plugin.replica && !hold.shared) {
        wrong = bitmap_load();
        if (wrong)
            nbdkit_debug("%s: %s: writes are not tracked", disk.bitmap_path, wrong);
    }
    return 0;
}

static int disk_after_fork(void)
{
    void *(*const bodies[])(void *) = {drain_thread, control_thread,
                                       hold.shared ? issue_thread : sync_thread};
    const unsigned number = sizeof bodies / sizeof *bodies;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&disk.room, &monotonic);
    pthread_cond_init(&disk.data, &monotonic);
    pthread_cond_init(&disk.sync, &monotonic);
    pthread_cond_init(&hold.moved, &monotonic);
    put(&disk.status->pid, (uint64_t)getpid());
    for (; plugin.running < number; plugin.running++) {
        int error = pthread_create(&plugin.threads[plugin.running], NULL, bodies[plugin.running],
                                   NULL);
        if (error) {
            nbdkit_error("no thread could be made: %s", strerror(error));
            return -1;
        }
    }
    return 0;
}

static void disk_cleanup(void)
{
    if (plugin.running == 0)
        return;
    pthread_mutex_lock(&disk.lock);
    hold_await_release();
    disk.stopping = true;
    if (stream.fd >= 0)
        shutdown(stream.fd, SHUT_RDWR);
    pthread_cond_broadcast(&disk.room);
    pthread_cond_broadcast(&disk.data);
    pthread_cond_broadcast(&disk.sync);
    pthread_cond_broadcast(&hold.moved);
    wake_control();
    pthread_mutex_unlock(&disk.lock);
    while (plugin.running > 0)
        pthread_join(plugin.threads[--plugin.running], NULL);
    if (!disk.readonly && flush_target(disk.fd) < 0)
        nbdkit_error("%s could not be flushed: %s", disk.target, strerror(errno));
}

static void *disk_open(int readonly)
{
    (void)readonly;
    return &disk;
}

static int64_t disk_get_size(void *handle)
{
    (void)handle;
    return (int64_t)disk.size;
}

static int disk_can_write(void *handle)
{
    (void)handle;
    return !disk.readonly;
}

static int yes(void *handle)
{
    (void)handle;
    return 1;
}

// Whether a shared target makes holes would be known only when it is too late to refuse one.  One
// that makes none is not asked to: even that it refuses may change what it reads as.
static int disk_can_trim(void *handle)
{
    (void)handle;
    return !hold.shared && disk.holes;
}

// nbdkit calls flush after a write with FUA, so that its record is in the stream behind the
// write's.
static int disk_can_fua(void *handle)
{
    (void)handle;
    return NBDKIT_FUA_EMULATE;
}

static int disk_block_size(void *handle, uint32_t *minimum, uint32_t *preferred,
                           uint32_t *maximum)
{
    (void)handle;
    *minimum = 1, *preferred = 4096, *maximum = 32u << 20;
    return 0;
}

// ---- Requests ----

static int disk_pread(void *handle, void *buffer, uint32_t length, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)flags;
    int result = hold.shared ? hold_read(buffer, length, offset)
                             : read_all(disk.fd, buffer, length, offset);
    if (result < 0) {
        int error = errno;
        count(&disk.status->errors, 1);
        nbdkit_error("%s: reading %" PRIu32 " bytes at %" PRIu64 ": %s", disk.target, length,
                     offset, strerror(error));
        nbdkit_set_error(error);
        return -1;
    }
    count(&disk.status->reads, 1);
    count(&disk.status->read_bytes, length);
    return 0;
}

// What a change is made by, in either mode.
typedef int maker(const void *, uint64_t, uint64_t);

static int do_write(const void *data, uint64_t offset, uint64_t length)
{
    return write_all(disk.fd, data, length, offset);
}

static int do_zero(const void *data, uint64_t offset, uint64_t length)
{
    (void)data;
    return fallocate(disk.fd, FALLOC_FL_ZERO_RANGE, (off_t)offset, (off_t)length);
}

static int do_punch(const void *data, uint64_t offset, uint64_t length)
{
    (void)data;
    int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    return fallocate(disk.fd, mode, (off_t)offset, (off_t)length);
}

// Whether a change failed for being of a kind that the target does not take (as a hole that is not
// of whole blocks), rather than for trouble with it.
static bool unsupported(maker *make, int error)
{
    return make != do_write && (error == EOPNOTSUPP || error == EINVAL);
}

// Make one change: mark it, do it, write it down.  -1 with errno: then it is not in the stream,
// and what the range holds is unknown, so the standby gets that once more.
static int replicated_change(maker *make, struct record record, const void *payload)
{
    int result = -1, error = EROFS;
    pthread_mutex_lock(&disk.lock);
    if (disk.readonly || has_flag(FLAG_REPLICA))
        goto out;
    if (make == do_punch && !disk.holes) {
        error = EOPNOTSUPP;
        goto out;
    }
    await_room(sizeof record + record.length, stream.limit, true);
    switch (bitmap_mark(record.offset, record.extent)) {
    case REFUSED:
        error = EIO;
        stream_break("The bitmap %s can neither be written nor removed", disk.bitmap_path);
        goto out;
    case UNTRACKED:
        stream_break("The bitmap %s cannot be written", disk.bitmap_path);
        bitmap_close();
        break;
    case MARKED:
        break;
    }
    result = make(payload, record.offset, record.extent);
    error = errno;
    if (result == 0)
        append(&record, payload);
    else {
        if (!unsupported(make, error))
            count(&disk.status->errors, 1);
        // A block device drops what the page cache has of a range before it finds that it cannot
        // make a hole there: older contents come to light (blkdev_fallocate, block/fops.c of Linux).
        if (!unsupported(make, error) || make == do_punch)
            sync_again(record.offset, record.extent);
        if (make == do_punch && error == EOPNOTSUPP)
            disk.holes = false;
    }
out:
    pthread_mutex_unlock(&disk.lock);
    errno = error;
    return result;
}

static int change(maker *make, struct record record, const void *payload)
{
    int result;
    if (hold.shared) {
        enum direct_kind kind = make == do_write ? DIRECT_WRITE
                                : make == do_punch ? DIRECT_PUNCH : DIRECT_ZERO;
        result = hold_change(kind, &record, payload);
    } else
        result = replicated_change(make, record, payload);
    int error = errno;
    if (result < 0 && !unsupported(make, error))
        nbdkit_error("%s: changing %" PRIu64 " bytes at %" PRIu64 ": %s", disk.target,
                     record.extent, record.offset, strerror(error));
    errno = error;
    return result;
}

static int disk_pwrite(void *handle, const void *buffer, uint32_t length, uint64_t offset,
                       uint32_t flags)
{
    (void)handle, (void)flags;
    const uint8_t *data = buffer;
    count(&disk.status->writes, 1);
    count(&disk.status->written_bytes, length);
    while (length > 0) {
        uint32_t part = length < SLICE ? length : SLICE;
        struct record record = make_record(RECORD_WRITE, 0, offset, part, data, part);
        if (change(do_write, record, data) < 0) {
            nbdkit_set_error(errno);
            return -1;
        }
        data += part, offset += part, length -= part;
    }
    return 0;
}

static int disk_zero(void *handle, uint32_t length, uint64_t offset, uint32_t flags)
{
    static const uint8_t zeros[SLICE];
    count(&disk.status->writes, 1);
    bool punch = flags & NBDKIT_FLAG_MAY_TRIM;
    unsigned kind = punch ? RECORD_PUNCH : 0;
    struct record whole = make_record(RECORD_ZERO, kind, offset, length, NULL, 0);
    maker *make = punch ? do_punch : do_zero;
    if (length == 0 || change(make, whole, NULL) == 0)
        return 0;
    while (unsupported(make, errno) && length > 0) {
        uint32_t part = length < SLICE ? length : SLICE;
        struct record record = make_record(RECORD_ZERO, kind, offset, part, NULL, 0);
        if (change(do_write, record, zeros) < 0)
            break;
        offset += part, length -= part;
        errno = EOPNOTSUPP;
    }
    (void)handle;
    if (length == 0)
        return 0;
    nbdkit_set_error(errno);
    return -1;
}

// Discarding is allowed to do nothing, and must not leave contents that only this host has: so it
// is a hole, which reads as zeros here and on the standby, or nothing.
static int disk_trim(void *handle, uint32_t length, uint64_t offset, uint32_t flags)
{
    (void)handle, (void)flags;
    struct record record = make_record(RECORD_ZERO, RECORD_PUNCH, offset, length, NULL, 0);
    if (length == 0 || change(do_punch, record, NULL) == 0 || unsupported(do_punch, errno))
        return 0;
    nbdkit_set_error(errno);
    return -1;
}

// The guest's flush.  The kernel tells an open file once that it could not write something back
// (errseq_t), whichever of several flushes asks first.  Any of them may be for what was lost, so all
// fail from then on, until the disk is served anew.  -1 with errno.
static int replicated_flush(void)
{
    static pthread_mutex_t flushing = PTHREAD_MUTEX_INITIALIZER;
    static int lost;  // the error
    pthread_mutex_lock(&flushing);
    if (lost == 0 && flush_target(disk.fd) < 0)
        lost = errno;
    int error = lost;
    pthread_mutex_unlock(&flushing);
    errno = error;
    return error ? -1 : 0;
}

static int disk_flush(void *handle, uint32_t flags)
{
    (void)handle, (void)flags;
    if ((hold.shared ? hold_flush() : replicated_flush()) < 0) {
        int error = errno;
        count(&disk.status->errors, 1);
        nbdkit_error("%s: flushing: %s", disk.target, strerror(error));
        nbdkit_set_error(error);
        return -1;
    }
    count(&disk.status->flushes, 1);
    if (hold.shared)
        return 0;
    struct record record = make_record(RECORD_FLUSH, 0, 0, 0, NULL, 0);
    pthread_mutex_lock(&disk.lock);
    await_room(sizeof record, stream.limit, true);
    append(&record, NULL);
    pthread_mutex_unlock(&disk.lock);
    return 0;
}

static struct nbdkit_plugin plugin_table = {
    .name = "kemari",
    .longname = "Kemari disk",
    .description = "a disk whose changes are written down for a standby",
    .config = disk_config,
    .config_complete = disk_config_complete,
    .config_help = "target=PATH    the file or block device (required)\n"
                   "dir=PATH       folder for the control socket and the status page (required)\n"
                   "bitmap=PATH    the write-intent bitmap\n"
                   "replica=BOOL   refuse changes until told that this is the guest's disk\n"
                   "readonly=BOOL  refuse changes\n"
                   "shared=BOOL    another host reaches the target too: hold changes when told to\n"
                   "queue=SIZE     bytes of changes that wait to be read (64M)\n"
                   "clean=SECONDS  time between two rounds of clearing marks (10)\n"
                   "patience=SECONDS  time that a write waits for a reader that stands still (30)",
    .magic_config_key = "target",
    .get_ready = disk_get_ready,
    .after_fork = disk_after_fork,
    .cleanup = disk_cleanup,
    .open = disk_open,
    .get_size = disk_get_size,
    .can_write = disk_can_write,
    .can_flush = yes,
    .can_trim = disk_can_trim,
    .can_zero = yes,
    .can_fua = disk_can_fua,
    .can_multi_conn = yes,
    .block_size = disk_block_size,
    .pread = disk_pread,
    .pwrite = disk_pwrite,
    .zero = disk_zero,
    .trim = disk_trim,
    .flush = disk_flush,
    .errno_is_preserved = 1,
};

NBDKIT_REGISTER_PLUGIN(plugin_table)
