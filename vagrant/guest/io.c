// SPDX-License-Identifier: Apache-2.0
// How fast a disk of the guest is: requests of one size, DEPTH of them at a time, past the cache.
//
// Debian's fio would need some sixty libraries in the guest, down to those of Ceph.
#define _GNU_SOURCE
#include "io.h"
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MOST_DEPTH = 32, MOST_SIZE = 4 << 20, SAMPLES = 1 << 16, BLOCK = 4096 };

struct job {
    int fd;
    bool write, random;
    size_t size;
    uint64_t places; // requests that cover the disk once
    int64_t end;     // nanoseconds of CLOCK_MONOTONIC
    atomic_ullong next;
    atomic_uint samples;
    atomic_int error;
    uint32_t microseconds[SAMPLES]; // of each request
};

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

// A well mixed number for each place in the order of requests (the finalizer of MurmurHash3).
static uint64_t mix(uint64_t value)
{
    value = (value ^ value >> 33) * UINT64_C(0xff51afd7ed558ccd);
    value = (value ^ value >> 33) * UINT64_C(0xc4ceb9fe1a85ec53);
    return value ^ value >> 33;
}

// One of the requests that are under way at a time, again and again.
static void *work(void *what)
{
    struct job *job = what;
    uint64_t *buffer = aligned_alloc(BLOCK, job->size);
    int64_t begin = now();
    if (!buffer)
        atomic_store(&job->error, ENOMEM);
    for (size_t i = 0; buffer && i < job->size / sizeof *buffer; i++)
        buffer[i] = mix(i + 1);
    while (!atomic_load(&job->error) && begin < job->end) {
        uint64_t number = atomic_fetch_add(&job->next, 1);
        off_t at = (job->random ? mix(number + 1) : number) % job->places * job->size;
        for (size_t i = 0; job->write && i < job->size; i += BLOCK)
            buffer[i / sizeof *buffer] = number; // no block is what it was
        ssize_t done = job->write ? pwrite(job->fd, buffer, job->size, at)
                                  : pread(job->fd, buffer, job->size, at);
        if (done != (ssize_t)job->size)
            atomic_store(&job->error, done < 0 ? errno : EIO);
        int64_t end = now();
        unsigned sample = atomic_fetch_add(&job->samples, 1);
        if (sample < SAMPLES)
            job->microseconds[sample] = (end - begin) / 1000;
        begin = end;
    }
    free(buffer);
    return NULL;
}

static int compare(const void *one, const void *other)
{
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static void run(struct job *job, long depth, double seconds, FILE *out)
{
    pthread_t threads[MOST_DEPTH];
    int64_t begin = now();
    long running = 0;
    job->end = begin + seconds * 1e9;
    while (running < depth && !pthread_create(&threads[running], NULL, work, job))
        running++;
    for (long i = 0; i < running; i++)
        pthread_join(threads[i], NULL);
    unsigned done = atomic_load(&job->samples), kept = done < SAMPLES ? done : SAMPLES;
    int error = running < depth ? EAGAIN : atomic_load(&job->error);
    if (error || !done) {
        fprintf(out, "error io: %s\n", error ? strerror(error) : "nothing was done in time");
        return;
    }
    qsort(job->microseconds, kept, sizeof *job->microseconds, compare);
    fprintf(out, "ok io requests %u seconds %.6f p50_us %" PRIu32 " p99_us %" PRIu32 "\n", done,
            (now() - begin) / 1e9, job->microseconds[kept / 2],
            job->microseconds[(uint64_t)kept * 99 / 100]);
}

void measure_io(FILE *out, const char *line)
{
    char device[64], what[16], order[16];
    long size, depth;
    double seconds;
    if (sscanf(line, "io %63s %15s %15s %ld %ld %lf", device, what, order, &size, &depth,
               &seconds) != 6 ||
        size < BLOCK || size > MOST_SIZE || size % BLOCK || depth < 1 || depth > MOST_DEPTH) {
        fprintf(out, "error io DEVICE read|write sequential|random SIZE DEPTH SECONDS\n");
        return;
    }
    struct job *job = calloc(1, sizeof *job);
    job->write = !strcmp(what, "write");
    job->random = !strcmp(order, "random");
    job->size = size;
    job->fd = open(device, (job->write ? O_WRONLY : O_RDONLY) | O_DIRECT | O_CLOEXEC);
    off_t end = job->fd < 0 ? -1 : lseek(job->fd, 0, SEEK_END);
    job->places = end < 0 ? 0 : end / size;
    if (job->places)
        run(job, depth, seconds, out);
    else
        fprintf(out, "error io: %s: %s\n", device, end < 0 ? strerror(errno) : "too small");
    if (job->fd >= 0)
        close(job->fd);
    free(job);
}
