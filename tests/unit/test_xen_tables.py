# SPDX-License-Identifier: Apache-2.0
"""Event channels, mappings and the calls on one domain, against the fake libraries."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from checkpoint.driver import PAGE_SIZE
from checkpoint.errors import HypervisorError
from checkpoint.guest.memory import GuestMemoryError
from checkpoint.xen import control
from checkpoint.xen.control import Domain
from checkpoint.xen.mapping import GrantFrames, Mapping, PresentRam
from checkpoint.xen.moment import Moment, Resumption
from checkpoint.xen.state import EventChannel
from tests.unit.xen_fakes import FakeXen, save_file

DOMID = 5


@pytest.fixture
def xen() -> Any:
    """A host with one guest of 600 pages, of which frames 2 and 3 are holes."""
    made = FakeXen()
    made.add(DOMID, 600, special=(0xFEFFC,), holes=(2, 3))
    return made


def tables_of(xen: Any) -> Moment:
    """What reads the guest's tables."""
    return Moment(DOMID, 4096, xen)


# ---- Section: a moment ----


def test_a_moment_is_one_trip_in_which_the_domain_stops_first(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.ports = {1: (2, 0, 0x7FF1, 77)}
    guest.context = save_file((0, 1))
    paused: list[int] = []
    xen.before["xc_domain_hvm_getcontext"] = lambda *_: paused.append(guest.pauses)
    moment = Moment(DOMID, len(guest.context), xen)
    xen.calls.clear()
    moment.take(pause=True)
    assert moment.context() == guest.context
    assert moment.tables() == ([EventChannel(1, 2, 0, 0x7FF1)], 1)
    assert xen.calls == ["xencall2", "xc_domain_pause", "xc_domain_hvm_getcontext"]
    assert (paused, guest.pauses) == ([1], 1)
    guest.context = save_file((0,))  # a vCPU went down: fewer records
    moment.take(pause=False)
    assert moment.context() == guest.context
    assert guest.pauses == 1
    moment.close()
    assert not xen.buffers


def test_a_domain_that_xen_does_not_pause(xen: Any) -> None:
    moment = tables_of(xen)
    xen.failing["xc_domain_pause"] = (0, errno.EBUSY)
    with pytest.raises(HypervisorError) as caught:
        moment.take(pause=True)
    assert (caught.value.call, caught.value.errno) == ("XEN_DOMCTL_pausedomain", errno.EBUSY)
    moment.close()


def test_a_context_that_xen_does_not_give(xen: Any) -> None:
    xen.domains[DOMID].context = save_file((0, 1))
    moment = Moment(DOMID, 100, xen)
    moment.take(pause=True)
    with pytest.raises(HypervisorError) as caught:
        moment.context()
    assert (caught.value.call, caught.value.errno) == ("XEN_DOMCTL_gethvmcontext", errno.ENOSPC)
    assert moment.tables() == ([], 1)
    moment.close()


def test_a_release_that_is_not_the_running_one_is_told_by_its_control_calls(xen: Any) -> None:
    xen.release.domctl += 1
    moment = tables_of(xen)
    xen.release.domctl -= 1
    with pytest.raises(HypervisorError) as caught:
        moment.take(pause=True)
    assert caught.value.errno == errno.EACCES
    moment.close()


def test_a_table_that_grew_is_read_to_its_end_while_the_domain_stays_paused(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.ports = {200: (5, 0, 0, 0)}
    moment = tables_of(xen)
    moment.take(pause=True)
    assert [event.port for event in moment.tables()[0]] == [200]
    assert guest.pauses == 1
    moment.take(pause=False)
    assert [event.port for event in moment.tables()[0]] == [200]
    moment.close()
    assert not xen.buffers


def test_no_room_for_a_table_that_grew(xen: Any) -> None:
    xen.domains[DOMID].ports = {200: (5, 0, 0, 0)}
    moment = tables_of(xen)
    xen.failing["xencall_alloc_buffer_pages"] = (0, errno.ENOMEM)
    for _ in range(2):
        with pytest.raises(HypervisorError, match="xencall_alloc_buffer_pages"):
            moment.read_tables()
    xen.failing.clear()
    assert [event.port for event in moment.read_tables()[0]] == [200]
    moment.close()
    assert not xen.buffers


# ---- Section: the way back ----


def test_a_domain_is_marked_and_let_go_in_one_trip(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.logging, guest.pauses = True, 1
    resumption = Resumption(DOMID, 7, xen)
    xen.calls.clear()
    for _ in range(2):
        guest.logged.clear()
        resumption.make()
        resumption.check()
        assert (guest.pauses, guest.logged) == (0, {7})
        guest.pauses = 1
    assert xen.calls == 2 * ["xencall2", "xendevicemodel_modified_memory", "xc_domain_unpause"]
    resumption.close()
    assert not xen.buffers


def test_a_domain_that_xen_does_not_let_go(xen: Any) -> None:
    xen.domains[DOMID].pauses = 1
    resumption = Resumption(DOMID, 7, xen)
    xen.failing["xc_domain_unpause"] = (0, errno.EBUSY)
    with pytest.raises(HypervisorError) as caught:
        resumption.make()
    assert (caught.value.call, caught.value.errno) == ("XEN_DOMCTL_unpausedomain", errno.EBUSY)
    resumption.close()


def test_a_mark_that_xen_does_not_take_does_not_keep_the_domain_paused(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.pauses = 1
    resumption = Resumption(DOMID, 7, xen)
    xen.failing["xendevicemodel_modified_memory"] = (0, errno.EFAULT)
    resumption.make()
    assert guest.pauses == 0
    with pytest.raises(HypervisorError, match="XEN_DMOP_modified_memory"):
        resumption.check()
    resumption.close()


# ---- Section: tables ----


def test_what_xen_tells_of_each_kind_of_port(xen: Any) -> None:
    xen.domains[DOMID].ports = {
        1: (2, 0, 0x7FF1, 77),
        2: (1, 1, 9, 0xFFFF),
        3: (4, 1, 13, 0),
        5: (5, 1, 0, 0),
    }
    xen.domains[DOMID].grant_frames = 4
    tables = tables_of(xen)
    assert tables.read_tables() == (
        [
            EventChannel(1, 2, 0, 0x7FF1),
            EventChannel(2, 1, 1, 9),
            EventChannel(3, 4, 1, 13),
            EventChannel(5, 5, 1, 0),
        ],
        4,
    )
    tables.close()
    tables.close()
    assert not xen.buffers


@pytest.mark.parametrize("bound", [1, 31, 32, 63, 64, 65, 130, 1000])
def test_a_table_with_closed_ports_in_it_is_read_to_its_end(xen: Any, bound: int) -> None:
    guest = xen.domains[DOMID]
    closed = {31, 63, 64, 128} - {bound}
    guest.ports = {port: (5, 0, 0, 0) for port in range(1, bound + 1) if port not in closed}
    tables = tables_of(xen)
    for _ in range(2):
        events, frames = tables.read_tables()
        assert [event.port for event in events] == sorted(guest.ports)
        assert frames == 1
    tables.close()
    assert not xen.buffers


def test_each_read_is_one_multicall(xen: Any) -> None:
    xen.domains[DOMID].ports = dict.fromkeys(range(1, 40), (5, 0, 0, 0))
    tables = tables_of(xen)
    tables.read_tables()
    assert xen.calls.count("xencall2") == 1
    tables.close()


def test_a_port_that_changed_is_seen_and_an_unchanged_table_is_the_same_object(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.ports = {1: (1, 0, 0, 0)}
    tables = tables_of(xen)
    first, _ = tables.read_tables()
    assert tables.read_tables()[0] is first
    guest.ports[1] = (1, 1, 0, 0)
    assert tables.read_tables()[0] == [EventChannel(1, 1, 1, 0)]
    guest.grant_frames = 9
    assert tables.read_tables()[1] == 9
    tables.close()


def test_more_ports_than_can_be_moved(xen: Any) -> None:
    xen.domains[DOMID].ports = {5000: (5, 0, 0, 0)}
    tables = tables_of(xen)
    with pytest.raises(HypervisorError, match="EVTCHNOP_status") as caught:
        tables.read_tables()
    assert caught.value.errno == errno.E2BIG
    tables.close()


def test_a_port_that_xen_itself_listens_to_is_not_taken_for_a_closed_one(xen: Any) -> None:
    xen.domains[DOMID].ports = {1: (5, 0, 0, 0), 2: (-1, 0, 0, 0)}
    tables = tables_of(xen)
    with pytest.raises(HypervisorError) as caught:
        tables.read_tables()
    assert (caught.value.call, caught.value.errno) == ("EVTCHNOP_status", errno.EACCES)
    tables.close()


def test_a_domain_that_vanished_has_no_tables(xen: Any) -> None:
    tables = tables_of(xen)
    del xen.domains[DOMID]
    with pytest.raises(HypervisorError):
        tables.read_tables()
    xen.failing["xencall2"] = (0, errno.EFAULT)
    with pytest.raises(HypervisorError) as caught:
        tables.read_tables()
    assert (caught.value.call, caught.value.errno) == ("multicall", errno.EFAULT)
    tables.close()


def test_no_room_for_the_tables(xen: Any) -> None:
    xen.failing["xencall_alloc_buffer_pages"] = (0, errno.ENOMEM)
    with pytest.raises(HypervisorError, match="xencall_alloc_buffer_pages"):
        tables_of(xen)


# ---- Section: mappings ----


def test_a_mapping_shows_the_guests_memory_frame_by_frame(xen: Any) -> None:
    guest = xen.domains[DOMID]
    frames = [0xFEFFC, 599, 0]
    for gfn in frames:
        guest.write(gfn, f"frame {gfn}".encode())
    mapping = Mapping(DOMID, frames, libs=xen)
    for index, gfn in enumerate(frames):
        assert bytes(mapping.page(index)).startswith(f"frame {gfn}".encode())
    guest.write(599, b"later")
    assert bytes(mapping.page(1)[:5]) == b"later"
    assert mapping.view.readonly
    mapping.close()
    mapping.close()
    assert not xen.mapped


def test_a_writable_mapping_writes_the_guests_memory(xen: Any) -> None:
    mapping = Mapping(DOMID, [10], writable=True, libs=xen)
    mapping.view[100:103] = b"xyz"
    assert bytes(xen.domains[DOMID].page(10)[100:103]) == b"xyz"
    mapping.close()


def test_large_mappings_are_made_in_pieces_that_lie_side_by_side(xen: Any) -> None:
    guest = xen.domains[DOMID]
    guest.write(511, b"first piece")
    guest.write(512, b"second piece")
    mapping = Mapping(DOMID, range(600), allow_holes=True, libs=xen)
    assert xen.calls.count("xenforeignmemory_map2") == 2
    assert mapping.holes == [2, 3]
    assert bytes(mapping.page(511)[:5]) == b"first"
    assert bytes(mapping.page(512)[:6]) == b"second"
    mapping.close()
    assert not xen.mapped


def test_what_is_left_out_is_no_memory_of_the_guest(xen: Any) -> None:
    mapping = Mapping(
        DOMID, range(600), writable=True, allow_holes=True, left_out=range(512, 1024), libs=xen
    )
    assert xen.calls.count("xenforeignmemory_map2") == 1
    assert mapping.holes == [2, 3, *range(512, 600)]
    mapping.page(512)[:] = b"x" * PAGE_SIZE
    assert bytes(xen.domains[DOMID].page(512)) == bytes(PAGE_SIZE)
    mapping.close()
    assert not xen.mapped


def test_a_hole_is_an_error_where_none_is_expected(xen: Any) -> None:
    with pytest.raises(HypervisorError, match=r"guest frame 0x2\)") as caught:
        Mapping(DOMID, range(600), libs=xen)
    assert caught.value.errno == errno.EINVAL
    assert not xen.mapped


@pytest.mark.parametrize("works", [0, 1])
def test_a_mapping_that_xen_refuses_leaves_nothing(xen: Any, works: int) -> None:
    xen.failing["xenforeignmemory_map2"] = (works, errno.ENOMEM)
    with pytest.raises(HypervisorError, match="600 frames of domain 5") as caught:
        Mapping(DOMID, range(600), allow_holes=True, libs=xen)
    assert caught.value.errno == errno.ENOMEM
    assert not xen.mapped


def test_present_ram_reads_all_but_holes(xen: Any) -> None:
    xen.domains[DOMID].write(1, b"edge", PAGE_SIZE - 4)
    xen.domains[DOMID].write(4, b"behind")
    mapping = Mapping(DOMID, range(600), writable=True, allow_holes=True, libs=xen)
    ram = PresentRam(mapping)
    assert ram.read(2 * PAGE_SIZE - 4, 4) == b"edge"
    assert ram.read(4 * PAGE_SIZE, 6) == b"behind"
    assert ram.read(2 * PAGE_SIZE, 0) == b""
    ram.write(4 * PAGE_SIZE, b"BE")
    assert ram.read(4 * PAGE_SIZE, 3) == b"BEh"
    for pa, length in ((2 * PAGE_SIZE - 4, 5), (4 * PAGE_SIZE - 1, 2), (0, 600 * PAGE_SIZE)):
        with pytest.raises(GuestMemoryError, match="hole"):
            ram.read(pa, length)
        with pytest.raises(GuestMemoryError, match="hole"):
            ram.write(pa, bytes(length))
    for pa, length in ((-1, 1), (600 * PAGE_SIZE, 1), (4 * PAGE_SIZE, 1 << 60)):
        with pytest.raises(GuestMemoryError, match="outside"):
            ram.read(pa, length)
    mapping.close()


def test_the_grant_table_is_mapped_as_a_resource(xen: Any) -> None:
    xen.domains[DOMID].grant(513, 0x1234, 0x11)
    frames = GrantFrames(DOMID, 2, libs=xen)
    assert struct.unpack_from("<HHI", frames.view, 513 * 8) == (0x11, 0, 0x1234)
    assert frames.view.readonly
    frames.close()
    frames.close()
    assert not xen.resources
    xen.failing["xenforeignmemory_map_resource"] = (0, errno.EPERM)
    with pytest.raises(HypervisorError, match="grant table of domain 5"):
        GrantFrames(DOMID, 2, libs=xen)


# ---- Section: one domain ----


def test_information_on_a_domain(xen: Any) -> None:
    info = Domain(DOMID, xen).info()
    assert info is not None
    assert (info.domid, info.pages, info.vcpus, info.shared_info_gfn) == (DOMID, 599, 2, 0xABC)
    assert (info.hvm, info.hap, info.paused, info.dying, info.shutdown) == (
        True, True, False, False, False,
    )  # fmt: skip
    Domain(DOMID, xen).pause()
    paused = Domain(DOMID, xen).info()
    assert paused is not None
    assert paused.paused


def test_xen_answers_for_the_next_domain_when_there_is_none_of_that_number(xen: Any) -> None:
    assert Domain(DOMID - 1, xen).info() is None
    assert Domain(DOMID + 1, xen).info() is None
    xen.failing["xc_domain_getinfolist"] = (0, errno.EPERM)
    with pytest.raises(HypervisorError):
        Domain(DOMID, xen).info()


def test_context_goes_in_and_out(xen: Any) -> None:
    domain = Domain(DOMID, xen)
    xen.domains[DOMID].context = save_file((0, 1))
    assert domain.get_context() == save_file((0, 1))
    xen.domains[DOMID].context = save_file((0,))  # a vCPU went down: fewer records
    assert domain.get_context() == save_file((0,))
    assert xen.calls.count("xc_domain_hvm_getcontext") == 4
    domain.set_context(save_file((1,)))
    assert xen.domains[DOMID].context == save_file((1,))


def test_parameters_clock_and_policy(xen: Any) -> None:
    domain = Domain(DOMID, xen)
    domain.set_param(17, 1 << 60)
    assert domain.get_param(17) == 1 << 60
    tsc = domain.tsc_info()
    assert (tsc.mode, tsc.nsec, tsc.khz, tsc.incarnation) == (2, 123, 2_000_000, 1)
    cpuid, msrs = domain.cpu_policy()
    assert struct.unpack("<12I", cpuid) == (7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9)
    assert struct.unpack("<IIQ", msrs) == (0xCE, 0, 1 << 40)
    assert not xen.buffers
    assert domain.max_gfn() == 0xFEFFC


@pytest.mark.parametrize("step", ["xc_cpu_policy_get_domain", "xc_cpu_policy_serialise"])
def test_a_policy_that_cannot_be_read_is_given_back(xen: Any, step: str) -> None:
    xen.failing[step] = (0, errno.ENOBUFS)
    with pytest.raises(HypervisorError, match=step):
        Domain(DOMID, xen).cpu_policy()
    assert not xen.buffers


@pytest.mark.parametrize(
    "call",
    [
        lambda domain: domain.pause(),
        lambda domain: domain.unpause(),
        lambda domain: domain.max_gfn(),
        lambda domain: domain.get_context(),
        lambda domain: domain.set_context(b"1234"),
        lambda domain: domain.get_param(1),
        lambda domain: domain.set_param(1, 2),
        lambda domain: domain.add_to_physmap(0, 0, 5),
        lambda domain: domain.tsc_info(),
        lambda domain: domain.cpu_policy(),
    ],
)
def test_each_refusal_names_its_call(xen: Any, call: Any) -> None:
    domain = Domain(DOMID, xen)
    names = [name for name in dir(FakeXen) if name.startswith("_xc_")]
    xen.failing = {name[1:]: (0, errno.EBUSY) for name in names}
    with pytest.raises(HypervisorError, match=r"^xc_\w+.* failed: ") as caught:
        call(domain)
    assert caught.value.errno == errno.EBUSY
    assert caught.value.call == xen.calls[-1]


def test_the_host(xen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "libraries", lambda: xen)
    monkeypatch.setattr(control, "lowlevel_xc", lambda: xen)
    xen.add(9, 10)
    xen.add(2, 10).flags |= 1
    assert control.list_domids() == [DOMID, 9]  # number 2 is dying
    assert control.host_khz() == 2_000_000
    assert control.free_pages() == xen.free_pages + 30


def test_the_memory_that_the_guest_has_is_asked_for_in_the_same_multicall(xen: Any) -> None:
    tables = tables_of(xen)
    tables.read_tables()
    had = tables.pages
    assert had == len(xen.domains[DOMID].places)
    xen.domains[DOMID].extra_pages = 3
    tables.read_tables()
    assert tables.pages == had + 3
    assert xen.calls.count("xencall2") == 2
    tables.close()
