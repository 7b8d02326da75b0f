# SPDX-License-Identifier: Apache-2.0
"""The guest kernel's xenstore connection and its watches."""

from __future__ import annotations

import pytest

from checkpoint.errors import UnsupportedGuest
from checkpoint.guest.linux import read_layout
from checkpoint.guest.xenstore import read_watches, xenstore_at_rest
from tests.unit.guest_kernel import DIRECT, Options, build


@pytest.mark.parametrize(
    ("where", "value", "at_rest"),
    [
        ("xs_reply_list", DIRECT + 0x60000, False),
        ("xb_write_list", DIRECT + 0x60000, False),
        ("xs_state_users", 1, False),
        ("xs_response_mutex", DIRECT + 0x60001, False),
        ("xs_response_mutex", 4, True),
    ],
)
def test_a_request_or_message_under_way_is_seen(where: str, value: int, at_rest: bool) -> None:
    kernel = build()
    layout = read_layout(kernel.memory, kernel.registers)
    assert xenstore_at_rest(kernel.memory, layout)
    kernel.poke(where, value)
    assert xenstore_at_rest(kernel.memory, layout) is at_rest


@pytest.mark.parametrize("watches", [(), ("device",), ("a/b", "@releaseDomain", "cpu")])
def test_watches_have_the_tokens_that_linux_sends(watches: tuple[str, ...]) -> None:
    kernel = build(Options(watches=watches))
    layout = read_layout(kernel.memory, kernel.registers)
    assert read_watches(kernel.memory, layout) == [
        (path, f"FFFF8880000{0x60000 + index * 0x100:05X}") for index, path in enumerate(watches)
    ]


def test_a_list_that_does_not_end_is_refused() -> None:
    kernel = build()
    layout = read_layout(kernel.memory, kernel.registers)
    kernel.poke(0x60000, DIRECT + 0x60000)
    with pytest.raises(UnsupportedGuest, match="more than 8192 entries"):
        read_watches(kernel.memory, layout)
    kernel.poke(0x60000, 0xDEAD_0000_0000_0100)
    with pytest.raises(UnsupportedGuest, match="not canonical"):
        read_watches(kernel.memory, layout)


def test_a_realtime_kernels_mutex_is_refused() -> None:
    kernel = build(Options(realtime=True))
    with pytest.raises(UnsupportedGuest, match="no member 'owner' in its type 'mutex'"):
        read_layout(kernel.memory, kernel.registers)
