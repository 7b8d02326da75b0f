// SPDX-License-Identifier: Apache-2.0
// Loaded into a disk's server by a test: lets calls on files fail.  While there is a file
// $KEMARI_FAULTS/CALL:NAME, that call on files of that name fails with the error number in it.
//
// fallocate    leaves junk in the range, as a device that gives up half way may
// writeback    fdatasync fails once for each open file, as it does after the kernel could not
//              write pages back (errseq_t, lib/errseq.c of Linux); $KEMARI_FAULTS/told is made then,
//              and if there is a FIFO $KEMARI_FAULTS/gate, the call goes on once somebody writes to it

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FILES 1024

static bool told[FILES];  // of a failed write-back, by descriptor

// The error with which a call on a file of that name is to fail, or 0.
static int fault(const char *call, const char *name)
{
    char path[8192];
    const char *base = strrchr(name, '/');
    snprintf(path, sizeof path, "%s/%s:%s", getenv("KEMARI_FAULTS"), call, base ? base + 1 : name);
    FILE *file = fopen(path, "re");
    int error = 0;
    if (file && fscanf(file, "%d", &error) != 1)
        error = 0;
    if (file)
        fclose(file);
    return error;
}

static int fault_of(const char *call, int fd)
{
    char name[4096], link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, name, sizeof name - 1);
    if (size < 0)
        return 0;
    name[size] = 0;
    return fault(call, name);
}

// Open $KEMARI_FAULTS/NAME and close it again, which makes a file, and waits at a FIFO.
static void visit(const char *name, const char *mode)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", getenv("KEMARI_FAULTS"), name);
    FILE *file = fopen(path, mode);
    if (file)
        fclose(file);
}

static int failed(int error)
{
    errno = error;
    return -1;
}

ssize_t pread(int fd, void *data, size_t length, off_t offset)
{
    ssize_t (*real)(int, void *, size_t, off_t) =
        (ssize_t(*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    int error = fault_of("pread", fd);
    return error ? failed(error) : real(fd, data, length, offset);
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off_t) =
        (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    int error = fault_of("pwrite", fd);
    return error ? failed(error) : real(fd, data, length, offset);
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int error = fault_of("fdatasync", fd), lost = fault_of("writeback", fd);
    bool once = lost && !told[fd % FILES];
    told[fd % FILES] = lost;
    if (once) {
        visit("told", "we");
        visit("gate", "re");
    }
    return error || once ? failed(error ? error : lost) : real(fd);
}

int fallocate(int fd, int mode, off_t offset, off_t length)
{
    int (*real)(int, int, off_t, off_t) =
        (int (*)(int, int, off_t, off_t))dlsym(RTLD_NEXT, "fallocate");
    int error = fault_of("fallocate", fd);
    if (!error)
        return real(fd, mode, offset, length);
    if (pwrite(fd, "junk", 4, offset) != 4)
        abort();
    return failed(error);
}

int unlink(const char *path)
{
    int (*real)(const char *) = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    int error = fault("unlink", path);
    return error ? failed(error) : real(path);
}

int open(const char *path, int flags, ...)
{
    int (*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open");
    va_list more;
    va_start(more, flags);
    mode_t mode = flags & O_CREAT ? va_arg(more, mode_t) : 0;
    va_end(more);
    int error = fault("open", path);
    return error ? failed(error) : real(path, flags, mode);
}
