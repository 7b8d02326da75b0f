// SPDX-License-Identifier: Apache-2.0
// The demo's service, and the guest's process 1.
//
// Port 7777, TCP and UDP, IPv4 and IPv6: each request line X is answered by
//     X COUNT MONOTONIC BOOTTIME REALTIME
// COUNT numbers the answers of one TCP connection from 1 (UDP: of the service), the rest are the
// guest's clocks in nanoseconds.
//
// Port 7878, TCP: registers, for clients that check what they are told (registers.py).  One command
// a line, one line of answer; words have at most 31 letters, and a register begins as "-":
//     GET KEY                    its value
//     PUT KEY VALUE              "ok"
//     CAS KEY OLD NEW            "ok" if it was OLD and is NEW now, else "no"
//     INCR KEY NUMBER            its new value; "-" counts as 0
// Commands of all connections are carried out one after the other.
//
// Port 7070, TCP, one command a line, one line of answer:
//     dirty PAGES [MIB]          write that many pages each second, in an area of MIB (16)
//     keep KIB [MIB]             write that much to random pages of an area of MIB (8) each second,
//                                and check on and on that each page holds what was written last
//     kept [ROUNDS]              "ok kept WRITES ROUNDS MISMATCHES" of keep, as soon as the whole
//                                area was checked so many times
//     cpu [COUNT]                that many busy loops (1)
//     burst COUNT PORT [SIZE]    send numbered UDP datagrams of SIZE (64) bytes to the asker
//     send KIB                   send that much data down this connection before the answer
//     io DEVICE read|write sequential|random SIZE DEPTH SECONDS
//                                how fast a disk is past the cache, with DEPTH requests at a time
//     clock SECONDS              read the clocks in a busy loop; tells gaps and steps backwards
//     stop                       end what dirty, keep and cpu began
// dirty, keep and cpu go on after the connection is closed.
#define _GNU_SOURCE
#include "io.h"
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { REGISTERS = 256, WORD = 32 };
enum { ECHO_PORT = 7777, REGISTER_PORT = 7878, COMMAND_PORT = 7070, LINE = 1024, PENDING = 64 * 1024, PAGE = 4096 };

struct connection {
    int fd;
    bool registers;
    uint64_t count;
    size_t in_used, out_used;
    char in[LINE], out[PENDING];
};

static int poller, echo_listener, register_listener, command_listener, echo_udp;
static atomic_uint *generation; // of the loads; shared, a load ends when it changes
static struct {
    atomic_ullong writes, rounds, mismatches;
} *kept; // what the load `keep` has come to; shared

static void die(const char *what)
{
    fprintf(stderr, "DEMO FAILED: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int64_t nanoseconds(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static int open_socket(int type, int port)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(port)};
    int off = 0, on = 1;
    int fd = socket(AF_INET6, type | SOCK_CLOEXEC, 0);
    if (fd < 0 || setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off) ||
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(fd, (struct sockaddr *)&any, sizeof any))
        die("bind");
    if (type == SOCK_STREAM && listen(fd, 128))
        die("listen");
    return fd;
}

static void watch(int operation, int fd, uint32_t events, void *what)
{
    struct epoll_event event = {.events = events, .data.ptr = what};
    if (epoll_ctl(poller, operation, fd, &event))
        die("epoll_ctl");
}

static int answer(char *out, size_t room, const char *request, int length, uint64_t count)
{
    int64_t monotonic = nanoseconds(CLOCK_MONOTONIC), boottime = nanoseconds(CLOCK_BOOTTIME);
    return snprintf(out, room, "%.*s %" PRIu64 " %" PRId64 " %" PRId64 " %" PRId64 "\n", length,
                    request, count, monotonic, boottime, nanoseconds(CLOCK_REALTIME));
}

// ---- the echo service ----

static void close_connection(struct connection *c)
{
    // By hand: a descriptor that a child still holds would go on to report events.
    epoll_ctl(poller, EPOLL_CTL_DEL, c->fd, NULL);
    close(c->fd);
    free(c);
}

static struct {
    char key[WORD], value[WORD];
} registers[REGISTERS];

// The value of a register, which is made if it is new; NULL if there is no room.
static char *find(const char *key)
{
    for (int i = 0; i < REGISTERS; i++) {
        if (!registers[i].key[0]) {
            strcpy(registers[i].key, key);
            strcpy(registers[i].value, "-");
        }
        if (!strcmp(registers[i].key, key))
            return registers[i].value;
    }
    return NULL;
}

static int carry_out(char *out, size_t room, const char *line, int length)
{
    char command[LINE + 1], words[4][WORD] = {{0}};
    snprintf(command, sizeof command, "%.*s", length, line);
    int n = sscanf(command, "%31s %31s %31s %31s", words[0], words[1], words[2], words[3]);
    char *value = n >= 2 ? find(words[1]) : NULL;
    if (value && n == 2 && !strcmp(words[0], "GET"))
        return snprintf(out, room, "%s\n", value);
    if (value && n == 3 && !strcmp(words[0], "PUT")) {
        strcpy(value, words[2]);
        return snprintf(out, room, "ok\n");
    }
    if (value && n == 4 && !strcmp(words[0], "CAS")) {
        bool same = !strcmp(value, words[2]);
        if (same)
            strcpy(value, words[3]);
        return snprintf(out, room, same ? "ok\n" : "no\n");
    }
    if (value && n == 3 && !strcmp(words[0], "INCR")) {
        snprintf(value, WORD, "%lld", atoll(value) + atoll(words[2]));
        return snprintf(out, room, "%s\n", value);
    }
    return snprintf(out, room, "error\n");
}

// Answer every complete line for which there is room.
static void digest(struct connection *c)
{
    char *begin = c->in, *end;
    size_t left = c->in_used;
    while (sizeof c->out - c->out_used >= LINE + 128 && (end = memchr(begin, '\n', left))) {
        int length = end - begin;
        char *out = c->out + c->out_used;
        size_t room = sizeof c->out - c->out_used;
        c->out_used += c->registers ? carry_out(out, room, begin, length)
                                    : answer(out, room, begin, length, ++c->count);
        left -= length + 1;
        begin = end + 1;
    }
    memmove(c->in, begin, left);
    c->in_used = left;
}

static bool flush(struct connection *c)
{
    size_t done = 0;
    while (done < c->out_used) {
        ssize_t n = send(c->fd, c->out + done, c->out_used - done, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            return false;
        done += n;
    }
    memmove(c->out, c->out + done, c->out_used - done);
    c->out_used -= done;
    return true;
}

static void serve_echo(struct connection *c, uint32_t events)
{
    if (events & (EPOLLIN | EPOLLHUP | EPOLLERR)) {
        ssize_t n = recv(c->fd, c->in + c->in_used, sizeof c->in - c->in_used, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
            close_connection(c);
            return;
        }
        if (n > 0)
            c->in_used += n;
    }
    size_t before;
    do {
        before = c->in_used;
        digest(c);
        if (!flush(c)) {
            close_connection(c);
            return;
        }
    } while (c->in_used != before && c->in_used && !c->out_used);
    if (c->in_used == sizeof c->in && !memchr(c->in, '\n', c->in_used)) {
        close_connection(c); // a line longer than any request
        return;
    }
    bool full = c->in_used == sizeof c->in;
    watch(EPOLL_CTL_MOD, c->fd, (full ? 0 : EPOLLIN) | (c->out_used ? EPOLLOUT : 0), c);
}

static void accept_client(int listener)
{
    int on = 1, fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (fd < 0)
        return;
    struct connection *c = calloc(1, sizeof *c);
    if (!c) {
        close(fd);
        return;
    }
    c->fd = fd;
    c->registers = listener == register_listener;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    watch(EPOLL_CTL_ADD, fd, EPOLLIN, c);
}

static void serve_udp(void)
{
    static uint64_t count;
    struct sockaddr_in6 from;
    socklen_t length = sizeof from;
    char in[LINE], out[LINE + 128];
    ssize_t n = recvfrom(echo_udp, in, sizeof in, MSG_DONTWAIT, (struct sockaddr *)&from, &length);
    if (n < 0)
        return;
    while (n > 0 && (in[n - 1] == '\n' || in[n - 1] == '\r'))
        n--;
    int size = answer(out, sizeof out, in, n, ++count);
    sendto(echo_udp, out, size, MSG_DONTWAIT, (struct sockaddr *)&from, length);
}

// ---- commands, each connection in a process of its own ----

static void load_dirty(unsigned mine, long pages, long mib)
{
    size_t size = (size_t)mib << 20;
    char *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        _exit(1);
    uint64_t value = 1, done = 0;
    size_t at = 0;
    int64_t begin = nanoseconds(CLOCK_MONOTONIC);
    while (atomic_load(generation) == mine) {
        uint64_t due = (nanoseconds(CLOCK_MONOTONIC) - begin) / 1000 * pages / 1000000;
        for (; done < due; done++) {
            // Not compressible and different each time.
            for (size_t i = 0; i < PAGE; i += 8) {
                value ^= value << 13, value ^= value >> 7, value ^= value << 17;
                memcpy(area + at + i, &value, 8);
            }
            at = (at + PAGE) % size;
        }
        usleep(10000);
    }
    _exit(0);
}

enum { WORDS = PAGE / sizeof(uint64_t), CHECKS = 4 };

// What a page holds after it was written VERSION times: its number, that version, and words that
// follow from both, so that a page of another place or another time is not taken for it.
static uint64_t kept_word(size_t i, uint64_t number, uint64_t version, uint64_t before)
{
    if (i == 0)
        return number;
    if (i == 1)
        return version;
    uint64_t value = before ^ (number << 32 | version) ^ UINT64_C(0x9e3779b97f4a7c15) * i;
    return value ^ value << 13 ^ value >> 7;
}

static void write_page(uint64_t *page, uint64_t number, uint64_t version)
{
    uint64_t value = 0;
    for (size_t i = 0; i < WORDS; i++)
        page[i] = value = kept_word(i, number, version, value);
}

static bool holds(const uint64_t *page, uint64_t number, uint64_t version)
{
    uint64_t value = 0;
    for (size_t i = 0; i < WORDS; i++) {
        value = kept_word(i, number, version, value);
        if (page[i] != value) {
            fprintf(stderr, "KEPT WRONG: page %" PRIu64 " word %zu is %" PRIx64 ", not %" PRIx64 "\n",
                    number, i, page[i], value);
            return false;
        }
    }
    return true;
}

static void load_keep(unsigned mine, long kib, long mib)
{
    size_t pages = ((size_t)mib << 20) / PAGE, at = 0;
    uint64_t (*area)[WORDS] = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint32_t *versions = calloc(pages, sizeof *versions);
    if (area == MAP_FAILED || !versions)
        die("keep");
    for (size_t i = 0; i < pages; i++)
        write_page(area[i], i, 0);
    uint64_t chance = 1, done = 0;
    int64_t begin = nanoseconds(CLOCK_MONOTONIC);
    while (atomic_load(generation) == mine) {
        uint64_t due = (nanoseconds(CLOCK_MONOTONIC) - begin) / 1000000 * kib / (1000 * PAGE / 1024);
        for (; done < due; done++) {
            chance ^= chance << 13, chance ^= chance >> 7, chance ^= chance << 17;
            size_t page = chance % pages;
            if (!holds(area[page], page, versions[page]))
                atomic_fetch_add(&kept->mismatches, 1);
            write_page(area[page], page, ++versions[page]);
            for (int i = 0; i < CHECKS; i++) {
                if (!holds(area[at], at, versions[at]))
                    atomic_fetch_add(&kept->mismatches, 1);
                at = (at + 1) % pages;
                if (at == 0)
                    atomic_fetch_add(&kept->rounds, 1);
            }
        }
        atomic_store(&kept->writes, done);
        usleep(20000);
    }
    _exit(0);
}

static void load_cpu(unsigned mine, long a, long b)
{
    (void)a, (void)b;
    while (atomic_load(generation) == mine)
        for (volatile int i = 0; i < 100000; i++)
            ;
    _exit(0);
}

static void burst(int fd, FILE *out, long count, long port, long size)
{
    struct sockaddr_in6 peer;
    socklen_t length = sizeof peer;
    char datagram[1400] = {0};
    if (getpeername(fd, (struct sockaddr *)&peer, &length) || size > (long)sizeof datagram) {
        fprintf(out, "error burst\n");
        return;
    }
    int udp = socket(AF_INET6, SOCK_DGRAM, 0);
    peer.sin6_port = htons(port);
    long failed = 0;
    for (long i = 1; i <= count; i++) {
        memset(datagram, ' ', sizeof datagram);
        int n = snprintf(datagram, sizeof datagram, "%ld %ld", i, count);
        datagram[n] = ' ';
        failed += sendto(udp, datagram, size, 0, (struct sockaddr *)&peer, length) < 0;
    }
    close(udp);
    fprintf(out, "ok burst %ld failed %ld\n", count, failed);
}

static void send_data(FILE *out, long kib)
{
    char block[1024];
    for (int i = 0; i < 1023; i++)
        block[i] = 'a' + i % 26;
    block[1023] = '\n';
    for (long i = 0; i < kib; i++)
        fwrite(block, 1, sizeof block, out);
    fprintf(out, "ok send %ld\n", kib);
}

static void read_clocks(FILE *out, double seconds)
{
    int64_t begin = nanoseconds(CLOCK_MONOTONIC), last = begin, largest = 0, backwards = 0;
    int64_t drift = nanoseconds(CLOCK_BOOTTIME) - begin, largest_drift = 0;
    uint64_t samples = 0, over_1ms = 0, over_10ms = 0, over_100ms = 0;
    while (last - begin < seconds * 1e9) {
        int64_t now = nanoseconds(CLOCK_MONOTONIC), boot = nanoseconds(CLOCK_BOOTTIME);
        int64_t gap = now - last, moved = boot - now - drift;
        // boot is read after now: a stall between the two looks like drift, and is a gap next.
        if (samples % 64 == 0 && moved < 0 && -moved > largest_drift)
            largest_drift = -moved;
        if (gap > largest)
            largest = gap;
        if (-gap > backwards)
            backwards = -gap;
        over_1ms += gap > 1000000;
        over_10ms += gap > 10000000;
        over_100ms += gap > 100000000;
        last = now;
        samples++;
    }
    fprintf(out,
            "ok clock samples %" PRIu64 " largest_gap_ns %" PRId64 " backwards_ns %" PRId64
            " over_1ms %" PRIu64 " over_10ms %" PRIu64 " over_100ms %" PRIu64
            " boottime_behind_ns %" PRId64 "\n",
            samples, largest, backwards, over_1ms, over_10ms, over_100ms, largest_drift);
}

static void start_load(FILE *out, void (*load)(unsigned, long, long), long a, long b, long count)
{
    unsigned mine = atomic_load(generation);
    fflush(out);
    for (long i = 0; i < count; i++) {
        pid_t child = fork();
        if (child == 0)
            load(mine, a, b);
        if (child < 0) {
            fprintf(out, "error fork: %s\n", strerror(errno));
            return;
        }
    }
    fprintf(out, "ok\n");
}

static void tell_kept(FILE *out, unsigned long long rounds)
{
    while (atomic_load(&kept->rounds) < rounds)
        usleep(50000);
    fprintf(out, "ok kept %llu %llu %llu\n", atomic_load(&kept->writes), atomic_load(&kept->rounds),
            atomic_load(&kept->mismatches));
}

static void serve_commands(int fd)
{
    // Only this connection is ours: one that a child keeps open is not closed for its client.
    char line[LINE];
    if (dup2(fd, 3) != 3 || close_range(4, ~0U, 0))
        _exit(1);
    fd = 3;
    FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
    if (!in || !out)
        _exit(1);
    while (fgets(line, sizeof line, in)) {
        long a = 0, b = 0, c = 0;
        double seconds = 0;
        if (sscanf(line, "dirty %ld %ld", &a, &b) >= 1 && a > 0)
            start_load(out, load_dirty, a, b > 0 ? b : 16, 1);
        else if (sscanf(line, "keep %ld %ld", &a, &b) >= 1 && a > 0)
            start_load(out, load_keep, a, b > 0 ? b : 8, 1);
        else if (!strncmp(line, "kept", 4))
            tell_kept(out, sscanf(line, "kept %ld", &a) == 1 && a > 0 ? a : 0);
        else if (!strncmp(line, "cpu", 3))
            start_load(out, load_cpu, 0, 0, sscanf(line, "cpu %ld", &a) == 1 ? a : 1);
        else if (sscanf(line, "burst %ld %ld %ld", &a, &b, &c) >= 2)
            burst(fd, out, a, b, c > 0 ? c : 64);
        else if (sscanf(line, "send %ld", &a) == 1)
            send_data(out, a);
        else if (!strncmp(line, "io ", 3))
            measure_io(out, line);
        else if (sscanf(line, "clock %lf", &seconds) == 1)
            read_clocks(out, seconds);
        else if (!strncmp(line, "stop", 4)) {
            atomic_fetch_add(generation, 1);
            fprintf(out, "ok\n");
        } else
            fprintf(out, "error unknown command\n");
        fflush(out);
    }
    _exit(0);
}

static void accept_command(void)
{
    int fd = accept4(command_listener, NULL, NULL, 0);
    if (fd < 0)
        return;
    pid_t child = fork();
    if (child == 0)
        serve_commands(fd);
    close(fd);
}

// Memory that children share, all zero.
static void *shared(size_t size)
{
    void *area = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (area == MAP_FAILED)
        die("mmap");
    return area;
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN); // children, and orphans of theirs, leave nothing to wait for
    generation = shared(sizeof *generation);
    kept = shared(sizeof *kept);
    echo_listener = open_socket(SOCK_STREAM, ECHO_PORT);
    register_listener = open_socket(SOCK_STREAM, REGISTER_PORT);
    command_listener = open_socket(SOCK_STREAM, COMMAND_PORT);
    echo_udp = open_socket(SOCK_DGRAM, ECHO_PORT);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (poller < 0)
        die("epoll_create1");
    watch(EPOLL_CTL_ADD, echo_listener, EPOLLIN, &echo_listener);
    watch(EPOLL_CTL_ADD, register_listener, EPOLLIN, &register_listener);
    watch(EPOLL_CTL_ADD, command_listener, EPOLLIN, &command_listener);
    watch(EPOLL_CTL_ADD, echo_udp, EPOLLIN, &echo_udp);
    printf("DEMO READY\n");
    fflush(stdout);
    for (;;) {
        struct epoll_event events[16];
        int n = epoll_wait(poller, events, 16, -1);
        if (n < 0 && errno != EINTR)
            die("epoll_wait");
        for (int i = 0; i < n; i++) {
            void *what = events[i].data.ptr;
            if (what == &echo_listener)
                accept_client(echo_listener);
            else if (what == &register_listener)
                accept_client(register_listener);
            else if (what == &command_listener)
                accept_command();
            else if (what == &echo_udp)
                serve_udp();
            else
                serve_echo(what, events[i].events);
        }
    }
}
