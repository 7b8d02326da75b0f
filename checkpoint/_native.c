/* SPDX-License-Identifier: Apache-2.0
 *
 * Python's door to _pages.h: arguments, bounds, the GIL.  checkpoint/native.py documents each
 * function, checkpoint/_twin.py does the same in Python.  Only the stable ABI of Python 3.11 is
 * used, so that one wheel serves every later version.  What _standstill.h exports goes by cffi.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_pages.h"
#include "_standstill.h"

/* Frame numbers are array('Q'): 8-byte items, so a pointer to them must be aligned to be indexed.
 * (That of an empty array is not.) */
static int is_words(const Py_buffer *view, const char *name)
{
    if (view->len % 8 == 0 && (view->len == 0 || (uintptr_t)view->buf % 8 == 0))
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is not an aligned buffer of 64-bit items", name);
    return 0;
}

static PyObject *scan_bitmap(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer bitmap, out;
    Py_ssize_t nbits;
    unsigned long long first = 0;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*nw*|K:scan_bitmap", &bitmap, &nbits, &out, &first))
        return NULL;
    if (nbits < 0 || nbits > bitmap.len * 8) {
        PyErr_Format(PyExc_ValueError, "a bitmap of %zd bytes does not have %zd bits", bitmap.len,
                     nbits);
    } else if (is_words(&out, "out")) {
        uint64_t room = (uint64_t)out.len / 8, total, used = 0;
        Py_BEGIN_ALLOW_THREADS
        total = bitmap_count(bitmap.buf, (uint64_t)nbits);
        if (total <= room)
            used = bitmap_scan(bitmap.buf, (uint64_t)nbits, first, out.buf, room);
        Py_END_ALLOW_THREADS
        if (total > room)
            PyErr_Format(PyExc_OverflowError, "%llu bits are set, room for %llu",
                         (unsigned long long)total, (unsigned long long)room);
        else
            result = PyLong_FromUnsignedLongLong(used);
    }
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&out);
    return result;
}

/* count_set(bitmap, nbits) -> how many */
static PyObject *count_set(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer bitmap;
    Py_ssize_t nbits;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*n:count_set", &bitmap, &nbits))
        return NULL;
    if (nbits < 0 || nbits > bitmap.len * 8)
        PyErr_Format(PyExc_ValueError, "a bitmap of %zd bytes does not have %zd bits", bitmap.len,
                     nbits);
    else
        result = PyLong_FromUnsignedLongLong(bitmap_count(bitmap.buf, (uint64_t)nbits));
    PyBuffer_Release(&bitmap);
    return result;
}

static PyObject *gather(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer memory, gfns, out;
    Py_ssize_t count;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*y*nw*:gather", &memory, &gfns, &count, &out))
        return NULL;
    if (!is_words(&gfns, "gfns")) {
        /* the error is set */
    } else if (count < 0 || count > gfns.len / 8 || count > out.len / (Py_ssize_t)PAGE_BYTES) {
        PyErr_Format(PyExc_ValueError, "%zd pages asked for, %zd frame numbers and room for %zd",
                     count, gfns.len / 8, out.len / (Py_ssize_t)PAGE_BYTES);
    } else {
        uint64_t bad, total = (uint64_t)count;
        Py_BEGIN_ALLOW_THREADS
        bad = gfns_check(gfns.buf, total, (uint64_t)memory.len / PAGE_BYTES);
        if (bad == total)
            pages_gather(memory.buf, gfns.buf, total, out.buf);
        Py_END_ALLOW_THREADS
        if (bad == total)
            result = Py_NewRef(Py_None);
        else
            PyErr_Format(PyExc_IndexError, "frame %llu is outside of the guest's %zd pages",
                         (unsigned long long)((uint64_t *)gfns.buf)[bad],
                         memory.len / (Py_ssize_t)PAGE_BYTES);
    }
    PyBuffer_Release(&memory);
    PyBuffer_Release(&gfns);
    PyBuffer_Release(&out);
    return result;
}

/* first_set(bitmap, gfns) -> frame number or -1 */
static PyObject *first_set(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer bitmap, gfns;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*y*:first_set", &bitmap, &gfns))
        return NULL;
    if (is_words(&gfns, "gfns")) {
        uint64_t count = (uint64_t)gfns.len / 8;
        uint64_t at = bitmap_first(bitmap.buf, (uint64_t)bitmap.len * 8, gfns.buf, count);
        result = at == count ? PyLong_FromLong(-1)
                             : PyLong_FromUnsignedLongLong(((uint64_t *)gfns.buf)[at]);
    }
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&gfns);
    return result;
}

/* stage(memory, bitmap, nbits, also, many, left_out, gfns, count, data) -> count */
static PyObject *stage(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer memory, bitmap, also, left_out, gfns, data;
    Py_ssize_t nbits, many, count;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*w*ny*ny*w*nw*:stage", &memory, &bitmap, &nbits, &also, &many,
                          &left_out, &gfns, &count, &data))
        return NULL;
    Py_ssize_t room = gfns.len / 8, pages = data.len / (Py_ssize_t)PAGE_BYTES;
    if (pages < room)
        room = pages;
    if (!is_words(&also, "also") || !is_words(&left_out, "left_out") || !is_words(&gfns, "gfns")) {
        /* the error is set */
    } else if (nbits < 0 || nbits > bitmap.len * 8 || nbits > memory.len / (Py_ssize_t)PAGE_BYTES ||
               many < 0 || many > also.len / 8 || count < 0 || count > room) {
        PyErr_Format(PyExc_ValueError, "%zd bits of %zd bytes for %zd pages, %zd of %zd frames, "
                     "%zd of %zd places", nbits, bitmap.len, memory.len / (Py_ssize_t)PAGE_BYTES,
                     many, also.len / 8, count, room);
    } else {
        uint64_t first = (uint64_t)count, bits = (uint64_t)nbits, free = (uint64_t)(room - count);
        uint64_t except = (uint64_t)left_out.len / 8, found = 0;
        uint64_t *places = (uint64_t *)gfns.buf + first;
        int ascending;
        Py_BEGIN_ALLOW_THREADS
        ascending = is_ascending(left_out.buf, except);
        if (ascending)
            found = pages_stage(memory.buf, bitmap.buf, bits, also.buf, (uint64_t)many,
                                left_out.buf, except, places,
                                (uint8_t *)data.buf + first * PAGE_BYTES, free);
        Py_END_ALLOW_THREADS
        if (!ascending)
            PyErr_SetString(PyExc_ValueError, "the frames to leave out do not ascend");
        else if (found > free)
            PyErr_Format(PyExc_OverflowError, "%llu pages to copy (staging holds %zd)",
                         (unsigned long long)(first + found), room);
        else
            result = PyLong_FromUnsignedLongLong(first + found);
    }
    PyBuffer_Release(&memory);
    PyBuffer_Release(&bitmap);
    PyBuffer_Release(&also);
    PyBuffer_Release(&left_out);
    PyBuffer_Release(&gfns);
    PyBuffer_Release(&data);
    return result;
}

/* active_writable(entries, out) -> count */
static PyObject *active_writable(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer entries, out;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*w*:active_writable", &entries, &out))
        return NULL;
    if (is_words(&out, "out")) {
        uint64_t room = (uint64_t)out.len / 8;
        uint64_t found = grants_writable(entries.buf, (uint64_t)entries.len / 8, out.buf, room);
        if (found > room)
            PyErr_Format(PyExc_OverflowError, "%llu grants are active, room for %llu",
                         (unsigned long long)found, (unsigned long long)room);
        else
            result = PyLong_FromUnsignedLongLong(found);
    }
    PyBuffer_Release(&entries);
    PyBuffer_Release(&out);
    return result;
}

/* receive_ring_whole(page, grants) -> bool */
static PyObject *ring_whole(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer page;
    Py_ssize_t grants;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*n:receive_ring_whole", &page, &grants))
        return NULL;
    if (page.len < (Py_ssize_t)PAGE_BYTES || grants < 0)
        PyErr_Format(PyExc_ValueError, "a ring of %zd bytes and %zd grants", page.len, grants);
    else
        result = PyBool_FromLong(receive_ring_whole(page.buf, (uint64_t)grants));
    PyBuffer_Release(&page);
    return result;
}

/* first_unmet(memory, conditions) -> index or -1 */
static PyObject *first_unmet(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer memory, conditions;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*y*:first_unmet", &memory, &conditions))
        return NULL;
    if (!is_words(&conditions, "conditions")) {
        /* the error is set */
    } else if (conditions.len % (8 * (Py_ssize_t)CONDITION_WORDS)) {
        PyErr_Format(PyExc_ValueError, "%zd bytes are no whole number of conditions",
                     conditions.len);
    } else {
        uint64_t count = (uint64_t)conditions.len / (8 * CONDITION_WORDS);
        if (conditions_within(conditions.buf, count, (uint64_t)memory.len)) {
            uint64_t unmet = conditions_check(memory.buf, conditions.buf, count);
            result = PyLong_FromLongLong(unmet == count ? -1 : (long long)unmet);
        } else {
            PyErr_SetString(PyExc_IndexError, "a condition lies outside of the guest's memory");
        }
    }
    PyBuffer_Release(&memory);
    PyBuffer_Release(&conditions);
    return result;
}

/* xor(one, other, out) */
static PyObject *xor_bytes(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer one, other, out;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*y*w*:xor", &one, &other, &out))
        return NULL;
    if (one.len != other.len || one.len != out.len) {
        PyErr_Format(PyExc_ValueError, "%zd, %zd and %zd bytes, expected as many each", one.len,
                     other.len, out.len);
    } else {
        bytes_xor(one.buf, other.buf, (size_t)one.len, out.buf);
        result = Py_NewRef(Py_None);
    }
    PyBuffer_Release(&one);
    PyBuffer_Release(&other);
    PyBuffer_Release(&out);
    return result;
}

/* subtract(gfns, count, exclude) -> count */
static PyObject *subtract(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer gfns, exclude;
    Py_ssize_t count;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "w*ny*:subtract", &gfns, &count, &exclude))
        return NULL;
    if (!is_words(&gfns, "gfns") || !is_words(&exclude, "exclude")) {
        /* the error is set */
    } else if (count < 0 || count > gfns.len / 8) {
        PyErr_Format(PyExc_ValueError, "%zd frame numbers asked for, there are %zd", count,
                     gfns.len / 8);
    } else {
        uint64_t many = (uint64_t)exclude.len / 8, kept = 0;
        int ascending;
        Py_BEGIN_ALLOW_THREADS
        ascending = is_ascending(exclude.buf, many);
        if (ascending)
            kept = gfns_subtract(gfns.buf, (uint64_t)count, exclude.buf, many);
        Py_END_ALLOW_THREADS
        if (ascending)
            result = PyLong_FromUnsignedLongLong(kept);
        else
            PyErr_SetString(PyExc_ValueError, "the frames to exclude do not ascend");
    }
    PyBuffer_Release(&gfns);
    PyBuffer_Release(&exclude);
    return result;
}

/* encode_pages(gfns, count, data, reference, have, out) -> (used, unchanged, zero, delta, raw, held) */
static PyObject *encode_pages(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer gfns, data, reference, have, out;
    Py_ssize_t count;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*ny*w*w*w*:encode_pages", &gfns, &count, &data, &reference, &have,
                          &out))
        return NULL;
    if (!is_words(&gfns, "gfns")) {
        /* the error is set */
    } else if (count < 0 || count > gfns.len / 8 || count > data.len / (Py_ssize_t)PAGE_BYTES ||
               count > out.len / (Py_ssize_t)RECORD_MOST) {
        PyErr_Format(PyExc_ValueError, "%zd pages asked for, %zd frame numbers, %zd pages, room "
                     "for %zd", count, gfns.len / 8, data.len / (Py_ssize_t)PAGE_BYTES,
                     out.len / (Py_ssize_t)RECORD_MOST);
    } else if (reference.len / (Py_ssize_t)PAGE_BYTES != have.len ||
               (uint64_t)have.len > (uint64_t)1 << GFN_BITS) {
        PyErr_Format(PyExc_ValueError, "a reference of %zd pages with flags for %zd",
                     reference.len / (Py_ssize_t)PAGE_BYTES, have.len);
    } else {
        uint64_t bad, total = (uint64_t)count;
        struct figures done;
        Py_BEGIN_ALLOW_THREADS
        bad = gfns_check(gfns.buf, total, (uint64_t)have.len);
        if (bad == total)
            pages_encode(gfns.buf, total, data.buf, reference.buf, have.buf, out.buf, &done);
        Py_END_ALLOW_THREADS
        if (bad == total)
            result = Py_BuildValue("(KKKKKK)", (unsigned long long)done.used,
                                   (unsigned long long)done.unchanged,
                                   (unsigned long long)done.zero, (unsigned long long)done.delta,
                                   (unsigned long long)done.raw, (unsigned long long)done.held);
        else
            PyErr_Format(PyExc_IndexError, "frame %llu is outside of the guest's %zd pages",
                         (unsigned long long)((uint64_t *)gfns.buf)[bad], have.len);
    }
    PyBuffer_Release(&gfns);
    PyBuffer_Release(&data);
    PyBuffer_Release(&reference);
    PyBuffer_Release(&have);
    PyBuffer_Release(&out);
    return result;
}

/* forget_pages(have, hand, count, out) -> (hand, count) */
static PyObject *forget_pages(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer have, out;
    Py_ssize_t hand, count;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "w*nnw*:forget_pages", &have, &hand, &count, &out))
        return NULL;
    if (!is_words(&out, "out")) {
        /* the error is set */
    } else if (hand < 0 || hand >= have.len || count < 0 || count > out.len / 8) {
        PyErr_Format(PyExc_ValueError, "the hand at %zd of %zd pages, %zd asked for, room for %zd",
                     hand, have.len, count, out.len / 8);
    } else {
        uint64_t at = (uint64_t)hand, found;
        Py_BEGIN_ALLOW_THREADS
        found = reference_forget(have.buf, (uint64_t)have.len, &at, (uint64_t)count, out.buf);
        Py_END_ALLOW_THREADS
        result = Py_BuildValue("(KK)", (unsigned long long)at, (unsigned long long)found);
    }
    PyBuffer_Release(&have);
    PyBuffer_Release(&out);
    return result;
}

static PyObject *verified(uint64_t count, size_t bad)
{
    if (count != UINT64_MAX)
        return PyLong_FromUnsignedLongLong(count);
    PyErr_Format(PyExc_ValueError, "the record at byte %zu of a batch breaks the format", bad);
    return NULL;
}

/* verify_batch(body, pages) -> count */
static PyObject *verify_batch(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer body;
    Py_ssize_t pages;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*n:verify_batch", &body, &pages))
        return NULL;
    if (pages < 0) {
        PyErr_SetString(PyExc_ValueError, "a guest cannot have fewer than 0 pages");
    } else {
        uint64_t count;
        size_t bad = 0;
        Py_BEGIN_ALLOW_THREADS
        count = pages_verify(body.buf, (size_t)body.len, (uint64_t)pages, &bad);
        Py_END_ALLOW_THREADS
        result = verified(count, bad);
    }
    PyBuffer_Release(&body);
    return result;
}

/* apply_batch(body, memory) -> count */
static PyObject *apply_batch(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer body, memory;
    PyObject *result;
    uint64_t count;
    size_t bad = 0;

    if (!PyArg_ParseTuple(args, "y*w*:apply_batch", &body, &memory))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    count = pages_verify(body.buf, (size_t)body.len, (uint64_t)memory.len / PAGE_BYTES, &bad);
    if (count != UINT64_MAX)
        pages_apply(body.buf, (size_t)body.len, memory.buf);
    Py_END_ALLOW_THREADS
    result = verified(count, bad);
    PyBuffer_Release(&body);
    PyBuffer_Release(&memory);
    return result;
}

static PyMethodDef methods[] = {
    {"scan_bitmap", scan_bitmap, METH_VARARGS, NULL},
    {"count_set", count_set, METH_VARARGS, NULL},
    {"gather", gather, METH_VARARGS, NULL},
    {"active_writable", active_writable, METH_VARARGS, NULL},
    {"receive_ring_whole", ring_whole, METH_VARARGS, NULL},
    {"first_set", first_set, METH_VARARGS, NULL},
    {"stage", stage, METH_VARARGS, NULL},
    {"first_unmet", first_unmet, METH_VARARGS, NULL},
    {"xor", xor_bytes, METH_VARARGS, NULL},
    {"subtract", subtract, METH_VARARGS, NULL},
    {"encode_pages", encode_pages, METH_VARARGS, NULL},
    {"forget_pages", forget_pages, METH_VARARGS, NULL},
    {"verify_batch", verify_batch, METH_VARARGS, NULL},
    {"apply_batch", apply_batch, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{0, NULL}};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_name = "checkpoint._native",
    .m_doc = "The loops over guest pages, compiled.  Use them through checkpoint.native.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__native(void)
{
    return PyModuleDef_Init(&module);
}
