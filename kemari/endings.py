# SPDX-License-Identifier: Apache-2.0
"""How the protection of a guest ends on the host that ran it."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, Final

from checkpoint.driver import Source
from checkpoint.faultpoints import reach
from kemari.config import Address
from kemari.epoch import LetGoReason
from kemari.host import Host
from kemari.ledger import Record, Role
from kemari.output import Output
from kemari.peers import Answer, Peers
from kemari.stragglers import owing

log = logging.getLogger(__name__)

#: Heartbeat times that a standby has to answer "stand down".
PATIENCE: Final = 2
#: Seconds that a standby has to write its promise to stand down while its link lives.
STOP_PATIENCE: Final = 10.0
#: Seconds to wait for the daemon of a standby whose host is alive: its supervisor restarts it.
RESTART_PATIENCE: Final = 15.0


async def ask_standby(
    peers: Peers,
    heartbeat: float,
    host_id: str,
    addresses: tuple[Address, ...],
    guest: str,
    generation: int,
) -> Answer:
    """Ask a standby to stand down until it has answered or patience is over.

    :param heartbeat: seconds
    :param guest: UUID
    """
    asking = Asking(heartbeat)
    while True:
        answer = await asking.wait(
            peers.ask_to_stand_down(host_id, addresses, guest, generation, heartbeat)
        )
        if answer.conclusive or asking.waited >= patience(answer, heartbeat):
            return answer
        await asyncio.sleep(heartbeat / 4)


class Asking:
    """How long nobody has answered.

    Time in which this process stood still does not count, nor does the round of questions in which
    it did: their time-outs are over at once when it goes on, and the answers may lie unread.

    :param heartbeat: seconds
    """

    def __init__(self, heartbeat: float) -> None:
        self._pace = heartbeat / 4
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    @property
    def waited(self) -> float:
        """Seconds in which an answer could have come."""
        return self._loop.time() - self._since

    async def wait(self, questions: Coroutine[Any, Any, Answer]) -> Answer:
        """One round of questions."""
        task = asyncio.ensure_future(questions)
        began, stood_still = self._loop.time(), False
        try:
            while not task.done():
                before = self._loop.time()
                await asyncio.wait({task}, timeout=self._pace)
                stood_still = stood_still or self._loop.time() - before > 2 * self._pace
        finally:
            task.cancel()
        answer = task.result()
        if stood_still:
            self._since += self._loop.time() - began
            # No answer in such a round is no sign of death.
            answer = replace(answer, alive=True)
        return answer


def patience(answer: Answer, heartbeat: float) -> float:
    """Seconds after which asking on makes no sense: longer while that host shows signs of life."""
    return RESTART_PATIENCE if answer.alive else heartbeat * PATIENCE


class Ending:
    """The last steps, each tried whatever became of the ones before.

    :param name: the guest's name
    :param uuid: the guest's UUID
    """

    def __init__(self, host: Host, name: str, uuid: str) -> None:
        self._host = host
        self._name = name
        self._uuid = uuid

    async def let_go(
        self,
        source: Source,
        output: Output,
        standby: str,
        why: str,
        reason: LetGoReason,
        release_disks: Callable[[], Awaitable[None]],
        *,
        gone: bool = False,
    ) -> Record | None:
        """Nobody else runs this guest: let its output pass, remove what protection has built.

        :param release_disks: brings held changes to shared targets
        :param gone: nor does it run here any more
        :return: what the ledger should say and does not, because it could not be written; or None
        """
        reach("let-go")
        record = self._host.ledger.get(self._uuid)
        promised = gone or reason in (LetGoReason.PROMISE, LetGoReason.NOTHING_SENT)
        role = Role.RELEASED if gone else Role.OWNER

        def changes(known: Record) -> dict[str, Any]:
            options = owing(known.options, known.generation, promised)
            return {"role": role, "reason": why, "options": options}

        recorded = await self.amend(changes)
        reach("let-go-recorded")
        # Before the output, which tells the world of them.
        await self.attempt_here("issue what is held of shared disks", release_disks())
        await self.attempt("unpause", source.unpause)
        await self.attempt("release output", output.release_all)
        reach("let-go-released")
        await self.attempt("remove the output buffer", output.teardown, drop=False)
        reach("let-go-done")
        await self.attempt("end tracking", source.untrack)
        if gone:
            self.note("ended", f"nothing is left of the protection of {self._name}")
            return None
        ground = {
            LetGoReason.NOTHING_SENT: "the standby has nothing of it",
            LetGoReason.PROMISE: f"{standby} stood down",
            LetGoReason.POLICY: f"{standby} gives no answer and on_standby_loss is release",
            LetGoReason.FORCE: "an administrator forced it",
        }[reason]
        self.note(
            "unprotected",
            f"{self._name} runs on UNPROTECTED ({why}; {ground})",
            ground=reason.name.lower(),
        )
        return replace(record, **changes(record)) if record and not recorded else None

    async def abandon(
        self,
        source: Source,
        output: Output,
        standby: str,
        generation: int,
        drop_disks: Callable[[], Awaitable[None]],
    ) -> None:
        """The standby runs the guest: nothing that this copy did since may ever be seen.

        :param drop_disks: forgets changes that are held of shared disks
        """
        reach("abandon")
        moved: dict[str, Any] = {
            "role": Role.MOVED,
            "generation": generation,
            "reason": f"{standby} runs it",
            "came_from": "",
        }
        await self.amend(lambda known: moved)
        reach("abandon-recorded")
        await self.attempt_here("drop what is held of shared disks", drop_disks())
        await self.attempt("pause", source.pause)
        # Not untrack: it lets the guest run on.
        await self.attempt("destroy the stale copy", source.destroy)
        reach("abandon-destroyed")
        await self.attempt("drop held output", output.teardown, drop=True)
        reach("abandon-done")
        self.note(
            "moved",
            f"{standby} runs {self._name} since generation {generation}; "
            "the copy here was destroyed and its held output dropped",
            generation=generation,
        )

    async def not_begun(self, generation: int, why: str, *, wished: bool) -> None:
        """A protection has failed before its first checkpoint, recorded or not.

        :param wished: the guest is to be protected all the same
        """

        def changes(known: Record) -> dict[str, Any]:
            if known.role is not Role.PRIMARY or known.generation != generation:
                return {}
            options = known.options | {"resume": wished}
            return {"role": Role.OWNER, "reason": why, "options": options}

        await self.amend(changes)

    async def amend(self, changes: Callable[[Record], dict[str, Any]]) -> bool:
        """Change the ledger; where that fails, a restarted daemon asks again, which is safe."""
        return await self.attempt(
            "record who owns the guest", self._host.ledger.amend, self._uuid, changes
        )

    async def attempt(self, what: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
        """One step, in a thread: when it fails, say so and go on with the others.

        :return: whether it was done
        """
        work = asyncio.to_thread(functools.partial(call, *args, **kwargs))
        return await self.attempt_here(what, work)

    async def attempt_here(self, what: str, work: Awaitable[Any]) -> bool:
        """As :meth:`attempt`, in the event loop."""
        return await self._host.journal.attempt(self._name, what, work)

    def note(self, event: str, text: str, **figures: Any) -> None:
        """Put a sentence into the event log."""
        self._host.journal.note(self._name, event, text, **figures)
