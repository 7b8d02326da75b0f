# SPDX-License-Identifier: Apache-2.0
"""The epoch that comes in at the standby: held until it is whole, applied whole or not at all."""

from __future__ import annotations

from dataclasses import dataclass

from checkpoint.codec import Decoder, Verified
from checkpoint.errors import CheckpointError, ProtocolError
from checkpoint.faultpoints import reach
from checkpoint.wire import Frame, Totals


class ApplyError(CheckpointError):
    """An acknowledged epoch could not be applied: the shell must never be revived."""


@dataclass(frozen=True, slots=True)
class Committed:
    """An epoch that is complete and verified.

    :ivar epoch: its number; 0 is the base copy, which cannot be run
    :ivar state: the machine state
    :ivar pages: pages in it
    :ivar wire_bytes: frames with their headers
    :ivar captured_at: when the guest was paused for it, on this host's ``time.monotonic()``
    """

    epoch: int
    state: bytes
    pages: int
    wire_bytes: int
    captured_at: float


class Incoming:
    """What has come of the epoch that is due; untrusted until it is :class:`Committed`.

    The base copy, epoch 0, is counted and not held: a shell that has half of it is not run.

    :ivar number: the epoch that is due
    :ivar size: bytes of the pages that are held
    """

    def __init__(self, decoder: Decoder) -> None:
        self.number = 0
        self.size = 0
        self._decoder = decoder
        self._totals = Totals()
        self._batches: list[Verified] = []
        self._state: bytes | None = None

    def require_due(self, frame: Frame) -> None:
        """:raise ProtocolError: the frame is of another epoch"""
        if frame.epoch != self.number:
            raise ProtocolError(
                f"{frame.type.name} of epoch {frame.epoch} came, expected epoch {self.number}"
            )

    def require_open(self, frame: Frame) -> None:
        """:raise ProtocolError: the frame is of another epoch, or its machine state has come"""
        self.require_due(frame)
        if self._state is not None:
            raise ProtocolError(f"{frame.type.name} of epoch {self.number} came after its STATE")

    def count(self, frame: Frame, pages: int = 0) -> None:
        """Note a frame with so many pages."""
        self._totals.add(len(frame.payload), frame.crc, pages)

    def hold(self, frame: Frame, batch: Verified) -> None:
        """Keep the pages of a frame until :meth:`apply`.

        :raise ProtocolError: they are more than the guest has
        """
        self.count(frame, batch.pages)
        if self._totals.pages > self._decoder.pages:
            raise ProtocolError(f"epoch {self.number} has more pages than the guest")
        self._batches.append(batch)
        self.size += len(batch.body)

    def take_state(self, frame: Frame) -> None:
        """Keep the machine state.

        :raise ProtocolError: it is of another epoch, the second one, or breaks the protocol
        """
        self.require_due(frame)
        if self._state is not None:
            raise ProtocolError(f"STATE of epoch {self.number} came twice")
        self._state = self._decoder.decode_state(frame.flags, frame.payload)
        self.count(frame)

    def complete(self, frame: Frame, heard_at: float) -> Committed:
        """Compare COMMIT with what came.

        :param heard_at: when COMMIT came, on this host's ``time.monotonic()``
        :raise ProtocolError: something is missing, or is not what the primary sent
        """
        self.require_due(frame)
        if self.number > 0 and self._state is None:
            raise ProtocolError(f"COMMIT of epoch {self.number} came without its STATE")
        age_ns = self._totals.compare(frame)
        return Committed(
            epoch=self.number,
            state=self._state or b"",
            pages=self._totals.pages,
            wire_bytes=self._totals.wire_bytes,
            captured_at=heard_at - age_ns / 1e9,
        )

    def apply(self, memory: memoryview) -> None:
        """Bring the shell's memory from the epoch before to this one.

        :param memory: all of the guest
        :raise ApplyError: it is neither of them now
        """
        try:
            for batch in self._batches:
                reach("apply-batch")
                self._decoder.apply(batch, memory)
        except (ValueError, OSError) as error:
            raise ApplyError(f"epoch {self.number} could not be applied: {error}") from error

    def next(self) -> None:
        """Go on to the next epoch: nothing of this one is held any more."""
        self.number += 1
        self.drop()

    def drop(self) -> None:
        """Hold nothing of this one any more."""
        self.size = 0
        self._totals = Totals()
        self._batches = []
        self._state = None
