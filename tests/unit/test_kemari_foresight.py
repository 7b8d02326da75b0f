# SPDX-License-Identifier: Apache-2.0
"""What a standby finds out while it suspects a death."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any, cast

from checkpoint.driver import Shell
from checkpoint.incoming import Committed
from kemari.foresight import Foresight
from kemari.host import Host
from kemari.liveness import suspected


class LookingShell:
    """Notes what it is asked, and takes as long as it is told to."""

    def __init__(self, problem: Exception | None = None) -> None:
        self.looks: list[bytes] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self._problem = problem

    def foresee(self, state: bytes) -> None:
        self.looks.append(state)
        assert self.go_on.wait(60)
        if self._problem:
            raise self._problem


def committed(epoch: int) -> Committed:
    return Committed(epoch, b"state of %d" % epoch, 1, 1, 0.0)


class Ground:
    """A host of which only tasks are needed, and a guest that it stands by for."""

    def __init__(self, shell: LookingShell) -> None:
        self.shell = shell
        self.tasks: list[asyncio.Task[None]] = []
        host: Any = SimpleNamespace(spawn=self._spawn)
        self._foresight = Foresight(cast(Host, host))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        self.tasks.append(asyncio.create_task(work, name=name))
        return self.tasks[-1]

    def look(self, epoch: Committed) -> None:
        self._foresight.look("web", cast(Shell, self.shell), epoch)

    async def rest(self) -> None:
        await asyncio.gather(*self.tasks)


def test_each_epoch_is_looked_at_once() -> None:
    async def scenario() -> None:
        shell = LookingShell()
        ground = Ground(shell)
        first, second = committed(1), committed(2)
        for epoch in (first, first, second, second):
            ground.look(epoch)
            await ground.rest()
        assert shell.looks == [first.state, second.state]

    asyncio.run(scenario())


def test_the_base_copy_cannot_be_run_and_is_not_looked_at() -> None:
    async def scenario() -> None:
        shell = LookingShell()
        Ground(shell).look(committed(0))
        assert shell.looks == []

    asyncio.run(scenario())


def test_one_look_at_a_time_and_the_last_epoch_after_it() -> None:
    async def scenario() -> None:
        shell = LookingShell()
        shell.go_on.clear()
        ground = Ground(shell)
        first, second = committed(1), committed(2)
        ground.look(first)
        ground.look(second)
        shell.go_on.set()
        await ground.rest()
        ground.look(second)
        await ground.rest()
        assert shell.looks == [first.state, second.state]

    asyncio.run(scenario())


def test_a_look_that_fails_is_not_repeated_and_troubles_nobody() -> None:
    async def scenario() -> None:
        shell = LookingShell(ValueError("half of a list"))
        ground = Ground(shell)
        first = committed(1)
        ground.look(first)
        await ground.rest()
        ground.look(first)
        await ground.rest()
        assert shell.looks == [first.state]

    asyncio.run(scenario())


def test_two_of_five_beats_missed_are_a_suspicion() -> None:
    assert not suspected(0.39, 1.0)
    assert suspected(0.4, 1.0)
    assert suspected(2.0, 5.0)
