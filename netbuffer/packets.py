# SPDX-License-Identifier: Apache-2.0
"""Packet sockets (packet(7)): what their uses here have in common."""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Iterable
from typing import Final

#: For ``bind``: frames of every kind (ETH_P_ALL, Linux uapi/linux/if_ether.h).
EVERY_KIND: Final = 0x0003
#: For ``bind``: no frames; the socket only sends.
NO_KIND: Final = 0
#: Level of their socket options.
SOL_PACKET: Final = 263
_SO_ATTACH_FILTER: Final = 26

#: Of a filter's steps (Linux uapi/linux/filter.h).
LOAD_WORD, LOAD_HALF, JUMP_IF_EQUAL, RETURN = 0x20, 0x28, 0x15, 0x06

Step = tuple[int, int, int, int]
"""(code, steps to skip if true, if false, operand): struct sock_filter."""


def unbound() -> socket.socket:
    """A packet socket that never blocks; until it is bound it sees no frames of any device.

    :raise PermissionError: for want of CAP_NET_RAW
    """
    return socket.socket(
        socket.AF_PACKET,
        socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
        NO_KIND,
    )


def attach(to: socket.socket, steps: Iterable[Step]) -> None:
    """Have the socket see so many bytes of a frame as the filter returns; 0: not see it.

    :raise OSError: the kernel refused
    """
    program = b"".join(struct.pack("=HBBI", *step) for step in steps)
    # struct sock_fprog; the kernel copies both.
    room = ctypes.create_string_buffer(program)
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(room))
    to.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)
