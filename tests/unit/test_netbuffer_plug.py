# SPDX-License-Identifier: Apache-2.0
"""The output buffer on a kernel in memory, with every part missing and every step the last one."""

from __future__ import annotations

import errno

import pytest

from netbuffer import plug, remains
from netbuffer.epochs import PlugAction, State
from netbuffer.errors import (
    BufferLost,
    EpochError,
    InterfaceBusy,
    InterfaceNotFound,
    Leftover,
    MissingKernelPart,
    NetlinkError,
    NetlinkTimeout,
)
from netbuffer.plug import OutputBuffer
from tests.unit.netbuffer_kernel import FakeKernel
from tests.unit.netbuffer_netns import add_link, own_network

VIF = "vif3.0"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    made = FakeKernel("eth0", VIF)
    monkeypatch.setattr(plug, "Netlink", lambda: made)
    return made


@pytest.fixture
def buffer(kernel: FakeKernel) -> OutputBuffer:
    made = OutputBuffer(VIF)
    made.setup()
    kernel.requests = 0
    return made


def is_clean(kernel: FakeKernel) -> bool:
    vif = kernel.by_name(VIF)
    names = [device.name for device in kernel.devices.values()]
    return names == ["eth0", VIF] and vif is not None and not vif.ingress and not vif.redirect


# ---- What leaves when ----


def test_frames_leave_by_epochs(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    kernel.send(VIF, 1, 2)
    assert buffer.close_epoch() == 1
    kernel.send(VIF, 3)
    assert kernel.out == []
    assert buffer.release_epoch() == 1
    assert kernel.out == [1, 2]
    assert buffer.close_epoch() == 2
    assert buffer.release_epoch() == 2
    assert kernel.out == [1, 2, 3]
    assert (buffer.closed_epoch, buffer.released_epoch) == (2, 2)


def test_closing_and_releasing_is_one_request_each(
    kernel: FakeKernel, buffer: OutputBuffer
) -> None:
    buffer.close_epoch()
    buffer.release_epoch()
    assert kernel.requests == 2


def test_frames_before_setup_and_after_teardown_pass(kernel: FakeKernel) -> None:
    kernel.send(VIF, 1)
    made = OutputBuffer(VIF)
    made.setup()
    kernel.send(VIF, 2)
    assert kernel.out == [1]
    made.close_epoch()
    kernel.send(VIF, 3)
    removal = made.teardown()
    kernel.send(VIF, 4)
    assert kernel.out == [1, 2, 3, 4]
    assert (removal.found, removal.released_packets, removal.dropped_packets) == (True, 2, 0)
    assert kernel.lost == []
    assert is_clean(kernel)


def test_teardown_without_release_drops(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    kernel.send(VIF, 1, 2)
    removal = buffer.teardown(release=False)
    assert (kernel.out, kernel.lost) == ([], [1, 2])
    assert (removal.released_packets, removal.dropped_packets) == (0, 2)
    assert is_clean(kernel)


def test_teardown_is_idempotent(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    assert buffer.teardown().found
    assert not buffer.teardown().found
    assert not OutputBuffer(VIF).teardown().found
    buffer.setup()
    assert buffer.state is State.HOLDING
    assert (buffer.closed_epoch, buffer.released_epoch) == (0, 0)
    assert not is_clean(kernel)


def test_release_all_and_hold(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    kernel.send(VIF, 1)
    buffer.close_epoch()
    kernel.send(VIF, 2)
    buffer.release_all()
    kernel.send(VIF, 3)
    assert kernel.out == [1, 2, 3]
    buffer.hold()
    kernel.send(VIF, 4)
    assert kernel.out == [1, 2, 3]
    assert buffer.close_epoch() == 2
    buffer.release_epoch()
    assert kernel.out == [1, 2, 3, 4]


def test_hold_strands_no_frame_that_could_not_leave_in_time(
    kernel: FakeKernel, buffer: OutputBuffer
) -> None:
    """A guest that sends faster than its host: at each try a frame is on its way."""
    buffer.release_all()
    kernel.requests = 0

    def send_late(number: int) -> None:
        # Each BUFFER of hold() finds a frame that was let go and has not left.
        ifb = kernel.by_name(buffer.ifb)
        if ifb is not None and ifb.plug is not None and number in (1, 3, 5):
            ifb.plug.queue.append(number)

    kernel.before = send_late
    buffer.hold()
    assert buffer.state is State.HOLDING
    assert buffer.stats().held_packets == 0
    assert kernel.out == [1, 3, 5]
    kernel.send(VIF, 99)
    buffer.close_epoch()
    buffer.release_epoch()
    assert kernel.out == [1, 3, 5, 99]


def test_overflow_is_counted_and_announced_by_the_high_water_mark(kernel: FakeKernel) -> None:
    made = OutputBuffer(VIF, limit_bytes=1000, high_water=4 * 1124)  # frames of 100 bytes
    made.setup()
    kernel.send(VIF, 1, 2, 3)
    assert not made.above_high_water(made.stats())
    kernel.send(VIF, 4)
    assert made.above_high_water(made.stats())
    kernel.send(VIF, *range(5, 16))
    stats = made.stats()
    assert (stats.held_packets, stats.dropped_packets) == (10, 5)
    assert (stats.held_bytes, stats.limit_bytes) == (1000, 1000)
    assert kernel.lost == [11, 12, 13, 14, 15]


# ---- Errors ----


@pytest.mark.parametrize(
    ("missing", "module"),
    [
        ("ifb", "ifb"),
        ("plug", "sch_plug"),
        ("ingress", "sch_ingress"),
        ("matchall", "cls_matchall"),
        ("mirred", "act_mirred"),
    ],
)
def test_a_missing_part_is_named_and_nothing_is_left(
    kernel: FakeKernel, missing: str, module: str
) -> None:
    kernel.missing = {missing}
    made = OutputBuffer(VIF)
    with pytest.raises(MissingKernelPart, match=rf"\(module {module}\), expected a kernel with"):
        made.setup()
    assert is_clean(kernel)
    kernel.missing = set()
    made.setup()
    assert made.state is State.HOLDING


def test_no_such_vif(kernel: FakeKernel) -> None:
    with pytest.raises(InterfaceNotFound, match=r"Network device vif9\.0 does not exist"):
        OutputBuffer("vif9.0").setup()
    assert is_clean(kernel)


def test_somebody_elses_filter_is_not_touched(kernel: FakeKernel) -> None:
    vif = kernel.by_name(VIF)
    assert vif is not None
    vif.ingress, vif.others = "clsact", ["flower"]
    with pytest.raises(InterfaceBusy, match=r"already has tc ingress filters \(flower\)"):
        OutputBuffer(VIF).setup()
    assert not plug.reclaim(VIF, release=True).found
    assert (vif.ingress, vif.others) == ("clsact", ["flower"])


@pytest.mark.parametrize("kind", ["ingress", "clsact"])
def test_somebody_elses_ingress_qdisc_stays(kernel: FakeKernel, kind: str) -> None:
    vif = kernel.by_name(VIF)
    assert vif is not None
    vif.ingress = kind
    made = OutputBuffer(VIF)
    made.setup()
    made.teardown()
    assert vif.ingress == kind
    assert not vif.redirect


def test_what_is_there_already_is_not_replaced(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    kernel.send(VIF, 1)
    with pytest.raises(Leftover, match=r"An output buffer for vif3\.0 exists already"):
        OutputBuffer(VIF).setup()
    assert buffer.stats().held_packets == 1


@pytest.mark.parametrize("call", ["close_epoch", "release_epoch", "release_all", "hold", "stats"])
def test_calls_before_setup(kernel: FakeKernel, call: str) -> None:
    with pytest.raises(EpochError, match="Output buffer is not set up and cannot"):
        getattr(OutputBuffer(VIF), call)()
    assert kernel.requests == 0


def test_a_second_epoch_never_reaches_the_kernel(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    buffer.close_epoch()
    with pytest.raises(EpochError):
        buffer.close_epoch()
    assert kernel.requests == 1


def test_a_buffer_taken_away_is_noticed(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    ifb = kernel.by_name(buffer.ifb)
    assert ifb is not None
    del kernel.devices[ifb.index]
    with pytest.raises(BufferLost, match=r"kmi3\.0 of vif3\.0 was removed or changed"):
        buffer.close_epoch()
    with pytest.raises(BufferLost):
        buffer.stats()
    kernel.send(VIF, 1)
    assert (kernel.out, kernel.lost) == ([], [1]), "not fail-safe"
    assert buffer.teardown().found
    assert is_clean(kernel)


def test_a_refusal_changes_nothing(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    def refuse(_number: int) -> None:
        raise NetlinkError("close", errno.EPERM)

    kernel.send(VIF, 1)
    kernel.before = refuse
    with pytest.raises(NetlinkError):
        buffer.close_epoch()
    assert (buffer.state, buffer.closed_epoch) == (State.HOLDING, 0)
    kernel.before = lambda _number: None
    buffer.close_epoch()
    buffer.release_epoch()
    assert kernel.out == [1]


@pytest.mark.parametrize("done", [True, False])
def test_a_lost_answer_leaves_only_what_is_right_in_any_case(
    kernel: FakeKernel, buffer: OutputBuffer, done: bool
) -> None:
    def lose(number: int) -> None:
        if done and number == 1:
            kernel.request(buffer._actions[PlugAction.BUFFER], "close")
        raise NetlinkTimeout("close", 1.0)

    kernel.send(VIF, 1)
    kernel.before = lose
    with pytest.raises(NetlinkTimeout):
        buffer.close_epoch()
    assert buffer.state is State.UNKNOWN
    kernel.before = lambda _number: None
    with pytest.raises(EpochError):
        buffer.release_epoch()
    assert kernel.out == []
    buffer.release_all()
    assert kernel.out == [1]
    buffer.teardown()
    assert is_clean(kernel)


@pytest.mark.parametrize("release", [True, False])
def test_the_vif_goes_while_the_buffer_is_taken_down(kernel: FakeKernel, release: bool) -> None:
    """A guest ends when it likes; teardown is what follows, at any point of it."""
    step = 0
    while True:
        step += 1
        kernel.out.clear()
        vif = kernel.by_name(VIF) or kernel.add(VIF)
        made = OutputBuffer(VIF)
        made.setup()
        kernel.send(VIF, 1)
        kernel.requests = 0

        def vanish(number: int, step: int = step, index: int = vif.index) -> None:
            if number == step:
                del kernel.devices[index]

        kernel.before = vanish
        removal = made.teardown(release=release)
        kernel.before = lambda _number: None
        assert removal.found
        assert kernel.out == ([1] if release else [])
        assert plug.leftovers() == []
        if kernel.by_name(VIF) is not None:
            break
    assert step > 4


@pytest.mark.parametrize("limit", [0, -1, 1 << 32])
def test_a_limit_that_the_kernel_cannot_have(limit: int) -> None:
    with pytest.raises(ValueError, match="limit_bytes is"):
        OutputBuffer(VIF, limit_bytes=limit)


# ---- What a killed daemon leaves ----


class Killed(BaseException):
    """Nothing that runs in the daemon notices it."""


@pytest.mark.parametrize("release_later", [True, False])
@pytest.mark.parametrize("phase", ["setup", "release", "drop"])
def test_killed_at_every_step(
    kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch, phase: str, release_later: bool
) -> None:
    fatal = 0
    while True:
        fatal += 1
        kernel.out.clear()
        kernel.lost.clear()
        dead = False

        def die(number: int, fatal: int = fatal) -> None:
            nonlocal dead
            # A dead process asks for nothing more, not even to clean up.
            dead = dead or number >= fatal
            if dead:
                raise Killed

        made = OutputBuffer(VIF)
        kernel.requests = 0
        try:
            if phase == "setup":
                kernel.before = die
            made.setup()
            kernel.send(VIF, 1, 2)
            kernel.requests = 0
            kernel.before = die
            if phase != "setup":
                made.teardown(release=phase == "release")
        except Killed:
            pass
        kernel.before = lambda _number: None
        left = plug.leftovers()
        assert all(found.vif == VIF for found in left)
        assert plug.reclaim(VIF, release=release_later).found == bool(left)
        assert is_clean(kernel), fatal
        assert plug.leftovers() == []
        assert not plug.reclaim(VIF, release=release_later).found
        assert sorted(kernel.out + kernel.lost) in ([], [1, 2]), "a frame is in neither place"
        if not dead:
            break
    assert fatal > 3


def test_what_is_held_can_be_listed(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    kernel.send(VIF, 1, 2, 3)
    assert plug.leftovers() == [remains.Remains(VIF, "kmi3.0", True, 3, 300)]


def test_a_filter_without_its_ifb_is_found(kernel: FakeKernel, buffer: OutputBuffer) -> None:
    ifb = kernel.by_name(buffer.ifb)
    assert ifb is not None
    del kernel.devices[ifb.index]
    assert plug.leftovers() == [remains.Remains(VIF, "", True, 0, 0)]
    assert plug.reclaim(VIF, release=True).found
    assert is_clean(kernel)


def test_an_ifb_whose_vif_is_gone_is_found(kernel: FakeKernel) -> None:
    for name, found in (("vif4.1", "vif4.1"), ("a-long-vif-name", "a-long-vif-name")):
        device = kernel.add(name)
        OutputBuffer(name).setup()
        del kernel.devices[device.index]
        assert [left.vif for left in plug.leftovers()] == [found]
        assert plug.reclaim(found, release=False).found
        assert is_clean(kernel)


def test_an_ifb_that_was_never_described_is_found(kernel: FakeKernel) -> None:
    name = remains.ifb_name("a-long-vif-name")
    kernel.add(name, "ifb")
    assert [left.vif for left in plug.leftovers()] == [name], "no such vif any more"
    assert plug.reclaim(name, release=True).found
    assert is_clean(kernel)


def test_devices_of_others_are_no_leftovers(kernel: FakeKernel) -> None:
    kernel.add("ifb0", "ifb")
    kernel.add("kmi-dummy", "dummy")
    assert plug.leftovers() == []


# ---- Names ----


@pytest.mark.parametrize(
    ("vif", "expected"),
    [
        ("vif3.0", "kmi3.0"),
        ("vif32751.255", "kmi32751.255"),
        ("vif3.0-emu", "kmi3.0-emu"),
        ("kmi3.0", "kmi3.0"),
    ],
)
def test_names(vif: str, expected: str) -> None:
    assert remains.ifb_name(vif) == expected


@pytest.mark.parametrize("vif", ["eth0", "web-frontend-0", "vif", "vif1", "vif32751.255-emu", "vé"])
def test_names_of_other_devices(vif: str) -> None:
    name = remains.ifb_name(vif)
    assert name.startswith("kmi-")
    assert len(name) == 15
    assert name != remains.ifb_name(vif + "x")


# ---- The kernel that this runs on ----


@own_network
def test_on_this_kernel_it_works_or_names_what_is_missing() -> None:
    """Whether this kernel has all parts or not, nothing is left behind."""
    add_link("vif3.0", "veth", peer="guest0")
    made = OutputBuffer("vif3.0")
    missing = ""
    try:
        made.setup()
    except MissingKernelPart as err:
        missing = err.module
    assert missing in ("", "ifb", "sch_plug", "sch_ingress", "cls_matchall", "act_mirred")
    if not missing:
        made.close_epoch()
        made.release_epoch()
        assert made.teardown().found
    assert plug.leftovers() == []
    assert not plug.reclaim("vif3.0", release=True).found
