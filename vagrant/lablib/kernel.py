# SPDX-License-Identifier: Apache-2.0
"""A Linux kernel's boot image, and what is compressed in it."""

from __future__ import annotations

import lzma
import struct

from vagrant.lablib.errors import LabError

# Setup header of the boot protocol (Linux Documentation/arch/x86/boot.rst), offsets in the file.
_SETUP_SECTORS = 0x1F1
_MAGIC = 0x202
_VERSION = 0x206
_PAYLOAD = 0x248  # offset from the protected-mode code, and length
_WITH_PAYLOAD = 0x0208
_SECTOR = 512
_XZ = b"\xfd7zXZ\0"


def bootable(image: bytes) -> bytes:
    """The kernel of a boot image as a guest can be started with it soonest.

    xl takes the kernel out of its image by itself.  Where that was compressed by xz it takes an
    emulated machine 12 s each time, so that is done here; anything else is given back as it is.

    :raises LabError: the image is cut off or damaged
    """
    if len(image) < _PAYLOAD + 8 or image[_MAGIC : _MAGIC + 4] != b"HdrS":
        return image
    (version,) = struct.unpack_from("<H", image, _VERSION)
    if version < _WITH_PAYLOAD:
        return image
    offset, length = struct.unpack_from("<II", image, _PAYLOAD)
    # 0 sectors mean 4, for historical reasons.
    begin = ((image[_SETUP_SECTORS] or 4) + 1) * _SECTOR + offset
    payload = image[begin : begin + length]
    if not payload.startswith(_XZ):
        return image
    # The length of what is in it follows what is compressed, so a decompressor of its own.
    unpacking = lzma.LZMADecompressor(lzma.FORMAT_XZ)
    try:
        kernel = unpacking.decompress(payload)
    except lzma.LZMAError as error:
        raise LabError(f"The kernel's image cannot be decompressed: {error}.") from None
    if not unpacking.eof:
        raise LabError(f"The kernel's image ends after {len(image)} bytes; expected more.")
    return kernel
