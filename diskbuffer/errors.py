# SPDX-License-Identifier: Apache-2.0
"""Errors of the disk buffer.

::

    DiskError                   may be shown to an administrator as it is
    ├── ServerError             the disk's server refused a request, or cannot be reached
    │   └── ServerGone          there is none
    ├── StreamLost              changes are no longer written down: a copy must begin anew
    ├── RecordError             a record is not as docs/disk.md says (ValueError too)
    ├── BitmapError             a bitmap cannot be believed: everything has to be copied
    ├── ReplicaError            the standby's copy cannot be kept up
    └── MetadataError           what is known of a replica cannot be read or written

Messages state the fact and what was expected, in one sentence.
"""

from __future__ import annotations


class DiskError(Exception):
    """Base of all errors that this package raises on purpose."""


class ServerError(DiskError):
    """The disk's server refused a request, or cannot be reached."""


class ServerGone(ServerError):
    """The disk has no server: it has ended, or was never started."""


class StreamLost(DiskError):
    """Changes of the disk are not written down any more; the guest goes on."""


class RecordError(DiskError, ValueError):
    """A record, or a batch of them, breaks its format."""


class BitmapError(DiskError):
    """A bitmap file is damaged or is of another disk."""


class ReplicaError(DiskError):
    """The standby's copy cannot be written, or was given what does not fit it."""


class MetadataError(DiskError):
    """The durable state of a replica is unreadable or cannot be written."""
