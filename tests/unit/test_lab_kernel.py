# SPDX-License-Identifier: Apache-2.0
"""A kernel is taken out of its boot image, or the image is left as it is."""

from __future__ import annotations

import lzma
import struct

import pytest

from vagrant.lablib.errors import LabError
from vagrant.lablib.kernel import bootable

KERNEL = b"\x7fELF" + bytes(range(256)) * 64


def boot_image(payload: bytes, *, version: int = 0x020F, sectors: int = 27) -> bytes:
    """A boot image whose protected-mode code begins with 0x2CC bytes of something else."""
    head = bytearray(((sectors or 4) + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 0x2CC, len(payload))
    return bytes(head) + bytes(0x2CC) + payload + b"after"


def xz(data: bytes) -> bytes:
    """As Linux scripts/Makefile.lib does it: filtered for x86, the length after it."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "dict_size": 1 << 20}]
    packed = lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC32, filters=filters)
    return packed + struct.pack("<I", len(data))


@pytest.mark.parametrize("sectors", [0, 4, 27])
def test_what_xz_has_compressed_is_taken_out(sectors: int) -> None:
    assert bootable(boot_image(xz(KERNEL), sectors=sectors)) == KERNEL


@pytest.mark.parametrize(
    "image",
    [
        b"",
        KERNEL,
        bytes(4096),
        boot_image(b"\x28\xb5\x2f\xfd" + KERNEL),
        boot_image(xz(KERNEL), version=0x0207),
    ],
    ids=["nothing", "uncompressed", "no header", "zstd", "too old to say where it is"],
)
def test_anything_else_is_left_as_it_is(image: bytes) -> None:
    assert bootable(image) is image


def test_a_cut_off_image_is_reported() -> None:
    image = boot_image(xz(KERNEL))
    with pytest.raises(LabError, match="ends after"):
        bootable(image[:-100])


def test_a_damaged_image_is_reported() -> None:
    image = bytearray(boot_image(xz(KERNEL)))
    image[-100] ^= 0xFF
    with pytest.raises(LabError, match="cannot be decompressed"):
        bootable(bytes(image))
