# SPDX-License-Identifier: Apache-2.0
"""How long a guest stood still, as a process in it saw that reads the clock all the time.  Pure.

``vagrant/guest/load.c`` counts the gaps between two readings in buckets, sixteen for each power of
two.  A guest that has no processor of its own also stands still while others have it; inside, that
cannot be told from a checkpoint.  So the stalls of *n* checkpoints are taken to be the *n* longest
gaps: that can only be too long, for every way of protecting a guest alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

#: Buckets for each power of two, as a power of two.
FINE: Final = 4
#: Nanoseconds from which on a gap is taken for one in which others had the processor: in software
#: emulation the loop itself takes up to a few tenths of a millisecond.
AWAY: Final = 1_000_000


def middle(bucket: int) -> float:
    """Nanoseconds in the middle of a bucket."""
    exponent, part = divmod(bucket, 1 << FINE)
    return float(((1 << FINE) + part + 0.5) * 2.0 ** (exponent - FINE))


@dataclass(slots=True)
class Gaps:
    """Gaps between two readings of the clock.

    :ivar counts: gaps by bucket
    :ivar longest: nanoseconds, exactly
    """

    counts: Counter[int] = field(default_factory=Counter)
    longest: int = 0

    @classmethod
    def parse(cls, longest: str, buckets: Sequence[str]) -> Gaps:
        """Out of the words of the guest's answer.

        :raises ValueError: they are not such words
        """
        pairs = (word.split(":") for word in buckets)
        return cls(Counter({int(bucket): int(count) for bucket, count in pairs}), int(longest))

    @classmethod
    def merge(cls, parts: Iterable[Gaps]) -> Gaps:
        """The gaps of several measurements."""
        whole = cls()
        for part in parts:
            whole.counts.update(part.counts)
            whole.longest = max(whole.longest, part.longest)
        return whole

    def stall_ms(self, share: float, checkpoints: int) -> float | None:
        """Milliseconds below which this share of the stalls of so many checkpoints lies.

        None if there were no checkpoints, or fewer gaps than those: then the guest did not see
        all of them.
        """
        if not 0 < checkpoints <= sum(self.counts.values()):
            return None
        # The longest gap has rank 0.
        wanted = checkpoints - 1 - min(checkpoints - 1, int(share * checkpoints))
        if wanted == 0:
            return self.longest / 1e6
        for bucket in sorted(self.counts, reverse=True):
            if wanted < self.counts[bucket]:
                return middle(bucket) / 1e6
            wanted -= self.counts[bucket]
        raise AssertionError("there are fewer gaps than were counted")

    @property
    def away_ms(self) -> float:
        """Milliseconds in all gaps of at least :data:`AWAY` together."""
        long = (middle(bucket) * n for bucket, n in self.counts.items() if middle(bucket) >= AWAY)
        return sum(long) / 1e6
