// SPDX-License-Identifier: Apache-2.0
// Transactions of the demo's guest: SQLite on its disk, for clients that check what they are told.
//
// Port 7979, TCP, one command a line, one line of answer:
//     ADD CLIENT NUMBER    one transaction puts the number into both tables: "ok" once it is on disk
//     CHECK CLIENT         "ok", and for each table, as of one moment: rows of this client,
//                          different numbers among them, the least and the greatest
//     INTEGRITY            "ok", or what SQLite's own check finds
// There are two databases, both with synchronous=FULL: clients with an even number are in one with
// a write-ahead log, the others in one with a rollback journal.  Each connection has a process.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <sqlite3.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

enum { PORT = 7979, PATIENCE_MS = 120000, LINE = 256, DATABASES = 2 };

static const struct {
    const char *file, *journal;
} kinds[DATABASES] = {{"wal.db", "WAL"}, {"rollback.db", "DELETE"}};

static void die(const char *what, const char *why)
{
    fprintf(stderr, "TRANSACTIONS FAILED: %s: %s\n", what, why);
    exit(1);
}

// The first row's columns, with spaces between them; "" without one.
static int first_row(void *out, int columns, char **values, char **names)
{
    (void)names;
    char *text = out;
    bool first = !*text;
    for (int i = 0; i < columns && first; i++)
        snprintf(text + strlen(text), LINE - strlen(text), "%s%s", i ? " " : "",
                 values[i] ? values[i] : "0");
    return 0;
}

// Whether it was carried out; otherwise `out` says why not.
static bool carry_out(sqlite3 *database, const char *statements, char *out)
{
    out[0] = 0;
    if (sqlite3_exec(database, statements, first_row, out, NULL) == SQLITE_OK)
        return true;
    snprintf(out, LINE, "%s", sqlite3_errmsg(database));
    sqlite3_exec(database, "ROLLBACK", NULL, NULL, NULL); // refused if none is open
    return false;
}

static void open_databases(sqlite3 **databases)
{
    for (int i = 0; i < DATABASES; i++) {
        char setup[LINE], out[LINE];
        snprintf(setup, sizeof setup,
                 "PRAGMA journal_mode=%s; PRAGMA synchronous=FULL;"
                 "CREATE TABLE IF NOT EXISTS one (client INTEGER, number INTEGER);"
                 "CREATE TABLE IF NOT EXISTS other (client INTEGER, number INTEGER);",
                 kinds[i].journal);
        if (sqlite3_open(kinds[i].file, &databases[i]) != SQLITE_OK)
            die(kinds[i].file, sqlite3_errmsg(databases[i]));
        sqlite3_busy_timeout(databases[i], PATIENCE_MS);
        if (!carry_out(databases[i], setup, out))
            die(kinds[i].file, out);
    }
}

static void answer(FILE *to, sqlite3 **databases, const char *line)
{
    char statements[2 * LINE], out[LINE] = "unknown command";
    unsigned client;
    unsigned long long number;
    bool done = false;
    if (sscanf(line, "ADD %u %llu", &client, &number) == 2) {
        snprintf(statements, sizeof statements,
                 "BEGIN IMMEDIATE; INSERT INTO one VALUES (%u, %llu);"
                 "INSERT INTO other VALUES (%u, %llu); COMMIT;",
                 client, number, client, number);
        done = carry_out(databases[client % DATABASES], statements, out);
    } else if (sscanf(line, "CHECK %u", &client) == 1) {
        snprintf(statements, sizeof statements,
                 "SELECT * FROM (SELECT count(*), count(DISTINCT number), min(number), max(number)"
                 " FROM one WHERE client = %u), (SELECT count(*), count(DISTINCT number),"
                 " min(number), max(number) FROM other WHERE client = %u)",
                 client, client);
        done = carry_out(databases[client % DATABASES], statements, out);
    } else if (!strncmp(line, "INTEGRITY", 9)) {
        done = true;
        for (int i = 0; i < DATABASES && done; i++)
            done = carry_out(databases[i], "PRAGMA integrity_check", out) && !strcmp(out, "ok");
        if (done)
            out[0] = 0;
    }
    fprintf(to, "%s%s%s\n", done ? "ok" : "error ", done && out[0] ? " " : "", out);
}

static void serve(int fd)
{
    sqlite3 *databases[DATABASES];
    char line[LINE];
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    FILE *in = fdopen(fd, "r"), *out = fdopen(dup(fd), "w");
    if (!in || !out)
        die("connection", strerror(errno));
    open_databases(databases);
    while (fgets(line, sizeof line, in)) {
        answer(out, databases, line);
        if (fflush(out))
            break;
    }
    for (int i = 0; i < DATABASES; i++)
        sqlite3_close(databases[i]);
    exit(0);
}

int main(int argc, char **argv)
{
    struct sockaddr_in6 any = {.sin6_family = AF_INET6, .sin6_port = htons(PORT)};
    sqlite3 *databases[DATABASES];
    int on = 1, listener = socket(AF_INET6, SOCK_STREAM, 0);
    // A group of their own, so that all can be ended at once.
    if (argc != 2 || chdir(argv[1]) || setpgid(0, 0))
        die("usage: transactions FOLDER", strerror(errno));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    // The tables are there before anybody asks.  No database is open across a fork: SQLite forbids it.
    open_databases(databases);
    for (int i = 0; i < DATABASES; i++)
        sqlite3_close(databases[i]);
    if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) ||
        bind(listener, (struct sockaddr *)&any, sizeof any) || listen(listener, 128))
        die("bind", strerror(errno));
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0)
            continue;
        if (fork() == 0) {
            close(listener);
            serve(fd);
        }
        close(fd);
    }
}
