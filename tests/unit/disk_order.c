// SPDX-License-Identifier: Apache-2.0
// Loaded into a disk's server by a test: writes down, in their order, the calls that change or flush
// a file.  A line is "write FD OFFSET LENGTH" or "sync FD", into $KEMARI_ORDER.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int into = -1;

__attribute__((constructor)) static void begin(void)
{
    const char *path = getenv("KEMARI_ORDER");
    if (path)
        into = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
}

static void note(const char *what, int fd, long long offset, size_t length)
{
    char name[4096], link[64], line[4300];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, name, sizeof name - 1);
    if (into < 0 || size < 0)
        return;
    name[size] = 0;
    const char *base = strrchr(name, '/');
    int used = snprintf(line, sizeof line, "%s %s %lld %zu\n", what, base ? base + 1 : name, offset,
                        length);
    if (write(into, line, (size_t)used) != used)
        abort();
}

ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
{
    ssize_t (*real)(int, const void *, size_t, off_t) =
        (ssize_t(*)(int, const void *, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
    note("write", fd, offset, length);
    return real(fd, data, length, offset);
}

ssize_t pwrite64(int fd, const void *data, size_t length, off_t offset)
{
    return pwrite(fd, data, length, offset);
}

int fdatasync(int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    int result = real(fd);
    // Behind the call: only then is anything on stable storage.
    note("sync", fd, 0, 0);
    return result;
}
