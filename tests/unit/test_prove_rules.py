# SPDX-License-Identifier: Apache-2.0
"""Rules that only a peer that has gone astray would put to the test."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from checkpoint.lifeline import Owner
from checkpoint.sender import Sender
from kemari.config import Options
from kemari.protection import Protection
from tests.prove.machine import GUEST
from tests.prove.world import World


def _in(world: World, side: str, work: Any, limit: float = 20.0) -> Any:
    """Run a coroutine in a daemon; its result, or the error that it raised."""
    came: list[Any] = []

    async def keep() -> None:
        try:
            came.append(await work)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            came.append(error)

    process = world.machines[side].process
    assert process is not None
    process.create_task(keep())
    assert world.run(lambda: bool(came), limit), "no answer"
    return came[0]


def _protect_as(world: World, generation: int) -> Any:
    """What a standby answers to a primary that begins with this generation."""
    daemon = world.a.daemon
    assert daemon is not None

    async def ask() -> Any:
        addresses = daemon.host.config.resolve_peer("b")
        protection = Protection(daemon.host, daemon.peers, GUEST, addresses, Options())
        source = protection._open_source()
        link, _ = await daemon.host.connect_any(addresses, "replicate")
        sender = Sender(link)
        try:
            return await sender.prepare(source.description, generation, asdict(Options()))
        finally:
            await sender.close()

    return _in(world, "a", ask())


def test_a_generation_that_is_over_is_refused() -> None:
    with World(0) as world:
        world.protect()
        world.answers(2)
        answer = world.a.ask("stop", domain=GUEST)
        world.run(lambda: answer.done, 20)
        error = _protect_as(world, 1)
        assert "generation 1 of web is over; 1 is known on b" in str(error)
        assert _protect_as(world, 2)["host"] == "b"


def test_a_question_about_an_old_generation_leaves_a_new_one_alone() -> None:
    with World(0) as world:
        world.protect()
        world.answers(2)
        answer = world.a.ask("stop", domain=GUEST)
        world.run(lambda: answer.done, 20)
        world.wait(1.0)
        world.protect()
        world.answers(2)
        assert world.b.daemon is not None
        assert world.a.guest is not None
        uuid = world.a.guest.description.uuid
        said = _in(world, "b", world.b.daemon.stand_down(uuid, 1))
        assert said == Owner(uuid, 2, "standby")
        assert world.b.ready
        world.a.power_cut()
        assert world.answers(3)
        assert world.b.guest is not None
