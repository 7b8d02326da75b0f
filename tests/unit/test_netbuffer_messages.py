# SPDX-License-Identifier: Apache-2.0
"""The bytes that go to the kernel and come from it."""

from __future__ import annotations

import struct
from unittest import mock

import pytest

from netbuffer import messages
from netbuffer.epochs import PlugAction
from netbuffer.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_ECHO, NLM_F_EXCL, NLM_F_REQUEST

# struct tcmsg for device 7, handle 1:, parent root
_ROOT = struct.pack("=BxxxiIII", 0, 7, 0x10000, 0xFFFFFFFF, 0)
_KIND_PLUG = bytes.fromhex("09000100") + b"plug\0" + bytes(3)


@pytest.mark.parametrize(
    ("action", "value"),
    [
        (PlugAction.BUFFER, 0),
        (PlugAction.RELEASE_ONE, 1),
        (PlugAction.RELEASE_INDEFINITE, 2),
        (PlugAction.LIMIT, 3),
    ],
)
def test_each_plug_action_is_encoded_as_itself(action: PlugAction, value: int) -> None:
    message = messages.plug_do(7, action, limit_bytes=0x01020304)
    assert messages.header(message) == (60, messages.RTM_NEWQDISC, NLM_F_REQUEST | NLM_F_ACK)
    assert bytes(message[16:]) == _ROOT + _KIND_PLUG + struct.pack(
        "=HHiI", 12, 2, value, 0x01020304
    )


def test_an_action_that_the_encoder_does_not_know_is_not_sent_as_buffer() -> None:
    with (
        mock.patch("pyroute2.netlink.rtnl.tcmsg.sched_plug.actions", {}),
        pytest.raises(AssertionError, match="RELEASE_ONE"),
    ):
        messages.plug_do(7, PlugAction.RELEASE_ONE)


def test_adding_a_plug_does_not_replace_one() -> None:
    message = messages.plug_add(7, 1000)
    _length, kind, flags = messages.header(message)
    assert kind == messages.RTM_NEWQDISC
    assert flags == NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    assert bytes(message[16:]) == _ROOT + _KIND_PLUG + struct.pack("=HHiI", 12, 2, 0, 1000)


def test_asking_for_statistics_asks_for_an_answer() -> None:
    _length, kind, flags = messages.header(messages.plug_get(7))
    assert (kind, flags) == (messages.RTM_GETQDISC, NLM_F_REQUEST | NLM_F_ECHO)


def test_the_filter_matches_every_protocol_and_redirects() -> None:
    message = bytes(messages.redirect_add(7, 9))
    index, handle, parent, info = struct.unpack_from("=iIII", message, 20)
    assert (index, handle, parent) == (7, messages.FILTER_HANDLE, messages.INGRESS_FILTERS)
    assert info >> 16 == messages.FILTER_PRIORITY
    assert struct.pack("=H", info & 0xFFFF) == b"\x00\x03", "not ETH_P_ALL in network order"
    # struct tc_mirred: index, capab, action STOLEN, refcnt, bindcnt, EGRESS_REDIR, ifindex
    assert message.endswith(struct.pack("=IIiiiiI", 0, 0, 4, 0, 0, 1, 9))
    assert b"matchall\0" in message
    assert b"mirred\0" in message


def test_deleting_the_filter_names_no_handle() -> None:
    message = bytes(messages.redirect_delete(7))
    index, handle, parent, info = struct.unpack_from("=iIII", message, 20)
    assert (index, handle, parent) == (7, 0, messages.INGRESS_FILTERS)
    assert info >> 16 == messages.FILTER_PRIORITY


def attribute(kind: int, payload: bytes) -> bytes:
    length = 4 + len(payload)
    return struct.pack("=HH", length, kind) + payload + bytes(-length % 4)


def test_reading_a_queue() -> None:
    stats2 = attribute(1, bytes(16)) + attribute(3, struct.pack("=IIIII", 5, 700, 2, 0, 0))
    payload = _ROOT + attribute(1, b"plug\0") + attribute(7, stats2)
    assert messages.read_queue(payload) == messages.Queue("plug", 5, 700, 2)


def test_reading_a_queue_without_statistics() -> None:
    assert messages.read_queue(_ROOT) == messages.Queue("", 0, 0, 0)


def test_reading_a_link() -> None:
    stats = struct.pack("=24Q", 12, 7, 0, 0, 0, 0, 1, *range(17))
    payload = (
        struct.pack("=BxHiII", 0, 1, 5, 1, 0)
        + attribute(3, b"kmi3.0\0")
        + attribute(18 | 0x8000, attribute(1, b"ifb\0"))
        + attribute(20, b"kemari:own:vif3.0\0")
        + attribute(23, stats)
    )
    assert messages.read_link(payload) == messages.Link(
        index=5, name="kmi3.0", kind="ifb", alias="kemari:own:vif3.0", up=True, underway=4
    )
