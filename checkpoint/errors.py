# SPDX-License-Identifier: Apache-2.0
"""Errors of the checkpoint engine.

::

    CheckpointError            may be shown to an administrator as it is
    ├── UnsupportedGuest       the guest or host lacks something that protection needs
    ├── HypervisorError        a call into Xen failed (carries the call and errno)
    ├── LogTaken               another program uses the guest's dirty log
    ├── NotQuiescent           a pause point at which no snapshot can be taken; try again
    ├── ProtocolError          the peer broke docs/protocol.md
    └── ReviveError            the standby's copy could not be brought to life

Messages state the fact and what was expected, in one sentence.
"""

from __future__ import annotations

import os


class CheckpointError(Exception):
    """Base of all errors that this package raises on purpose."""


class UnsupportedGuest(CheckpointError):
    """The guest or its host lacks something that protection needs."""


class HypervisorError(CheckpointError):
    """A call into the hypervisor or its libraries failed.

    :param call: name of the library call or hypercall
    :param errno: the error number it left
    :param detail: what the call was made for, optional
    """

    def __init__(self, call: str, errno: int, detail: str = "") -> None:
        self.call = call
        self.errno = errno
        self.detail = detail
        about = f" ({detail})" if detail else ""
        super().__init__(f"{call}{about} failed: {os.strerror(errno)}")


class LogTaken(CheckpointError):
    """Another program uses the guest's dirty log, of which Xen has one only.

    What the guest has written is not known any more; what was captured with such a log is nothing.
    """

    def __init__(self) -> None:
        super().__init__(
            "another program uses the guest's dirty log, so that written pages would be missed "
            "(expected no xl save and no xl migrate of a protected guest)"
        )


class NotQuiescent(CheckpointError):
    """The guest was paused where no consistent snapshot can be taken; it runs again.

    Not a fault: the caller tries again a little later.
    """


class ProtocolError(CheckpointError):
    """The peer sent what ``docs/protocol.md`` does not allow."""


class ReviveError(CheckpointError):
    """The standby's copy could not be brought to life."""
