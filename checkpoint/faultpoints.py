# SPDX-License-Identifier: Apache-2.0
"""Named points in the protocol at which a test can disturb a daemon.

:func:`reach` marks a point.  Unless something was armed by :func:`arm` it is one comparison.  What
a point may be called is fixed by :data:`POINTS`; ``docs/proof.md`` tells how the points are swept.
The model is CRIU, whose tests sweep its numbered fault points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from checkpoint.wire import FrameType

#: Called with the name of each point that is reached, in the thread that reaches it.
Hook = Callable[[str], None]

_hook: Hook | None = None


def _spelt(frame_type: FrameType) -> str:
    return frame_type.name.lower().replace("_", "-")


#: Frame type -> the point before a frame of it is given to the socket, in the process that sends.
PUT: Final[Mapping[FrameType, str]] = {each: f"put-{_spelt(each)}" for each in FrameType}
#: Frame type -> the point at which a whole frame of it has arrived and its checksum is right.
GOT: Final[Mapping[FrameType, str]] = {each: f"got-{_spelt(each)}" for each in FrameType}

#: Name -> what is done, or was done, at the point.
POINTS: Final[Mapping[str, str]] = {
    **{PUT[each]: f"before a {each.name} frame is given to the socket" for each in FrameType},
    **{GOT[each]: f"a {each.name} frame has arrived" for each in FrameType},
    # ---- the primary's cycle ----
    "capture": "before a checkpoint is taken",
    "pause": "before the guest is paused for a checkpoint",
    "paused": "the guest is paused for a checkpoint",
    "output-close": "before the output epoch is closed",
    "output-closed": "the output epoch is closed",
    "rings-copied": "what others may write in the guest is copied, the dirty log not yet read",
    "log-read": "the dirty log is read and clean, its pages are not yet copied",
    "pages-copied": "all pages are copied, the guest is still paused",
    "unpaused": "the guest runs again after a checkpoint",
    "captured": "an epoch is in the staging buffer",
    "commit-sent": "COMMIT was handed to the kernel",
    "release": "the ack came, before output of its epoch is let go",
    "released": "output of an acknowledged epoch was let go",
    # ---- the primary's begin and end ----
    "owner-record": "before a primary's first record is written",
    "owner-recorded": "a primary's record is on disk, output still passes",
    "output-held": "output is held from now on",
    "base-sent": "a chunk of the first copy was sent",
    "ask": "before the standby is asked to stand down",
    "handover-sent": "HANDOVER was handed to the kernel",
    "stop-sent": "STOP was handed to the kernel",
    "let-go": "it is decided that the guest is this host's alone",
    "let-go-recorded": "that is on disk, output is still held",
    "let-go-released": "output passes, the buffer is still there",
    "let-go-done": "the buffer is gone",
    "abandon": "it is decided that the guest is the standby's",
    "abandon-recorded": "that is on disk, the stale copy still there",
    "abandon-destroyed": "the stale copy is gone, its held output still there",
    "abandon-done": "held output is dropped",
    # ---- the standby ----
    "standby-recorded": "the standby's record is on disk, the shell not yet built",
    "shell-built": "the shell is there",
    "epoch-complete": "an epoch is staged and verified, not yet acknowledged",
    "ack-sent": "ACK was handed to the kernel, nothing is applied",
    "apply-batch": "before a batch of an acknowledged epoch is written into the shell",
    "applied": "an epoch is in the shell",
    "claim": "before the claim is written",
    "claimed": "the claim is on disk, the guest not yet alive",
    "revive-stub": "before the guest's own hypercalls are made for it",
    "revive-memory": "before the pages that are the hypervisor's are put into the guest",
    "revive-vcpus": "before vCPU state is loaded",
    "revive-backends": "before backends attach to the rings",
    "revive-unpause": "before the guest is let run",
    "revived": "the guest runs here, not yet recorded",
    "takeover-recorded": "the takeover is on disk",
    "announce": "before the guest's addresses are announced",
    "announced": "the guest's addresses are announced",
    "promise": "before the promise to stand down is written",
    "promised": "the promise is on disk, the shell still there",
    "shell-removed": "the shell is gone",
    # ---- a guest's disks, where the guest runs ----
    "disk-marked": "all of a disk is marked as differing, the new pair not yet recorded",
    "disk-recorded": "the pair is recorded, what the standby knows to differ is not yet marked",
    "disk-merged": "what either host knows to differ is marked, no stream is open",
    "disk-streaming": "changes are written down from now on",
    "disks-closed": "while the guest is paused, it is known where the epoch ends on each disk",
    "disks-tell": "before a disk's server hears what is on the standby's disk",
    "disks-told": "the server has heard it, and may clear marks",
    # ---- a guest's disks, on the standby ----
    "replica-recorded": "the copy is a replica, not fit to run, its marks of earlier still there",
    "replica-apply": "before records are written to the replica",
    "replica-written": "records are written to the replica, not flushed",
    "replica-flushed": "the replica is flushed, nobody was told",
    "replica-consistent": "the replica is recorded as fit to run, its old marks still there",
    "replica-unmarked": "the marks of earlier are gone",
    "disks-settle": "before what is sealed is applied for a takeover",
    "disks-settled": "each replica is that of the last epoch and flushed",
    "replica-marked": "an empty bitmap is on disk, the replica is still one",
    "replica-disk": "the replica is recorded as the guest's disk",
    "disks-taken": "all replicas are disks, no server takes changes yet",
    "disks-activated": "the servers take the guest's changes",
    # ---- records, and the daemon that comes back ----
    "ledger-write": "before a record is written",
    "ledger-synced": "the new record is on disk beside the old one",
    "ledger-renamed": "the new record has replaced the old one, the folder is not yet synced",
    "ledger-written": "a record is on disk",
    "recover-ask": "before a restarted daemon asks who owns a guest",
    "recover-keep": "it learned that the guest is its own",
    "recover-released": "it has let go what the last daemon held",
    "recover-give-up": "it learned that the guest is another's",
    "recover-destroyed": "it has destroyed the stale copy",
    "recover-stand-down": "before a restarted standby removes the shell",
    "recover-stood-down": "a restarted standby has removed the shell, not yet recorded",
}


def reach(point: str) -> None:
    """Say that ``point``, one of :data:`POINTS`, is reached."""
    if _hook is not None:
        _hook(point)


def arm(hook: Hook | None) -> None:
    """Have every reached point told to ``hook``, from every thread; None ends that."""
    global _hook
    _hook = hook
