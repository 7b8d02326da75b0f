# SPDX-License-Identifier: Apache-2.0
"""The one thing that setup.cfg cannot say: the native core, built against the stable ABI."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "checkpoint._native",
            sources=["checkpoint/_native.c"],
            depends=["checkpoint/_pages.h"],
            # Python 3.11 is the first whose stable ABI has the buffer protocol.
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=["-O3", "-std=c11", "-fvisibility=hidden", "-Wall", "-Wextra"],
        )
    ]
)
