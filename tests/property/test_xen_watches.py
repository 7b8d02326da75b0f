# SPDX-License-Identifier: Apache-2.0
"""All watches are set, however xenstored cuts reading and writing and whatever fires between."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.xen.watches import WatchRequests
from tests.unit.xen_store_ring import RingEnd

TEXT = st.text(
    st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="\x7f"), min_size=1
)
WATCHES = st.lists(
    st.tuples(TEXT.map(lambda text: text[:200]), st.integers(0, 1 << 64).map("{:X}".format)),
    max_size=40,
    unique_by=lambda watch: watch[1],
)


@given(
    watches=WATCHES,
    start=st.integers(0, (1 << 32) - 1),
    pieces=st.lists(st.integers(1, 1024), max_size=60),
    noise=st.lists(st.tuples(TEXT, TEXT), max_size=8),
    patience=st.integers(1, 4),
)
def test_all_watches_are_set(
    watches: list[tuple[str, str]],
    start: int,
    pieces: list[int],
    noise: list[tuple[str, str]],
    patience: int,
) -> None:
    page = bytearray(4096)
    store = RingEnd(page, start, pieces, noise=noise)
    requests = WatchRequests(memoryview(page), watches)
    for turn in range(5000):
        if requests.done:
            break
        if requests.pump():
            store.notify()
        for _ in range(turn % patience + 1):
            store.step()
    assert requests.done
    assert store.watches == watches
    assert store.quiet
