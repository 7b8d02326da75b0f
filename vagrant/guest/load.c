// SPDX-License-Identifier: Apache-2.0
// The benchmark's loads inside the guest, and what the guest itself sees of being protected.
//
// Port 7171, TCP, one command a line, one line of answer, each connection in a process of its own.
// write and compress say "begun" in a line before it, when their time begins:
//     write SECONDS RATE MIB PATTERN  read the clock all the time, and write RATE pages a second of
//                                     an area of MIB (RATE 0: only read the clock).  PATTERN is
//         sequential  each page after the one before, new incompressible content
//         random      any page, new incompressible content
//         same        each page after the one before, what it holds already
//         zero        each page after the one before; one round new content, one round zeroes
//                                     Answer: pages written, the longest gap between two readings
//                                     in nanoseconds, and BUCKET:COUNT of all gaps (see bucket)
//     compress SECONDS                deflate text on and on; answer: bytes of text
//     send SECONDS                    send data for so long, then close the connection
//     receive                         take data until the sender ends its side; answer: bytes
//     suspends [COUNT]                how often the kernel was suspended, once it was COUNT times
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <zlib.h>

enum { PORT = 7171, LINE = 256, PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), TEXT = 1 << 20 };
enum { FINE = 4, BUCKETS = 64 << FINE };
// Gaps below this, an eighth of a millisecond, are the loop itself.
static const int64_t LEAST_GAP = 1 << 17;

static atomic_ullong *suspends; // shared

static void die(const char *what)
{
    fprintf(stderr, "LOAD FAILED: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * INT64_C(1000000000) + time.tv_nsec;
}

static int64_t nanoseconds(double seconds)
{
    return seconds * 1e9;
}

static uint64_t chance(void)
{
    static uint64_t value = UINT64_C(0x9e3779b97f4a7c15);
    value ^= value << 13, value ^= value >> 7, value ^= value << 17;
    return value;
}

static void say_begun(FILE *out)
{
    fprintf(out, "begun\n");
    fflush(out);
}

// ---- memory and the clock ----

// Sixteen buckets for each power of two: of 2^e <= gap < 2^(e+1) the four bits after the first.
static unsigned bucket(uint64_t gap)
{
    unsigned exponent = 63 - __builtin_clzll(gap);
    return exponent << FINE | ((gap >> (exponent - FINE)) & ((1 << FINE) - 1));
}

static void fill(volatile uint64_t *page)
{
    for (size_t i = 0; i < WORDS; i++)
        page[i] = chance();
}

static void write_page(volatile uint64_t *area, uint64_t pages, uint64_t number, const char *pattern)
{
    uint64_t place = (!strcmp(pattern, "random") ? chance() : number) % pages;
    volatile uint64_t *page = area + place * WORDS;
    if (!strcmp(pattern, "same")) {
        for (size_t i = 0; i < WORDS; i++)
            page[i] = page[i];
    } else if (!strcmp(pattern, "zero") && number / pages % 2 == 1) {
        for (size_t i = 0; i < WORDS; i++)
            page[i] = 0;
    } else
        fill(page);
}

static bool known(const char *pattern)
{
    return !strcmp(pattern, "sequential") || !strcmp(pattern, "random") ||
           !strcmp(pattern, "same") || !strcmp(pattern, "zero");
}

static void write_memory(FILE *out, double seconds, double rate, long mib, const char *pattern)
{
    size_t size = (size_t)mib << 20;
    uint64_t *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t *counts = calloc(BUCKETS, sizeof *counts);
    if (area == MAP_FAILED || !counts) {
        fprintf(out, "error no memory\n");
        return;
    }
    if (rate > 0)
        for (size_t page = 0; page < size / PAGE; page++)
            fill(area + page * WORDS);
    say_begun(out);
    uint64_t written = 0;
    int64_t begin = now(), last = begin, longest = 0;
    while (last - begin < nanoseconds(seconds)) {
        if (written < (last - begin) / 1e9 * rate)
            write_page(area, size / PAGE, written++, pattern);
        int64_t time = now(), gap = time - last;
        if (gap > longest)
            longest = gap;
        if (gap >= LEAST_GAP)
            counts[bucket(gap)]++;
        last = time;
    }
    fprintf(out, "ok write %" PRIu64 " %" PRId64, written, longest);
    for (unsigned i = 0; i < BUCKETS; i++)
        if (counts[i])
            fprintf(out, " %u:%" PRIu64, i, counts[i]);
    fprintf(out, "\n");
    free(counts);
    munmap(area, size);
}

// ---- compression ----

static void write_text(unsigned char *text)
{
    static const char *const words[] = {"guest ", "host ", "page ", "checkpoint ", "answer ",
                                        "of ", "the ", "and ", "network ", "memory\n"};
    size_t used = 0;
    while (used < TEXT) {
        char number[24];
        const char *word = words[chance() % 10];
        if (chance() % 4 == 0) {
            snprintf(number, sizeof number, "%u ", (unsigned)(chance() % 10000));
            word = number;
        }
        size_t length = strlen(word);
        if (length > TEXT - used)
            length = TEXT - used;
        memcpy(text + used, word, length);
        used += length;
    }
}

static void compress_text(FILE *out, double seconds)
{
    uLong room = compressBound(TEXT);
    unsigned char *text = malloc(TEXT), *packed = malloc(room);
    if (!text || !packed) {
        fprintf(out, "error no memory\n");
        return;
    }
    write_text(text);
    say_begun(out);
    uint64_t done = 0;
    int64_t begin = now();
    // In parts: the time that it takes is to be seen finer than by the whole text.
    enum { PART = 64 * 1024 };
    for (size_t at = 0; now() - begin < nanoseconds(seconds); at = (at + PART) % TEXT) {
        uLong length = room;
        if (compress(packed, &length, text + at, PART) != Z_OK) {
            fprintf(out, "error compress\n");
            return;
        }
        done += PART;
    }
    fprintf(out, "ok compress %" PRIu64 "\n", done);
    free(text);
    free(packed);
}

// ---- bulk ----

static void send_bulk(FILE *out, double seconds)
{
    static uint64_t pages[16][WORDS];
    int64_t end = now() + nanoseconds(seconds);
    do {
        for (size_t i = 0; i < 16; i++)
            fill(pages[i]);
    } while (now() < end && fwrite(pages, sizeof pages, 1, out) == 1);
    fflush(out);
    _exit(0);
}

static void receive_bulk(FILE *in, FILE *out)
{
    static char block[64 * 1024];
    uint64_t received = 0;
    size_t n;
    while ((n = fread(block, 1, sizeof block, in)) > 0)
        received += n;
    fprintf(out, "ok receive %" PRIu64 "\n", received);
}

// ---- suspends ----

// The kernel logs that it stops user space each time when it is suspended, live or for Remus.
static void count_suspends(const char *path)
{
    char record[8192];
    int log = open(path, O_RDONLY | O_CLOEXEC);
    if (log < 0)
        die(path);
    for (;;) {
        ssize_t n = read(log, record, sizeof record - 1);
        if (n == 0)
            _exit(0);
        if (n < 0 && errno != EPIPE && errno != EINTR)
            die(path);
        if (n < 0)
            continue;
        record[n] = 0;
        if (strstr(record, "Freezing user space processes"))
            atomic_fetch_add(suspends, 1);
    }
}

static void tell_suspends(FILE *out, unsigned long long count)
{
    while (atomic_load(suspends) < count)
        usleep(50000);
    fprintf(out, "ok suspends %llu\n", atomic_load(suspends));
}

// ---- the service ----

static void serve(int fd)
{
    char line[LINE], pattern[16];
    FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
    if (!in || !out)
        _exit(1);
    while (fgets(line, sizeof line, in)) {
        double seconds, rate;
        long mib;
        unsigned long long count = 0;
        if (sscanf(line, "write %lf %lf %ld %15s", &seconds, &rate, &mib, pattern) == 4 &&
            rate >= 0 && mib > 0 && known(pattern))
            write_memory(out, seconds, rate, mib, pattern);
        else if (sscanf(line, "compress %lf", &seconds) == 1)
            compress_text(out, seconds);
        else if (sscanf(line, "send %lf", &seconds) == 1)
            send_bulk(out, seconds);
        else if (!strncmp(line, "receive", 7))
            receive_bulk(in, out);
        else if (!strncmp(line, "suspends", 8)) {
            sscanf(line, "suspends %llu", &count);
            tell_suspends(out, count);
        } else
            fprintf(out, "error unknown command\n");
        fflush(out);
    }
    _exit(0);
}

// load [PORT [LOG]]: another port, and what to read instead of the kernel's log.
int main(int argc, char **argv)
{
    int port = argc > 1 ? atoi(argv[1]) : PORT;
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int on = 1, listener = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    suspends = mmap(NULL, sizeof *suspends, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1,
                    0);
    if (suspends == MAP_FAILED)
        die("mmap");
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 16))
        die("port");
    pid_t child = fork();
    if (child == 0)
        count_suspends(argc > 2 ? argv[2] : "/dev/kmsg");
    if (child < 0)
        die("fork");
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            continue;
        if (fork() == 0)
            serve(fd);
        close(fd);
    }
}
