/* SPDX-License-Identifier: Apache-2.0
 *
 * Python's door to _pages.h: arguments, bounds, the GIL.  checkpoint/native.py documents each
 * function, checkpoint/_twin.py does the same in Python.  Only the stable ABI of Python 3.11 is
 * used, so that one wheel serves every later version.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_pages.h"

/* Frame numbers are array('Q'): 8-byte items, so a pointer to them must be aligned to be indexed. */
static int is_words(const Py_buffer *view, const char *name)
{
    if ((uintptr_t)view->buf % 8 == 0 && view->len % 8 == 0)
        return 1;
    PyErr_Format(PyExc_ValueError, "%s is not an aligned buffer of 64-bit items", name);
    return 0;
}

static PyObject *scan_bitmap(PyObject *self, PyObject *args)
{
    (void)self;
    Py_buffer bitmap, out;
    Py_ssize_t nbits;
    PyObject *result = NULL;

    if (!PyArg_ParseTuple(args, "y*nw*:scan_bitmap", &bitmap, &nbits, &out))
        return NULL;
    if (nbits < 0 || nbits > bitmap.len * 8) {
        PyErr_Format(PyExc_ValueError, "a bitmap of %zd bytes does not have %zd bits", bitmap.len,
                     nbits);
    } else if (is_words(&out, "out")) {
        uint64_t room = (uint64_t)out.len / 8, total, used = 0;
        Py_BEGIN_ALLOW_THREADS
        total = bitmap_count(bitmap.buf, (uint64_t)nbits);
        if (total <= room)
            used = bitmap_scan(bitmap.buf, (uint64_t)nbits, out.buf, room);
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

static PyMethodDef methods[] = {
    {"scan_bitmap", scan_bitmap, METH_VARARGS, NULL},
    {"gather", gather, METH_VARARGS, NULL},
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
