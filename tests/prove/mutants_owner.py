# SPDX-License-Identifier: Apache-2.0
"""Broken rules of ownership and of what a guest is spared: invariants 4 and 5."""

from __future__ import annotations

from typing import Final

from tests.prove.mutant import Edit, Mutant

_CYCLE: Final = "kemari/cycle.py"
_EPOCH: Final = "kemari/epoch.py"
_SUCCESSOR: Final = "kemari/successor.py"
_STANDBY: Final = "kemari/standby.py"
_TAKEOVER: Final = "kemari/takeover.py"

OWNER: Final[tuple[Mutant, ...]] = (
    # ---- Invariant 4: one owner ----
    Mutant(
        "takeover-on-link-close",
        "the end of a connection is no sign of death",
        (
            Edit(
                _SUCCESSOR,
                "        return [Discard()] if self.state is StandbyState.READY else []\n",
                "        return self._take_over() if self.state is StandbyState.READY else []\n",
            ),
        ),
    ),
    Mutant(
        "takeover-while-the-host-lives",
        "a standby takes over only when every path is silent",
        (
            Edit(
                _STANDBY,
                "            elif verdict is Verdict.LINK_DEAD:\n"
                "                await self._link_is_dead()\n",
                "            elif verdict is Verdict.LINK_DEAD:\n"
                '                await self.take_over("the link is silent")\n',
            ),
        ),
    ),
    Mutant(
        "takeover-without-claim",
        "a takeover is on disk",
        (
            Edit(
                _TAKEOVER,
                "        await asyncio.to_thread(update)\n\n    async def _announce",
                "        update.args\n\n    async def _announce",
            ),
            Edit(
                "kemari/daemon.py",
                "        self.host.spawn(self._see_recorded(uuid), "
                'f"{guest}: record the takeover")\n',
                "        del uuid, guest\n",
            ),
        ),
    ),
    Mutant(
        "unrecorded-takeover-left-so-by-a-restart",
        "a takeover that could not be recorded is once it can be, restarted or not",
        (
            Edit(
                "kemari/daemon.py",
                "            self._remember_takeover(record.uuid, record.guest)\n",
                "",
            ),
        ),
    ),
    Mutant(
        "wish-not-recorded",
        "a guest is protected again whenever the daemon died, unless somebody said that it be not",
        (
            Edit(
                "kemari/ownership.py",
                '            "resume": resume,\n',
                '            "resume": False,\n',
            ),
        ),
    ),
    Mutant(
        "stop-not-recorded",
        "a guest whose protection was stopped stays without one",
        (
            Edit(
                "kemari/daemon.py",
                '"resume": False}} if wanted else {}\n',
                '"resume": True}} if wanted else {}\n',
            ),
        ),
    ),
    Mutant(
        "debt-forgotten-with-a-full-disk",
        "a standby that owes its promise is asked on, though that could not be recorded",
        (
            Edit(
                "kemari/stragglers.py",
                "        if unrecorded is not None:\n",
                '        if unrecorded is not None and uuid == "":\n',
            ),
        ),
    ),
    Mutant(
        "promise-of-a-host-that-runs-it",
        "a host that took over does not promise to stand down, recorded or not",
        (
            Edit(
                "kemari/recovery.py",
                "    return record.role is Role.STANDBY and await host.runs(record)\n",
                "    return record.generation < 0 and await host.runs(record)\n",
            ),
        ),
    ),
    Mutant(
        "promise-not-kept",
        "a standby that has stood down never takes over",
        (
            Edit(
                _SUCCESSOR,
                "        self.state = StandbyState.STOOD_DOWN\n        self._promised = True\n"
                "        return [DestroyShell()]\n",
                "        return []\n",
            ),
        ),
    ),
    Mutant(
        "let-go-unasked",
        "a primary asks before it lets output go",
        (
            Edit(
                _EPOCH,
                "        self.state = PrimaryState.ASKING\n        if not",
                "        return self._let_go(LetGoReason.FORCE)\n        if not",
            ),
        ),
    ),
    Mutant(
        "waits-for-a-lost-standby",
        "a guest that has outpaced its standby goes on when that is lost",
        (
            Edit(
                _EPOCH,
                "        if not self.outpaced:\n            return [Ask()]\n"
                "        self.stalled = self.outpaced = False\n        return [Ask(), Unpause()]\n",
                "        self.outpaced = False\n        return [Ask()]\n",
            ),
        ),
        ("tests/property/test_epoch.py",),
    ),
    Mutant(
        "policy-ignored",
        "with the policy hold, silence does not let output go",
        (
            Edit(
                "kemari/protection.py",
                'no_answer(release=may_release and policy == "release")',
                "no_answer(release=bool(policy))",
            ),
        ),
    ),
    Mutant(
        "policy-after-handover",
        "after a handover the policy does not count",
        (
            Edit(
                _EPOCH,
                "        if release and not self.handed:\n",
                "        if release:\n",
            ),
        ),
        ("tests/property/test_epoch.py",),
    ),
    Mutant(
        "restart-without-asking",
        "a restarted primary asks who owns the guest",
        (
            Edit(
                "kemari/ledger.py",
                "            return Duty.ASK\n",
                "            return Duty.NONE\n",
            ),
        ),
    ),
    Mutant(
        "destroys-on-the-ledgers-word",
        "a copy that was started since is destroyed only if the guest runs on the peer now",
        (
            Edit(
                "kemari/recovery.py",
                "        if here and not await self._is_old() and not await self._runs_there():\n",
                "        if here and generation < 0:\n",
            ),
        ),
    ),
    Mutant(
        "stale-copy-spared",
        "a copy that was protected is destroyed although the guest has ended on the peer since",
        (
            Edit(
                "kemari/recovery.py",
                "        if here and not await self._is_old() and not await self._runs_there():\n",
                "        if here and not await self._runs_there():\n",
            ),
        ),
    ),
    Mutant(
        "gone-copy-taken-for-the-new-one",
        "what was held of an old copy that is gone does not make a new guest one",
        (
            Edit(
                "kemari/recovery.py",
                "        if here and not await self._is_old() and not await self._runs_there():\n",
                "        if here and not await self._held() and not await self._runs_there():\n",
            ),
        ),
    ),
    Mutant(
        "running-from-memory",
        "a host that took over says that the guest runs there only while it does",
        (
            Edit(
                "kemari/daemon.py",
                "        if session is not None and not session.settled:\n",
                "        if session is not None:\n",
            ),
        ),
        tests=("tests/unit/test_kemari_takeover.py",),
    ),
    Mutant(
        "policy-after-handover-and-restart",
        "after a handover the policy does not count, restarted or not",
        (
            Edit(
                "kemari/recovery.py",
                "                and not record.options.get(HANDED)\n",
                "",
            ),
        ),
    ),
    Mutant(
        "another-guest-of-the-name",
        "a guest is known by its UUID: another one of its name is not touched",
        (
            Edit(
                "kemari/recovery.py",
                "    return bool(uuid) and not known\n",
                "    return bool(uuid)\n",
            ),
        ),
        ("tests/unit/test_kemari_ownership.py",),
    ),
    Mutant(
        "ledger-not-asked",
        "a host that runs a guest says so, also when its daemon was restarted",
        (
            Edit(
                "kemari/ledger.py",
                "    if owns and record is not None and record.generation > generation:\n",
                "    if owns and record is not None and record.generation > generation + 1000:\n",
            ),
        ),
    ),
    Mutant(
        "generation-not-checked",
        "a standby refuses a generation that is over",
        (
            Edit(
                _STANDBY,
                "        if generation <= known:\n",
                "        if generation < 0:\n",
            ),
        ),
        (
            "tests/unit/test_prove_rules.py",
            "tests/unit/test_kemari_daemon.py",
            "tests/unit/test_kemari_guest.py",
        ),
    ),
    Mutant(
        "old-question-answered-for-a-new-generation",
        "an old generation's question does not make a newer one stand down",
        (
            Edit(
                "kemari/daemon.py",
                "            if session.generation > generation:\n",
                "            if session.generation < 0:\n",
            ),
        ),
        ("tests/unit/test_prove_rules.py",),
    ),
    Mutant(
        "stale-copy-kept",
        "a primary that has lost the guest destroys its copy",
        (
            Edit(
                "kemari/endings.py",
                '        await self.attempt("destroy the stale copy", source.destroy)\n',
                "",
            ),
        ),
    ),
    Mutant(
        "stale-output-let-go",
        "a primary that has lost the guest drops what it holds",
        (
            Edit(
                "kemari/endings.py",
                "output.teardown, drop=True)",
                "output.teardown, drop=False)",
            ),
        ),
    ),
    Mutant(
        "stale-buffer-let-go",
        "a restarted primary that has lost the guest drops what was held",
        (
            Edit(
                "kemari/recovery.py",
                "        await self._reclaim(release=False)\n        self._note(\n",
                "        await self._reclaim(release=True)\n        self._note(\n",
            ),
        ),
    ),
    Mutant(
        "straggler-forgotten",
        "a standby that owes its promise is asked on",
        (
            Edit(
                "kemari/stragglers.py",
                "        if record is not None and uuid not in self._asking:\n",
                '        if record is not None and uuid == "":\n',
            ),
        ),
    ),
    Mutant(
        "own-stall-is-their-silence",
        "time in which this process stood still is not the other's silence",
        (
            Edit(
                "kemari/endings.py",
                "        if stood_still:\n            self._since",
                "        if False:\n            self._since",
            ),
        ),
    ),
    Mutant(
        "own-stall-is-their-death",
        "a watch that ticks late does not count its lateness",
        (
            Edit(
                "kemari/liveness.py",
                "        if late > self.pace / 2:\n",
                "        if late > 1e9:\n",
            ),
        ),
        ("tests/unit/test_kemari_liveness.py",),
    ),
    # ---- Invariant 5: no harm to the guest ----
    Mutant(
        "guest-left-paused",
        "a guest that a killed daemon left paused is let run",
        (
            Edit(
                "kemari/recovery.py",
                "        await asyncio.to_thread(host.hypervisor.recover, guest)\n",
                "        await asyncio.to_thread(host.hypervisor.domain_exists, guest)\n",
            ),
        ),
    ),
    Mutant(
        "shell-left",
        "a standby's restarted daemon removes the shell that was left",
        (
            Edit(
                "kemari/recovery.py",
                "        elif record.role is Role.RELEASED:\n",
                "        elif record.generation < 0:\n",
            ),
        ),
    ),
    Mutant(
        "wedged-standby-waited-for",
        "a standby that acknowledges nothing is given up",
        (
            Edit(
                _CYCLE,
                "        self._ack_timer.set(ACK_LIMIT)\n",
                "        self._ack_timer.clear()\n",
            ),
        ),
        ("tests/unit/test_kemari_guest.py",),
    ),
)
