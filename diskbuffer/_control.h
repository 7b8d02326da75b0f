// SPDX-License-Identifier: Apache-2.0
// The control socket: lines of words, answered by lines; one connection becomes the stream.

#ifndef KEMARI_CONTROL_H
#define KEMARI_CONTROL_H

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/un.h>

#include "_issue.h"

#define CLIENTS 8
#define LINE 8192

static struct control {
    int listener;
    struct client {
        int fd;
        size_t used;
        char line[LINE];
    } clients[CLIENTS];
    double clean_every;   // seconds
    bool told_lost, told_synced;
} control = {.listener = -1, .clean_every = 10};

static void answer(struct client *client, const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line - 1, format, arguments);
    va_end(arguments);
    size_t size = length < (int)sizeof line - 1 ? (size_t)length : sizeof line - 2;
    line[size] = '\n';
    // A client that does not read is not waited for.
    if (client->fd >= 0 && send(client->fd, line, size + 1, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
        shutdown(client->fd, SHUT_RDWR);
}

static void tell_all(const char *line)
{
    for (struct client *client = control.clients; client < control.clients + CLIENTS; client++)
        if (client->fd >= 0)
            answer(client, "%s", line);
}

// Turn a client's connection into the stream.
static void do_stream(struct client *client)
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = NULL;
    if (disk.readonly)
        wrong = "the disk is read-only";
    else if (has_flag(FLAG_REPLICA))
        wrong = "the disk is a replica";
    else if (bitmap.fd < 0 && !hold.shared)
        wrong = "no bitmap is loaded";
    else if (stream.fd >= 0)
        wrong = "there is a stream already";
    else if (hold.shared)
        wrong = hold_begin();
    if (wrong) {
        pthread_mutex_unlock(&disk.lock);
        answer(client, "error %s", wrong);
        return;
    }
    stream.session++;
    stream.head = stream.used = stream.position = stream.applied = 0;
    stream.told_full = false;
    stream.fd = client->fd;
    control.told_lost = false;
    control.told_synced = true;
    syncing.on = false;
    syncing.cursor = 0;
    put(&disk.status->position, 0);
    put(&disk.status->drained, 0);
    put(&disk.status->session, stream.session);
    put(&disk.status->state, STREAMING);
    if (hold.shared) {
        hold_start();
        wrong = hold_note_seen();
        if (wrong)
            stream_break("%s", wrong);
    } else
        bitmap_begin();
    // Records follow it: nothing is sent while the lock is held.
    answer(client, "ok %" PRIu64, stream.session);
    client->fd = -1;
    pthread_mutex_unlock(&disk.lock);
}

static void do_load(struct client *client)
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = streaming() ? "the bitmap is in use by a stream" : bitmap_load();
    pthread_mutex_unlock(&disk.lock);
    if (wrong)
        answer(client, "error %s", wrong);
    else
        answer(client, "ok %" PRIu64, atomic_load(&disk.status->dirty));
}

// Mark runs of chunks as differing, durably.
static void do_merge(struct client *client, char *words)
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = bitmap.fd < 0 ? "no bitmap is loaded" : NULL;
    char *rest = NULL;
    uint64_t low = UINT64_MAX, high = 0;
    for (char *word = strtok_r(words, " ", &rest); word && !wrong;
         word = strtok_r(NULL, " ", &rest)) {
        uint64_t first, length;
        if (sscanf(word, "%" SCNu64 "+%" SCNu64, &first, &length) != 2 || length == 0 ||
            first >= bitmap.chunks || length > bitmap.chunks - first) {
            wrong = "a run is not one of this disk";
            break;
        }
        uint64_t added = 0;
        for (uint64_t number = first; number < first + length; number++) {
            added += !bit(bitmap.dirty, number);
            set_bit(bitmap.dirty, number);
            if (streaming() && !bit(bitmap.todo, number)) {
                set_bit(bitmap.todo, number);
                count(&disk.status->sync_total, 1);
                count(&disk.status->sync_left, 1);
            }
        }
        count(&disk.status->dirty, added);
        low = first < low ? first : low;
        high = first + length - 1 > high ? first + length - 1 : high;
    }
    // Also of a line that is refused further on: what is set has to be durable.
    if (low <= high && bitmap_save(low, high) < 0)
        wrong = "the bitmap cannot be written";
    pthread_mutex_unlock(&disk.lock);
    if (wrong)
        answer(client, "error %s", wrong);
    else
        answer(client, "ok");
}

static void do_sync(struct client *client, uint64_t rate)
{
    pthread_mutex_lock(&disk.lock);
    bool good = streaming();
    if (good) {
        control.told_synced = false;
        sync_start(rate);
    }
    pthread_mutex_unlock(&disk.lock);
    answer(client, good ? "ok" : "error there is no stream");
}

static void do_applied(struct client *client, uint64_t session, uint64_t position)
{
    pthread_mutex_lock(&disk.lock);
    bool good = session == stream.session && position <= stream.position;
    if (good && position > stream.applied)
        stream.applied = position;
    pthread_mutex_unlock(&disk.lock);
    answer(client, good ? "ok" : "error that position is not of this stream");
}

static void do_activate(struct client *client)
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = NULL;
    if (has_flag(FLAG_REPLICA))
        wrong = hold.shared ? target_take() : disk.bitmap_path ? bitmap_load() : NULL;
    if (!wrong)
        set_flag(FLAG_REPLICA, false);
    pthread_mutex_unlock(&disk.lock);
    if (wrong)
        answer(client, "error %s", wrong);
    else
        answer(client, "ok");
}

// One of the commands of shared mode.
static void do_shared(struct client *client, const char *(*act)(void))
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = hold.shared ? act() : "the disk is not a shared one";
    if (!wrong && stream.fd >= 0 && !streaming())
        shutdown(stream.fd, SHUT_RDWR);
    pthread_mutex_unlock(&disk.lock);
    if (wrong)
        answer(client, "error %s", wrong);
    else
        answer(client, "ok");
}

static void do_issue(struct client *client, uint64_t session, uint64_t position, uint64_t until)
{
    pthread_mutex_lock(&disk.lock);
    const char *wrong = hold_issue(session, position, until);
    pthread_mutex_unlock(&disk.lock);
    if (wrong)
        answer(client, "error %s", wrong);
    else
        answer(client, "ok");
}

static void obey(struct client *client, char *line)
{
    uint64_t one = 0, two = 0, three = 0;
    int end = -1;
    char *words = strchr(line, ' ');
    if (strcmp(line, "hello") == 0)
        answer(client, "ok 1 %" PRIu64 " %" PRIu64, disk.size, atomic_load(&disk.status->flags));
    else if (strcmp(line, "stream") == 0)
        do_stream(client);
    else if (strcmp(line, "load") == 0)
        do_load(client);
    else if (strncmp(line, "merge ", 6) == 0)
        do_merge(client, words + 1);
    else if (sscanf(line, "sync %" SCNu64 "%n", &one, &end) == 1 && !line[end])
        do_sync(client, one);
    else if (sscanf(line, "applied %" SCNu64 " %" SCNu64 "%n", &one, &two, &end) == 2 && !line[end])
        do_applied(client, one, two);
    else if (strcmp(line, "activate") == 0)
        do_activate(client);
    else if (sscanf(line, "issue %" SCNu64 " %" SCNu64 " %" SCNu64 "%n", &one, &two, &three,
                    &end) == 3 && !line[end])
        do_issue(client, one, two, three);
    else if (strcmp(line, "halt") == 0)
        do_shared(client, hold_halt);
    else if (strcmp(line, "release") == 0)
        do_shared(client, hold_release);
    else if (strcmp(line, "drop") == 0)
        do_shared(client, hold_drop);
    else
        answer(client, "error there is no such command");
}

static void hear(struct client *client)
{
    ssize_t got = recv(client->fd, client->line + client->used, LINE - client->used, 0);
    client->used += got > 0 ? (size_t)got : 0;
    char *end;
    while (got > 0 && client->fd >= 0 && (end = memchr(client->line, '\n', client->used))) {
        *end = 0;
        size_t taken = (size_t)(end - client->line) + 1;
        obey(client, client->line);
        client->used -= taken;
        memmove(client->line, client->line + taken, client->used);
    }
    if (client->fd >= 0 && (got == 0 || (got < 0 && errno != EINTR) || client->used == LINE)) {
        close(client->fd);
        client->fd = -1;
    }
}

static void welcome(void)
{
    int fd = accept4(control.listener, NULL, NULL, SOCK_CLOEXEC);
    for (struct client *client = control.clients; fd >= 0 && client < control.clients + CLIENTS;
         client++)
        if (client->fd < 0) {
            client->fd = fd;
            client->used = 0;
            return;
        }
    if (fd >= 0)
        close(fd);
}

// Clear what is settled, in cycles: see bitmap_clean.
static void clean(void)
{
    pthread_mutex_lock(&disk.lock);
    uint64_t session = stream.session;
    bool due = streaming() && bitmap.fd >= 0 && !disk.sync_failed;
    if (due && !bitmap.cycle) {
        bitmap.cycle = true;
        bitmap.cycle_began = now();
        bitmap.cycle_position = stream.position;
        memset(bitmap.touched, 0, bitmap.bytes);
        due = false;
    }
    due = due && stream.applied >= bitmap.cycle_position &&
          now() - bitmap.cycle_began >= control.clean_every;
    pthread_mutex_unlock(&disk.lock);
    if (!due)
        return;
    int flushed = flush_target(disk.clean_fd);
    if (flushed < 0)
        nbdkit_error("%s could not be flushed (%s): its marks are kept", disk.target,
                     strerror(errno));
    pthread_mutex_lock(&disk.lock);
    if (flushed == 0 && !disk.sync_failed && streaming() && session == stream.session &&
        bitmap.fd >= 0) {
        if (bitmap_clean() < 0)
            nbdkit_error("the bitmap of %s cannot be written: %s", disk.target, strerror(errno));
        bitmap.cycle = false;
    }
    pthread_mutex_unlock(&disk.lock);
}

// Tell what has happened, and put a broken stream away.
static void look_around(void)
{
    char line[300] = "", failing[300] = "";
    pthread_mutex_lock(&disk.lock);
    if (hold.failing && !hold.told_failing) {
        hold.told_failing = true;
        snprintf(failing, sizeof failing, "!failing %s", hold.why);
    }
    bool late = hold.late && !hold.told_late;
    hold.told_late |= late;
    bool full = stream.told_full;
    bool synced = !control.told_synced && streaming() && !syncing.on;
    control.told_synced |= synced;
    if (stream.fd >= 0 && !streaming() && !stream.sending) {
        close(stream.fd);
        stream.fd = -1;
    }
    if (atomic_load(&disk.status->state) == BROKEN && !control.told_lost) {
        control.told_lost = true;
        snprintf(line, sizeof line, "!lost %s", stream.why);
    }
    pthread_mutex_unlock(&disk.lock);
    if (*line) {
        nbdkit_error("%s is not replicated any more: %s", disk.target, line + 6);
        tell_all(line);
    }
    if (late)
        tell_all("!late");
    if (*failing) {
        nbdkit_error("changes cannot be issued and are kept: %s", failing + 9);
        tell_all(failing);
    }
    if (synced)
        tell_all("!synced");
    if (full)
        tell_all("!full");
}

static void *control_thread(void *unused)
{
    (void)unused;
    while (!disk.stopping) {
        struct pollfd polled[CLIENTS + 3] = {{control.listener, POLLIN, 0},
                                             {stream.wake, POLLIN, 0}};
        pthread_mutex_lock(&disk.lock);
        polled[2] = (struct pollfd){streaming() ? stream.fd : -1, POLLIN, 0};
        uint64_t session = stream.session;
        pthread_mutex_unlock(&disk.lock);
        for (int i = 0; i < CLIENTS; i++)
            polled[3 + i] = (struct pollfd){control.clients[i].fd, POLLIN, 0};
        double pause = control.clean_every < 1 ? control.clean_every : 1;
        if (poll(polled, CLIENTS + 3, (int)(pause * 1000)) < 0 && errno != EINTR)
            nbdkit_error("poll: %s", strerror(errno));
        if (polled[1].revents) {
            uint64_t times;
            if (read(stream.wake, &times, sizeof times) < 0 && errno != EAGAIN)
                nbdkit_error("eventfd: %s", strerror(errno));
        }
        if (polled[2].revents) {
            // Nothing is ever sent here: it was closed.
            pthread_mutex_lock(&disk.lock);
            if (session == stream.session)
                stream_break("The reader closed the stream");
            pthread_mutex_unlock(&disk.lock);
        }
        for (int i = 0; i < CLIENTS; i++)
            if (polled[3 + i].revents && control.clients[i].fd >= 0)
                hear(&control.clients[i]);
        if (polled[0].revents)
            welcome();
        look_around();
        clean();
    }
    return NULL;
}

// Open the control socket at `path`; -1 with the error told.
static int control_listen(const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        nbdkit_error("%s is too long a name for a socket", path);
        return -1;
    }
    strcpy(address.sun_path, path);
    unlink(path);
    for (int i = 0; i < CLIENTS; i++)
        control.clients[i].fd = -1;
    control.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (control.listener < 0 ||
        bind(control.listener, (struct sockaddr *)&address, sizeof address) < 0 ||
        chmod(path, 0600) < 0 || listen(control.listener, CLIENTS) < 0) {
        nbdkit_error("%s: %s", path, strerror(errno));
        return -1;
    }
    return 0;
}

#endif
