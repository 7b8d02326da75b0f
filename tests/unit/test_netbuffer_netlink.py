# SPDX-License-Identifier: Apache-2.0
"""The netlink socket, against the real kernel where it can be asked without privileges."""

from __future__ import annotations

import errno
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest

from netbuffer import messages
from netbuffer.errors import NetlinkError, NetlinkTimeout
from netbuffer.netlink import Netlink, attributes, text

#: Of each thread: enough for two threads to come between one another many times.
REQUESTS = 2000


def test_the_loopback_device_is_found_by_name() -> None:
    netlink = Netlink()
    link = messages.read_link(netlink.get(messages.link_get("lo"), "find lo"))
    netlink.close()
    assert (link.index, link.name, link.kind) == (1, "lo", "")


def test_a_refusal_says_what_was_asked_for() -> None:
    netlink = Netlink()
    with pytest.raises(NetlinkError, match="The kernel refused to find nothing0") as caught:
        netlink.get(messages.link_get("nothing0"), "find nothing0")
    netlink.close()
    assert caught.value.errno == errno.ENODEV


def test_the_kernels_own_words_are_passed_on() -> None:
    netlink = Netlink()
    with pytest.raises(NetlinkError) as caught:
        netlink.request(messages.link_delete(0x7FFFFFF0), "remove a device")
    netlink.close()
    # Without CAP_NET_ADMIN the kernel says EPERM and nothing more.
    assert caught.value.errno in (errno.ENODEV, errno.EPERM)
    assert str(caught.value).startswith("The kernel refused to remove a device: ")


def test_a_dump_is_complete_and_ends() -> None:
    netlink = Netlink()
    for _ in range(3):
        names = [
            messages.read_link(answer).name for answer in netlink.dump(messages.link_dump(), "")
        ]
        assert "lo" in names
    netlink.close()


def test_a_kernel_that_does_not_answer_is_a_timeout() -> None:
    netlink = Netlink(timeout=0.05)
    silent = messages.link_get("lo")
    # A request without NLM_F_REQUEST is ignored (netlink_rcv_skb), so no answer ever comes.
    struct.pack_into("=H", silent, 6, 0)
    with pytest.raises(NetlinkTimeout, match="did not answer the request to find lo"):
        netlink.get(silent, "find lo")
    # The socket is of use afterwards.
    link = messages.read_link(netlink.get(messages.link_get("lo"), "find lo"))
    netlink.close()
    assert link.name == "lo"


def test_a_late_answer_is_not_taken_for_the_next_one() -> None:
    netlink = Netlink()
    netlink._send(messages.link_get("nothing0"))  # its answer, an error, stays in the socket
    link = messages.read_link(netlink.get(messages.link_get("lo"), "find lo"))
    netlink.close()
    assert link.name == "lo"


def test_each_of_two_threads_gets_its_own_answers() -> None:
    netlink = Netlink(timeout=5)

    def ask_of_lo() -> set[str]:
        return {
            messages.read_link(netlink.get(messages.link_get("lo"), "find lo")).name
            for _ in range(REQUESTS)
        }

    def ask_of_nothing() -> None:
        for _ in range(REQUESTS):
            with pytest.raises(NetlinkError):
                netlink.request(messages.link_get("nothing0"), "find nothing0")

    with ThreadPoolExecutor(2) as threads:
        found, refused = threads.submit(ask_of_lo), threads.submit(ask_of_nothing)
        assert found.result() == {"lo"}
        refused.result()
    netlink.close()


def test_attributes_that_do_not_fit_end_the_list() -> None:
    whole = struct.pack("=HH4s", 8, 1, b"abc\0")
    assert {k: bytes(v) for k, v in attributes(whole).items()} == {1: b"abc\0"}
    assert attributes(whole + struct.pack("=HH", 100, 2)).keys() == {1}
    assert attributes(whole + struct.pack("=HH", 3, 2)).keys() == {1}
    assert attributes(whole + b"\x05").keys() == {1}
    assert attributes(b"") == {}


def test_text() -> None:
    assert text(memoryview(b"plug\0")) == "plug"
    assert text(None) == ""
