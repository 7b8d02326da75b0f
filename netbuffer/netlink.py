# SPDX-License-Identifier: Apache-2.0
"""A synchronous rtnetlink socket for messages that are already encoded.

rtnetlink does its work inside ``sendmsg`` and has queued the answer when that returns
(``netlink_rcv_skb`` in Linux ``net/netlink/af_netlink.c``), so a request costs two system calls
and never waits for anything but the kernel's own locks.  Not pyroute2's sockets: they run an
event loop of their own, which cannot be done inside the daemon's, and they decode every answer.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator

from netbuffer.errors import NetlinkError, NetlinkTimeout

#: struct nlmsghdr: length, type, flags, sequence number, port; Linux ``linux/netlink.h``
HEADER = struct.Struct("=IHHII")
#: struct nlmsghdr, and struct nlmsgerr with the header of the question and nothing more
_DONE = struct.Struct("=IHHIIi16x")
_ATTRIBUTE = struct.Struct("=HH")
_SEQUENCE = struct.Struct("=I")
_SEQUENCE_OFFSET = 8
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER

NLMSG_ERROR = 2
NLMSG_DONE = 3
NLM_F_REQUEST = 0x1
NLM_F_MULTI = 0x2
NLM_F_ACK = 0x4
NLM_F_ECHO = 0x8
NLM_F_REPLACE = 0x100
NLM_F_EXCL = 0x200
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
_NLM_F_ACK_TLVS = 0x200
_NLMSGERR_ATTR_MSG = 1

_SOL_NETLINK = 270
_NETLINK_CAP_ACK = 10
_NETLINK_EXT_ACK = 11

# A dump fills at most 32 KiB a time (NLMSG_GOODSIZE and netlink_dump's max_recvmsg_len).
_RECEIVE_BYTES = 1 << 16


class Netlink:
    """One AF_NETLINK socket, in the network namespace that the calling thread is in.

    For several threads: one request at a time, the others wait.  On one socket each of two threads
    could take the other's answer, pass it over as one that is late, and wait for its own in vain.

    :param timeout: seconds that the kernel may take for one answer
    """

    def __init__(self, timeout: float = 10.0) -> None:
        self._timeout = timeout
        self._sequence = 0
        self._one_request = threading.Lock()
        self._buffer = bytearray(_RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
        )
        # A bound in the kernel: Python's own timeout would cost a poll for each call.
        seconds = int(timeout)
        bound = struct.pack("@ll", seconds, int((timeout - seconds) * 1_000_000))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, bound)
        # Errors in words, and answers that do not repeat the question.
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
        self._socket.connect((0, 0))

    def close(self) -> None:
        """Close the socket (idempotent)."""
        self._socket.close()

    def request(self, message: bytearray, purpose: str) -> None:
        """Send a message that asks for an acknowledgement and wait for it.

        :param message: encoded message with NLM_F_ACK; its sequence number is overwritten
        :param purpose: the words for an error: "The kernel refused to ..."
        :raise NetlinkError: the kernel refused
        :raise NetlinkTimeout: no answer in time
        """
        with self._one_request:
            sequence = self._send(message)
            size = self._receive(purpose)
            if size == _DONE.size:
                # What comes unless something is wrong: one message, error 0.
                _length, kind, _flags, answered, _port, error = _DONE.unpack_from(self._buffer)
                if kind == NLMSG_ERROR and answered == sequence and error == 0:
                    return
            for kind, flags, start, end in self._answers(sequence, purpose, size):
                if kind == NLMSG_ERROR:
                    self._raise_error(flags, start, end, purpose)
                    return

    def get(self, message: bytearray, purpose: str) -> bytes:
        """Send a message that is answered by one object, without NLM_F_ACK.

        :return: the payload of the answer, from its fixed header on
        :raise NetlinkError: the kernel refused
        :raise NetlinkTimeout: no answer in time
        """
        with self._one_request:
            sequence = self._send(message)
            for kind, flags, start, end in self._answers(sequence, purpose):
                if kind == NLMSG_ERROR:
                    self._raise_error(flags, start, end, purpose)
                    continue
                return bytes(self._view[start:end])
        raise AssertionError("unreachable: answers end by an error")

    def dump(self, message: bytearray, purpose: str) -> list[bytes]:
        """Send a message with NLM_F_DUMP.

        :return: the payloads of all answers, from their fixed headers on
        :raise NetlinkError: the kernel refused
        :raise NetlinkTimeout: no answer in time
        """
        found: list[bytes] = []
        with self._one_request:
            sequence = self._send(message)
            for kind, flags, start, end in self._answers(sequence, purpose):
                if kind == NLMSG_DONE:
                    break
                if kind == NLMSG_ERROR:
                    self._raise_error(flags, start, end, purpose)
                    break
                found.append(bytes(self._view[start:end]))
        return found

    def _send(self, message: bytearray) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        _SEQUENCE.pack_into(message, _SEQUENCE_OFFSET, self._sequence)
        self._socket.send(message)
        return self._sequence

    def _receive(self, purpose: str) -> int:
        """Bytes of what came next, in the buffer."""
        try:
            return self._socket.recv_into(self._buffer)
        except BlockingIOError:
            raise NetlinkTimeout(purpose, self._timeout) from None
        except OSError as err:
            # ENOBUFS: the kernel could not queue the answer, so what it did is not known.
            if err.errno == errno.ENOBUFS:
                raise NetlinkTimeout(purpose, 0) from err
            raise

    def _answers(
        self, sequence: int, purpose: str, size: int = 0
    ) -> Iterator[tuple[int, int, int, int]]:
        """(type, flags, start and end of the payload in the buffer) of each answer.

        Answers to an earlier request, one that ran into its timeout, are passed over.

        :param size: bytes that were received already
        """
        while True:
            size = size or self._receive(purpose)
            offset = 0
            while offset + HEADER.size <= size:
                length, kind, flags, answered, _port = HEADER.unpack_from(self._buffer, offset)
                if length < HEADER.size:
                    break
                if answered == sequence:
                    yield kind, flags, offset + HEADER.size, min(offset + length, size)
                offset += (length + 3) & ~3
            size = 0

    def _raise_error(self, flags: int, start: int, end: int, purpose: str) -> None:
        (code,) = struct.unpack_from("=i", self._buffer, start)
        if code == 0:
            return
        detail = ""
        if flags & _NLM_F_ACK_TLVS:
            # struct nlmsgerr: the error, the header of the question, attributes
            told = attributes(self._view[start + 4 + HEADER.size : end])
            text = told.get(_NLMSGERR_ATTR_MSG)
            if text is not None:
                detail = bytes(text).rstrip(b"\0").decode("utf-8", "replace")
        raise NetlinkError(purpose, -code, detail)


def attributes(data: bytes | memoryview) -> dict[int, memoryview]:
    """Netlink attributes (struct nlattr, 4-byte aligned) by type; of equal types the last one.

    Ends quietly at a length that does not fit.
    """
    view = memoryview(data)
    found: dict[int, memoryview] = {}
    offset = 0
    while offset + _ATTRIBUTE.size <= len(view):
        length, kind = _ATTRIBUTE.unpack_from(view, offset)
        if length < _ATTRIBUTE.size or offset + length > len(view):
            break
        found[kind & _TYPE_MASK] = view[offset + _ATTRIBUTE.size : offset + length]
        offset += (length + 3) & ~3
    return found


def text(value: memoryview | None) -> str:
    """A zero-terminated attribute as text; "" for one that is not there."""
    return "" if value is None else os.fsdecode(bytes(value).rstrip(b"\0"))
