# SPDX-License-Identifier: Apache-2.0
"""Whatever comes from the network, the parser returns frames or says why not."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import ProtocolError
from checkpoint.wire import (
    MAX_STATE,
    SPECS,
    Frame,
    FrameType,
    Parser,
    decode_json,
    encode_frame,
    encode_json,
)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    frame_type = draw(st.sampled_from(FrameType))
    spec = SPECS[frame_type]
    length = draw(st.integers(spec.least, min(spec.most, spec.least + 100)))
    buffers, _ = encode_frame(
        frame_type,
        draw(st.binary(min_size=length, max_size=length)),
        flags=draw(st.integers(0, 255)) & spec.flags,
        epoch=draw(st.integers(0, 2**64 - 1)) if spec.epoch else 0,
    )
    return b"".join(buffers)


def fed(portions: list[bytes]) -> tuple[list[Frame], str]:
    parser = Parser()
    found: list[Frame] = []
    try:
        for portion in portions:
            found.extend(parser.feed(portion))
    except ProtocolError as error:
        return found, str(error)
    return found, "midway" if parser.midway else ""


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


cuts = st.lists(st.integers(0, 10_000), max_size=10)


@given(st.lists(frames(), max_size=6), cuts)
def test_frames_survive_any_cutting(stream: list[bytes], places: list[int]) -> None:
    found, end = fed(cut(b"".join(stream), places))
    assert end == ""
    again = [
        b"".join(encode_frame(f.type, bytes(f.payload), flags=f.flags, epoch=f.epoch)[0])
        for f in found
    ]
    assert again == stream


@given(st.lists(frames(), min_size=1, max_size=3), st.data())
def test_a_flipped_bit_is_never_accepted(stream: list[bytes], data: st.DataObject) -> None:
    whole = bytearray(b"".join(stream))
    bit = data.draw(st.integers(0, len(whole) * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    found, end = fed([bytes(whole)])
    assert end != ""
    assert len(found) < len(stream)


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=60).map(lambda b: b"KMRI" + b)), cuts)
def test_noise_gives_an_error_or_waits_for_more(noise: bytes, places: list[int]) -> None:
    found, _ = fed(cut(noise, places))
    assert found == []


@given(
    st.binary(min_size=20, max_size=20).map(lambda b: b"KMRI" + b),
    st.sampled_from(FrameType),
    st.integers(0, 2**32 - 1),
)
def test_a_header_never_makes_it_allocate_beyond_the_limit(
    noise: bytes, frame_type: FrameType, length: int
) -> None:
    header = bytearray(noise)
    header[4:8] = bytes([frame_type, 0, 0, 0])
    header[8:12] = length.to_bytes(4, "little")
    header[12:20] = bytes(8)
    tracemalloc.start()
    try:
        fed([bytes(header)])
        assert tracemalloc.get_traced_memory()[1] < MAX_STATE + (1 << 20)
    finally:
        tracemalloc.stop()


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), values, max_size=5))
def test_json_objects_come_back(value: dict[str, object]) -> None:
    (frame,) = Parser().feed(b"".join(encode_frame(FrameType.STOP, encode_json(value))[0]))
    assert decode_json(frame).untrusted_values == value


@given(st.binary(min_size=2, max_size=60))
def test_json_noise_is_an_object_or_an_error(noise: bytes) -> None:
    (frame,) = Parser().feed(b"".join(encode_frame(FrameType.STOP, noise)[0]))
    try:
        assert isinstance(decode_json(frame).untrusted_values, dict)
    except ProtocolError:
        pass
