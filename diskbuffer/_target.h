// SPDX-License-Identifier: Apache-2.0
// Opening the target, for one server at a time.

#ifndef KEMARI_TARGET_H
#define KEMARI_TARGET_H

#include <sys/mman.h>
#include <sys/sysmacros.h>

#include "_hold.h"

static char target_wrong[512];

static const char *target_refused(int fd, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(target_wrong, sizeof target_wrong, format, arguments);
    va_end(arguments);
    if (fd >= 0)
        close(fd);
    return target_wrong;
}

// Whether the lock was to be had; F_UNLCK gives it back.
static bool target_lock(int fd, short type)
{
    struct flock lock = {.l_type = type, .l_whence = SEEK_SET};
    return fcntl(fd, F_OFD_SETLK, &lock) == 0;
}

// What `fd` is of, opened for flushing; -1 with errno.
static int open_again(int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return open(path, O_RDONLY | O_CLOEXEC);
}

// Whether a block device says that it makes no holes: it takes no command that writes zeros.
static bool no_holes(dev_t device)
{
    // A partition has its queue beside it, in the folder of the whole device.
    static const char *const places[] = {"queue", "../queue"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        char path[128];
        snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s/write_zeroes_max_bytes",
                 major(device), minor(device), places[i]);
        FILE *file = fopen(path, "re");
        if (!file)
            continue;
        uint64_t most = 1;
        int found = fscanf(file, "%" SCNu64, &most);
        fclose(file);
        return found == 1 && most == 0;
    }
    return false;
}

// One server for a target: an exclusive open of a block device also keeps mounts away, a lock on
// a file only other servers.  Both end with the process.  NULL, or why not.
static const char *target_open(bool writing)
{
    struct stat about;
    if (stat(disk.target, &about) < 0)
        return target_refused(-1, "%s: %s", disk.target, strerror(errno));
    bool block = S_ISBLK(about.st_mode);
    if (!block && !S_ISREG(about.st_mode))
        return target_refused(-1, "%s is neither a file nor a block device", disk.target);
    int fd = open(disk.target, (writing ? O_RDWR : O_RDONLY) | O_CLOEXEC |
                                   (block && writing ? O_EXCL : 0) | (hold.shared ? O_DIRECT : 0));
    if (fd < 0 && errno == EBUSY)
        return target_refused(fd, "%s is in use (mounted, or another guest's disk)", disk.target);
    if (fd < 0 && errno == EINVAL && hold.shared)
        return target_refused(fd, "%s cannot be shared: it takes no direct I/O", disk.target);
    if (fd < 0)
        return target_refused(fd, "%s: %s", disk.target, strerror(errno));
    // Who stands by for another host takes no lock: that host may be on the same file system.
    if ((writing || disk.readonly) && !target_lock(fd, writing ? F_WRLCK : F_RDLCK))
        return target_refused(fd, "%s is in use as another guest's disk", disk.target);
    off_t size = lseek(fd, 0, SEEK_END);
    if (size < SECTOR)
        return target_refused(fd, "%s has %lld bytes, expected at least a sector of %d",
                              disk.target, (long long)size, SECTOR);
    if (hold.shared && direct_probe(fd) < 0)
        return target_refused(fd, "%s cannot be read: %s", disk.target, strerror(errno));
    if (hold.shared && (uint64_t)size % direct.align)
        return target_refused(fd, "%s has %lld bytes, expected a multiple of %d", disk.target,
                              (long long)size, (int)direct.align);
    if (writing && !hold.shared && (disk.clean_fd = open_again(fd)) < 0)
        return target_refused(fd, "%s: %s", disk.target, strerror(errno));
    uint64_t whole = (uint64_t)size / SECTOR * SECTOR;
    if (disk.fd >= 0 && whole != disk.size)
        return target_refused(fd, "%s has %" PRIu64 " bytes now, expected %" PRIu64, disk.target,
                              whole, disk.size);
    disk.size = whole;
    if (block && no_holes(about.st_rdev))
        disk.holes = false;
    if (disk.fd < 0)
        disk.fd = fd;
    else if (dup3(fd, disk.fd, O_CLOEXEC) < 0)
        return target_refused(fd, "%s: %s", disk.target, strerror(errno));
    else
        close(fd);
    return NULL;
}

// This host has the shared disk from now on.
static const char *target_take(void)
{
    return target_open(true);
}

#endif
