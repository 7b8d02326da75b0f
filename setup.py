# SPDX-License-Identifier: Apache-2.0
"""The one thing that setup.cfg cannot say: what is compiled.

The native core, against Python's stable ABI, and nbdkit's plug-in, which is no Python module: it
is only built like one so that it is found beside the package that it belongs to.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "checkpoint._native",
            sources=["checkpoint/_native.c"],
            depends=[
                "checkpoint/_pages.h",
                "checkpoint/_standstill.h",
                "checkpoint/xen/standstill.h",
            ],
            # Python 3.11 is the first whose stable ABI has the buffer protocol.
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra"],
        ),
        Extension(
            "diskbuffer._plugin",
            sources=["diskbuffer/_plugin.c"],
            depends=[
                f"diskbuffer/_{part}.h"
                for part in (
                    *("disk", "bitmap", "stream", "sync", "control"),
                    *("target", "direct", "hold", "issue"),
                )
            ],
            libraries=["z", "pthread"],
            py_limited_api=True,
            extra_compile_args=["-O2", "-std=gnu11", "-fvisibility=hidden", "-Wall", "-Wextra"],
        ),
    ]
)
