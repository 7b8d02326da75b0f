# SPDX-License-Identifier: Apache-2.0
"""Broken rules of output, acknowledgement and application: invariants 1 to 3."""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Edit, Mutant

_CYCLE: Final = "kemari/cycle.py"
_EPOCH: Final = "kemari/epoch.py"
_SUCCESSOR: Final = "kemari/successor.py"
_TAKEOVER: Final = "kemari/takeover.py"
_RECEIVER: Final = "checkpoint/receiver.py"
_INCOMING: Final = "checkpoint/incoming.py"
_MEMORY: Final = "checkpoint/memory.py"

EPOCHS: Final[tuple[Mutant, ...]] = (
    # ---- Invariant 1: output leaves after its ack ----
    Mutant(
        "release-before-ack",
        "output waits for the ack of its epoch",
        (
            Edit(
                _CYCLE,
                "        self._ack_timer.set(ACK_LIMIT)\n",
                "        self._ack_timer.set(ACK_LIMIT)\n        self._output.release_epoch()\n",
            ),
            Edit(
                _CYCLE,
                "        try:\n            self._output.release_epoch()\n",
                "        try:\n            self._output.fileno()\n",
            ),
        ),
    ),
    Mutant(
        "release-too-much",
        "only the closed epoch's output is released",
        (
            Edit(
                "kemari/memory.py",
                "            self._leave(self._epochs.popleft())\n\n    def release_all",
                "            self._leave(self._epochs.popleft())\n"
                "            self._leave(self._epochs[0])\n"
                "            self._epochs[0].clear()\n\n    def release_all",
            ),
        ),
    ),
    Mutant(
        "output-never-closed",
        "an epoch's output is closed while the guest is paused",
        (
            Edit(
                _CYCLE,
                "        self._drained = True\n        self._output.close_epoch()\n",
                "        self._drained = True\n        self._output.fileno()\n",
            ),
        ),
    ),
    Mutant(
        "output-closed-after-unpause",
        "an epoch's output is closed before the guest runs again",
        (
            Edit(_MEMORY, "        if not waits:\n            close_output()\n", ""),
            Edit(
                _MEMORY,
                '                self.unpause()\n                reach("unpaused")\n',
                "                self.unpause()\n"
                "                if not waits:\n                    close_output()\n"
                '                reach("unpaused")\n',
            ),
        ),
    ),
    Mutant(
        "output-passes-before-the-first-checkpoint",
        "output is held before the first checkpoint is taken",
        (
            Edit(
                "kemari/protection.py",
                "        await in_thread(output.setup)\n",
                "        await in_thread(output.setup)\n        output.release_all()\n",
            ),
        ),
    ),
    Mutant(
        "release-while-asking",
        "an ack that comes while the standby is asked lets nothing go",
        (
            Edit(
                _EPOCH,
                "not in (PrimaryState.PROTECTED, PrimaryState.HANDING_OVER):\n            # While",
                "in (PrimaryState.UNPROTECTED, PrimaryState.MOVED):\n            # While",
            ),
        ),
        ("tests/property/test_epoch.py",),
    ),
    Mutant(
        "late-ack-trusted",
        "an ack a heartbeat time after its capture is believed only once confirmed",
        (
            Edit(
                _CYCLE,
                "        if commit_ms < self._sender.link.peer.heartbeat * 1000:\n",
                "        if commit_ms >= 0:\n",
            ),
        ),
    ),
    # ---- Invariant 2: an ack is for what is held whole, verified ----
    Mutant(
        "ack-before-complete",
        "an epoch is acknowledged when all of it is there",
        (
            Edit(
                _RECEIVER,
                "                self._incoming.hold(frame, batch)\n",
                "                if not self._incoming.size:\n"
                "                    self.link.put(FrameType.ACK, epoch=frame.epoch)\n"
                "                    self.link.push()\n"
                "                self._incoming.hold(frame, batch)\n",
            ),
            Edit(
                _RECEIVER,
                "        self.link.put(FrameType.ACK, epoch=committed.epoch)\n",
                "        if committed.epoch == 0 or not self._incoming.size:\n"
                "            self.link.put(FrameType.ACK, epoch=committed.epoch)\n",
            ),
        ),
        ("tests/unit/test_session.py",),
    ),
    Mutant(
        "totals-not-compared",
        "COMMIT's totals are compared with what came",
        (
            Edit(
                _INCOMING,
                "        age_ns = self._totals.compare(frame)\n",
                '        age_ns = int.from_bytes(frame.payload[24:32], "little")\n',
            ),
        ),
        ("tests/unit/test_session_breaches.py",),
    ),
    Mutant(
        "ack-after-the-end",
        "a standby that has taken over or stood down acknowledges nothing",
        (
            Edit(
                _SUCCESSOR,
                "            return [Discard()]\n        if epoch != self.complete + 1:",
                "            return [Ack(epoch), Apply(epoch)]\n"
                "        if epoch != self.complete + 1:",
            ),
        ),
        ("tests/property/test_epoch.py",),
    ),
    # ---- Invariant 3: the last complete epoch, whole or not at all ----
    Mutant(
        "half-an-epoch",
        "all of an acknowledged epoch is applied",
        (
            Edit(
                _INCOMING,
                "            for batch in self._batches:\n",
                "            for batch in self._batches[: len(self._batches) // 2]:\n",
            ),
        ),
    ),
    Mutant(
        "unverified-epoch",
        "nothing of an epoch is applied before all of it is verified",
        (
            Edit(
                _RECEIVER,
                "                self._incoming.hold(frame, batch)\n",
                "                self._incoming.hold(frame, batch)\n"
                "                if self.shell is not None:\n"
                "                    self._decoder.apply(batch, self.shell.memory)\n",
            ),
            Edit(
                _INCOMING,
                "                self._decoder.apply(batch, memory)\n"
                "        except (ValueError, OSError)",
                "                batch.body\n        except (ValueError, OSError)",
            ),
        ),
    ),
    Mutant(
        "stale-state",
        "a guest is revived with the machine state of the last epoch",
        (
            Edit(
                _INCOMING,
                "        self._state = self._decoder.decode_state(frame.flags, frame.payload)\n",
                "        state = self._decoder.decode_state(frame.flags, frame.payload)\n"
                '        self._first = getattr(self, "_first", state)\n'
                "        self._state = self._first\n",
            ),
        ),
    ),
    Mutant(
        "epochs-out-of-order",
        "a standby takes the epoch that is due and no other",
        (
            Edit(
                _SUCCESSOR,
                '        if epoch != self.complete + 1:\n            raise EpochError("commit"',
                '        if epoch <= self.complete:\n            raise EpochError("commit"',
            ),
        ),
        ("tests/property/test_epoch.py",),
    ),
    Mutant(
        "clock-stands-still",
        "the guest's clocks go on by the time since the capture",
        (
            Edit(
                _TAKEOVER,
                "        elapsed = int((time.monotonic() - committed.captured_at) * 1e9)\n",
                "        elapsed = 0\n",
            ),
        ),
        ("tests/unit/test_kemari_guest.py",),
    ),
    # ---- The kernel's output buffer ----
    Mutant(
        "kernel-buffer-released-whole",
        "the kernel's buffer lets go the closed epoch only",
        (
            Edit(
                "netbuffer/plug.py",
                "        self._step(Event.RELEASE)\n        return self._epochs.released\n",
                "        self._step(Event.RELEASE_ALL)\n        return self._epochs.released\n",
            ),
        ),
        ("tests/unit/test_netbuffer_plug.py", "tests/property/test_netbuffer_plug.py"),
    ),
)
