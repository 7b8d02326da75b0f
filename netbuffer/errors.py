# SPDX-License-Identifier: Apache-2.0
"""Errors of the output buffer.

::

    NetbufferError              may be shown to an administrator as it is
    ├── NetlinkError            the kernel refused a request (carries the request and errno)
    ├── NetlinkTimeout          the kernel did not answer: whether it acted is not known
    ├── MissingKernelPart       this kernel lacks a part that the buffer is made of
    ├── InterfaceNotFound       no network device of that name
    ├── InterfaceBusy           someone else filters what enters by this device
    ├── Leftover                what a former daemon built for this vif is still there
    ├── BufferLost              somebody removed or changed the buffer under us
    ├── EpochError              the call does not fit the buffer's state
    ├── TapError                frames of the guest can no longer be seen
    ├── AnnounceError           an announcement could not be sent
    └── BacklogError            frames for the guest could not be kept or delivered

Messages state the fact and what was expected, in one sentence.
"""

from __future__ import annotations

import os


class NetbufferError(Exception):
    """Base of all errors that this package raises on purpose."""


class NetlinkError(NetbufferError):
    """The kernel refused a request; it changed nothing.

    :ivar request: what was asked for
    :ivar errno: the error number of the answer
    :ivar detail: the kernel's own words (extended acknowledgement), or ""
    """

    def __init__(self, request: str, errno: int, detail: str = "") -> None:
        self.request = request
        self.errno = errno
        self.detail = detail
        said = f" ({detail})" if detail else ""
        super().__init__(f"The kernel refused to {request}: {os.strerror(errno)}{said}")


class NetlinkTimeout(NetbufferError):
    """No answer of the kernel within the bound; the request may or may not have been done.

    :ivar request: what was asked for
    """

    def __init__(self, request: str, seconds: float) -> None:
        self.request = request
        super().__init__(f"The kernel did not answer the request to {request} within {seconds:g} s")


class MissingKernelPart(NetbufferError):
    """The running kernel has not got a part that holding output is made of.

    :ivar module: name of the kernel module that provides it
    """

    def __init__(self, part: str, module: str, option: str) -> None:
        self.module = module
        super().__init__(
            f"The kernel of this host has no {part} (module {module}), expected a kernel with "
            f"{option}, as Debian's is"
        )


class InterfaceNotFound(NetbufferError):
    """There is no network device of that name."""

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"Network device {name} does not exist")


class InterfaceBusy(NetbufferError):
    """The device already has ingress filters of somebody else.

    A frame that one of them lets go would leave unprotected, and a frame that was held skips
    them on its way out: neither is what their owner wants.
    """

    def __init__(self, name: str, kinds: list[str]) -> None:
        self.name = name
        super().__init__(
            f"Network device {name} already has tc ingress filters ({', '.join(kinds)}), "
            "expected none"
        )


class Leftover(NetbufferError):
    """An output buffer for this vif exists already, made by another or a former daemon."""

    def __init__(self, vif: str, found: str) -> None:
        self.vif = vif
        super().__init__(
            f"An output buffer for {vif} exists already ({found}), expected none: "
            "what a former daemon held must be released or dropped first"
        )


class BufferLost(NetbufferError):
    """The buffer device or its queue is gone or is not ours any more.

    Frames of the guest are dropped by the kernel (a redirect without a target) until the buffer
    is torn down.
    """


class EpochError(NetbufferError):
    """The call does not fit the state that the buffer is in; nothing was changed.

    :ivar event: what was asked for
    :ivar state: the state that the buffer is in
    """

    def __init__(self, event: str, state: str, expected: str) -> None:
        self.event = event
        self.state = state
        super().__init__(
            f"Output buffer is {state} and cannot {event}, expected it to be {expected}"
        )


class TapError(NetbufferError):
    """The tap can no longer see the guest's frames, e.g. because its vif is gone."""


class AnnounceError(NetbufferError):
    """An announcement could not be sent or a bridge could not be told."""


class BacklogError(NetbufferError):
    """Frames for a guest could not be kept, or not be delivered to it."""
