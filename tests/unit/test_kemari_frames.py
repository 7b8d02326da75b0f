# SPDX-License-Identifier: Apache-2.0
"""The seam to netbuffer: several interfaces are one output; trouble of one is not the others'."""

from __future__ import annotations

import asyncio
import os
import select
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from checkpoint.driver import Nic
from kemari.frames import FrameNetwork, FrameOutput
from netbuffer.errors import BacklogError, BufferLost, InterfaceNotFound

NICS = [Nic(number, f"vif3.{number}", f"00:16:3e:00:00:0{number}", "br0") for number in (0, 1)]


@dataclass
class Stats:
    """What the fake says that it holds."""

    memory_bytes: int


class FakeBuffer:
    """Notes what is asked of it; fails where told to."""

    calls: list[tuple[str, str]]
    broken: set[tuple[str, str]]
    held: dict[str, int]

    def __init__(self, vif: str, *, limit_bytes: int, high_water: int) -> None:
        assert limit_bytes > high_water
        self.vif = vif
        self.high_water = high_water

    def _call(self, name: str) -> None:
        self.calls.append((name, self.vif))
        if (name, self.vif) in self.broken:
            raise BufferLost(f"{name} of {self.vif}")

    def setup(self) -> None:
        """As the real one."""
        self._call("setup")

    def close_epoch(self) -> None:
        """As the real one."""
        self._call("close")

    def release_epoch(self) -> None:
        """As the real one."""
        self._call("release")

    def release_all(self) -> None:
        """As the real one."""
        self._call("release_all")

    def teardown(self, *, release: bool) -> None:
        """As the real one."""
        self._call("teardown" if release else "drop")

    def stats(self) -> Stats:
        """As the real one."""
        return Stats(self.held.get(self.vif, 0))

    def above_high_water(self, stats: Stats) -> bool:
        """As the real one."""
        return stats.memory_bytes >= self.high_water


class FakeTap:
    """A pipe in place of a packet socket."""

    opened: dict[str, FakeTap]

    def __init__(self, vif: str) -> None:
        self.read, self.write = os.pipe()
        os.set_blocking(self.read, False)
        self.opened[vif] = self

    def fileno(self) -> int:
        """As the real one."""
        return self.read

    def drain(self) -> int:
        """As the real one."""
        try:
            return len(os.read(self.read, 100))
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """As the real one."""
        os.close(self.read)
        os.close(self.write)


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> FrameOutput:
    FakeBuffer.calls, FakeBuffer.broken, FakeBuffer.held = [], set(), {}
    FakeTap.opened = {}
    monkeypatch.setattr("kemari.frames.OutputBuffer", FakeBuffer)
    monkeypatch.setattr("kemari.frames.Tap", FakeTap)
    return FrameOutput(NICS, 1 << 20)


def test_every_step_is_taken_on_every_interface(output: FrameOutput) -> None:
    output.setup()
    output.close_epoch()
    output.release_epoch()
    output.teardown(drop=False)
    names = [name for name, _ in FakeBuffer.calls]
    assert names == ["setup"] * 2 + ["close"] * 2 + ["release"] * 2 + ["teardown"] * 2


def test_a_frame_on_any_interface_wakes(output: FrameOutput) -> None:
    output.setup()
    poll = select.poll()
    poll.register(output.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    os.write(FakeTap.opened["vif3.1"].write, b"xy")
    assert poll.poll(1000)
    assert output.drain() == 2
    assert poll.poll(0) == []
    output.teardown(drop=True)
    assert FakeBuffer.calls[-1] == ("drop", "vif3.1")


def test_full_when_one_interface_is(output: FrameOutput) -> None:
    assert not output.full()
    FakeBuffer.held["vif3.1"] = 1 << 19
    assert output.full()


def test_a_setup_that_fails_leaves_nothing(output: FrameOutput) -> None:
    FakeBuffer.broken.add(("setup", "vif3.1"))
    with pytest.raises(BufferLost):
        output.setup()
    assert ("teardown", "vif3.0") in FakeBuffer.calls
    output.teardown(drop=False)


@pytest.mark.parametrize("call", ["release_all", "teardown"])
def test_one_broken_interface_does_not_keep_the_others(output: FrameOutput, call: str) -> None:
    output.setup()
    FakeBuffer.broken.add((call, "vif3.0"))
    with pytest.raises(BufferLost, match=r"vif3\.0"):
        output.release_all() if call == "release_all" else output.teardown(drop=False)
    assert (call, "vif3.1") in FakeBuffer.calls


def test_a_guest_without_interfaces_has_no_output() -> None:
    output = FrameOutput([], 1 << 20)
    output.setup()
    output.close_epoch()
    output.release_epoch()
    assert output.drain() == 0
    assert not output.full()
    output.teardown(drop=False)
    output.teardown(drop=False)


def test_each_address_is_announced_by_its_bridge(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[Any, ...]] = []

    async def announce(interface: str, mac: str, *, port: str) -> int:
        said.append((interface, mac, port))
        return 1

    monkeypatch.setattr("kemari.frames.announce", announce)
    alone = Nic(2, "vif3.2", "00:16:3e:00:00:02", "")
    asyncio.run(FrameNetwork().announce([*NICS, alone]))
    assert said == [(nic.bridge, nic.mac, nic.vif) for nic in NICS]


class FakeBacklog:
    """Says what is done; the one of ``vif3.1`` fails at ``breaks``."""

    calls: ClassVar[list[tuple[str, ...]]] = []
    breaks: ClassVar[str] = ""

    def __init__(self, bridge: str, mac: str) -> None:
        self._mac = mac
        self._do("open", bridge, mac)

    def _do(self, call: str, *words: str) -> None:
        self.calls.append((call, *words))
        if call == self.breaks and self._mac == NICS[1].mac:
            raise BacklogError("does not go")

    def deliver(self, vif: str) -> int:
        self._do("deliver", vif)
        return 2

    def close(self) -> None:
        self._do("close", self._mac)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> type[FakeBacklog]:
    monkeypatch.setattr("kemari.frames.Backlog", FakeBacklog)
    FakeBacklog.calls, FakeBacklog.breaks = [], ""
    return FakeBacklog


def test_what_came_meanwhile_is_kept_by_each_bridge(kept: type[FakeBacklog]) -> None:
    alone = Nic(2, "vif3.2", "00:16:3e:00:00:02", "")
    backlog = FrameNetwork().backlog([*NICS, alone])
    assert kept.calls == [("open", nic.bridge, nic.mac) for nic in NICS]
    kept.calls.clear()
    assert backlog.deliver() == 2 * len(NICS)
    assert kept.calls == [("deliver", nic.vif) for nic in NICS]


def test_one_backlog_that_fails_does_not_cost_the_others(kept: type[FakeBacklog]) -> None:
    kept.breaks = "open"
    with pytest.raises(BacklogError):
        FrameNetwork().backlog(NICS)
    assert kept.calls[-1] == ("close", NICS[0].mac)
    kept.breaks = "deliver"
    backlog = FrameNetwork().backlog(NICS)
    kept.calls.clear()
    with pytest.raises(BacklogError):
        backlog.deliver()
    assert kept.calls == [("deliver", nic.vif) for nic in NICS]


def test_nothing_is_left_of_a_device_that_never_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(vif: str, *, release: bool) -> Any:
        raise InterfaceNotFound(vif)

    monkeypatch.setattr("netbuffer.plug.reclaim", gone)
    with pytest.raises(InterfaceNotFound):
        FrameNetwork().reclaim("vif9.0", release=True)
