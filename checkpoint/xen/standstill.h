/* SPDX-License-Identifier: Apache-2.0
 *
 * What checkpoint/_standstill.h needs to know of a guest, and what it does.  Declarations only:
 * checkpoint/xen/shortcut.py gives this very text to cffi, which knows no other directives.
 */

/* Numbers side by side. */
struct words {
    const uint64_t *at;
    uint64_t count;
};

/* Bytes that others write, and room for as many. */
struct copied {
    const uint8_t *of;
    uint8_t *to;
    uint64_t bytes;
};

/* Calls made in one trip into Xen; see checkpoint/xen/multicall.py. */
struct trip {
    uint8_t *buffer;        /* entries, then their arguments; Xen puts its answers there */
    const uint8_t *request; /* what the buffer begins with before it is made */
    uint64_t bytes;         /* of the request */
    uint64_t entries;
};

/* xencall2 of libxencall, xc_logdirty_control of libxenctrl. */
typedef int (*multicall)(void *, unsigned int, uint64_t, uint64_t);
typedef long long (*log_control)(void *, uint32_t, unsigned int, void *, unsigned long,
                                 unsigned int, void *);

struct standstill {
    multicall multicall;
    void *multicall_handle;
    log_control log_control;
    void *log_handle;

    struct trip stop;      /* entries: pause, context, tables; see checkpoint/xen/moment.py */
    uint64_t used_at;      /* in its buffer: how long the context is */
    uint64_t context_at;   /* and the context */
    uint64_t context_size; /* that its instruction pointers are known for */
    uint64_t answers_at;   /* and the answers about the tables */
    struct words answers;  /* as they were the last time */
    struct trip go;        /* entries: mark, unpause */

    const uint8_t *ram;
    uint64_t pages;
    struct words pointers_at; /* in the context: instruction pointers */
    struct words clock_code;  /* first and end of ranges, ascending */
    struct words rereads;     /* addresses in them that do no harm */
    struct words conditions;  /* offset in memory, mask, value */
    struct copied outside;    /* pages that are no RAM, the xenstore ring first */
    struct words awaited;     /* frames of rings on which every request must be answered */

    struct copied grants;   /* entries of the grant table */
    uint64_t *granted;      /* room for as many: frames that somebody has mapped for writing */
    uint64_t under_grants;  /* how many those are */
    struct words shared;    /* frames that are copied before the log is read */
    struct words receiving; /* which of them are receive rings */

    uint32_t domid;
    void *log_buffer; /* xc_hypercall_buffer_t, of the bitmap */
    uint8_t *bitmap;
    uint64_t mark;         /* frame that the log must show */
    struct words absent;   /* frames that it must not */
    struct words left_out; /* frames that are not copied for it, ascending */

    uint64_t *gfns; /* the staging buffer: frame numbers, pages, room */
    uint8_t *data;
    uint64_t capacity;
};

/* Each does one step of checkpoint.xen.standstill.Standstill, if nothing about it is out of the
 * ordinary, and returns 0 then.  1: something is; the step may be begun anew, by the other one. */

/* Stops the guest unless it is paused; judges; looks whether backends have answered.  1: it is
 * stopped, or Xen has refused; below 0: -errno of the trip. */
int kemari_stop(struct standstill *still, int pause);

int kemari_copy_shared(struct standstill *still);

/* Reads the log without cleaning it.  2: there is more than keep in it. */
int kemari_read_log(struct standstill *still, uint64_t keep);

/* How many are staged then, after so many; UINT64_MAX in place of 1. */
uint64_t kemari_copy_dirty(struct standstill *still, uint64_t staged);

/* 1: one of the two calls was refused; below 0: -errno of the trip. */
int kemari_let_go(struct standstill *still);
