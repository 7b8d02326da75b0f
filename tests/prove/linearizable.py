# SPDX-License-Identifier: Apache-2.0
"""Whether a single machine that never died could have given these answers.

A history is what clients outside saw: when they sent each request, when its answer came, and what
it said.  It is *linearizable* if every operation can be given one moment between the two, so that
the answers are those of a machine that carries out one operation at a time, in the order of these
moments (Herlihy and Wing, ACM TOPLAS 12(3), 1990).  An operation without an answer may have
happened at any moment after it was sent, or not at all.

:func:`check` is the search of Wing and Gong (J. Parallel Distrib. Comput. 17, 1993) with Lowe's
memory of what has been tried (Concurrency Computat. Pract. Exper. 29, 2017).  A history is
linearizable exactly if that of each key by itself is, so keys are searched one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

#: State of an object, before and after an operation.
State = Hashable

#: (state, operation's name, argument) -> (state after it, answer)
Model = Callable[[Any, str, Any], tuple[Any, Any]]

#: Configurations tried for one key, at most; one more and the history is undecided.
MOST_TRIED: Final = 5_000_000


class Undecided(RuntimeError):
    """The search became too long; nothing is known."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One request of one client.

    :ivar client: who asked; a client may have several requests under way
    :ivar key: what it is about
    :ivar name: what is asked
    :ivar argument: with what
    :ivar answer: what was answered; meaningless without :attr:`received`
    :ivar sent: when it was sent, in seconds of the clients' clock
    :ivar received: when the answer came; None if none did
    """

    client: int
    key: str
    name: str
    argument: Any
    answer: Any
    sent: float
    received: float | None

    def __str__(self) -> str:
        until = "no answer" if self.received is None else f"{self.answer!r} at {self.received:.6f}"
        return (
            f"client {self.client}: {self.name} {self.key} {self.argument!r} "
            f"at {self.sent:.6f}: {until}"
        )


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is to be said of a history.

    :ivar operations: in it
    :ivar unanswered: of these, without an answer
    :ivar keys: judged
    :ivar broken: key -> the operations of the longest way that could be explained, and those of
        which none can come next; empty if the history is linearizable
    """

    operations: int
    unanswered: int
    keys: int
    broken: Mapping[str, tuple[Sequence[Operation], Sequence[Operation]]] = field(
        default_factory=dict
    )

    @property
    def linearizable(self) -> bool:
        """Whether one machine could have given these answers."""
        return not self.broken

    def sentences(self) -> list[str]:
        """One for each key that cannot be explained."""
        return [
            f"{key}: after {explained[-1] if explained else 'the beginning'} no machine could have "
            f"gone on with any of: {'; '.join(map(str, stuck)) or 'nothing'}"
            for key, (explained, stuck) in self.broken.items()
        ]


def check(history: Iterable[Operation], model: Model, initial: State) -> Judgement:
    """Judge a history.

    :param model: one object's behaviour
    :param initial: the state of every object before the first operation
    :raise Undecided: the search became too long
    """
    by_key: dict[str, list[Operation]] = defaultdict(list)
    for operation in history:
        if operation.received is not None and operation.received < operation.sent:
            raise ValueError(f"{operation}: it was answered before it was asked")
        by_key[operation.key].append(operation)
    broken = {}
    for key, operations in by_key.items():
        found = _search(operations, model, initial)
        if found is not None:
            broken[key] = found
    everything = [each for operations in by_key.values() for each in operations]
    return Judgement(
        operations=len(everything),
        unanswered=sum(each.received is None for each in everything),
        keys=len(by_key),
        broken=broken,
    )


class _Node:
    """A call or an answer, in a list in the order of time; lifted out once explained."""

    __slots__ = ("after", "before", "index", "operation", "returns")

    def __init__(self, operation: Operation | None, index: int, returns: _Node | None) -> None:
        self.operation = operation
        self.index = index
        self.returns = returns
        self.before: _Node = self
        self.after: _Node = self


def _chain(operations: Sequence[Operation]) -> _Node:
    """The head of the list of all calls and answers.

    Calls come before answers of the same instant: they overlap.
    """
    events: list[tuple[float, int, int, _Node]] = []
    end = float("inf")
    for index, operation in enumerate(operations):
        answer = _Node(None, index, None)
        call = _Node(operation, index, answer)
        events.append((operation.sent, 0, index, call))
        received = end if operation.received is None else operation.received
        events.append((received, 1, index, answer))
    head = last = _Node(None, -1, None)
    for _, _, _, node in sorted(events, key=lambda event: event[:3]):
        last.after, node.before = node, last
        last = node
    last.after, head.before = head, last
    return head


def _lift(call: _Node) -> None:
    assert call.returns is not None
    for node in (call, call.returns):
        node.before.after = node.after
        node.after.before = node.before


def _unlift(call: _Node) -> None:
    assert call.returns is not None
    for node in (call.returns, call):
        node.before.after = node
        node.after.before = node


def _search(
    operations: Sequence[Operation], model: Model, initial: State
) -> tuple[Sequence[Operation], Sequence[Operation]] | None:
    """None if the operations on one object can be explained; otherwise how far they can be."""
    head = _chain(operations)
    must = sum(1 << i for i, each in enumerate(operations) if each.received is not None)
    done, state = 0, initial
    tried: set[tuple[int, State]] = {(0, initial)}
    way: list[tuple[_Node, State]] = []
    best: tuple[Sequence[Operation], Sequence[Operation]] = ((), ())
    longest = -1
    entry = head.after
    while done & must != must:
        if entry is not head and entry.operation is not None:
            operation = entry.operation
            following, answer = model(state, operation.name, operation.argument)
            fits = operation.received is None or answer == operation.answer
            mark = (done | 1 << entry.index, following)
            if fits and mark not in tried:
                tried.add(mark)
                if len(tried) > MOST_TRIED:
                    raise Undecided(f"{len(operations)} operations on {operation.key}")
                way.append((entry, state))
                done, state = mark
                _lift(entry)
                entry = head.after
            else:
                entry = entry.after
            continue
        # An answer whose call is not explained yet: nothing later may come before it.
        if len(way) > longest:
            longest = len(way)
            best = ([call.operation for call, _ in way if call.operation], _next(head))
        if not way:
            return best
        call, state = way.pop()
        done ^= 1 << call.index
        _unlift(call)
        entry = call.after
    return None


def _next(head: _Node) -> list[Operation]:
    """The operations that could come next: their calls are before the first answer."""
    found = []
    node = head.after
    while node is not head and node.operation is not None:
        found.append(node.operation)
        node = node.after
    return found


# ---- Models -----------------------------------------------------------------------------------


def register(state: Any, name: str, argument: Any) -> tuple[Any, Any]:
    """A register: ``get``; ``put`` value; ``cas`` (expected, value), which answers whether it did.

    The initial state is None.
    """
    match name:
        case "get":
            return state, state
        case "put":
            return argument, "ok"
        case "cas":
            expected, value = argument
            return (value, True) if state == expected else (state, False)
    raise ValueError(f"{name} is no operation of a register")


def counter(state: Any, name: str, argument: Any) -> tuple[Any, Any]:
    """A counter: ``incr`` amount, which answers the new value; ``get``.  It begins at 0."""
    match name:
        case "incr":
            return state + argument, state + argument
        case "get":
            return state, state
    raise ValueError(f"{name} is no operation of a counter")


def listing(state: Any, name: str, argument: Any) -> tuple[Any, Any]:
    """A list: ``append`` value, which answers the length; ``read``.  It begins as ()."""
    match name:
        case "append":
            return (*state, argument), len(state) + 1
        case "read":
            return state, state
    raise ValueError(f"{name} is no operation of a list")


# ---- Transactions -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Losses:
    """What is wrong with a set of transactions.

    :ivar lost: acknowledged, and not there
    :ivar doubled: there more than once
    :ivar unknown: there, and never asked for
    :ivar reordered: pairs that are there in another order than they were acknowledged in
    """

    lost: tuple[Hashable, ...] = ()
    doubled: tuple[Hashable, ...] = ()
    unknown: tuple[Hashable, ...] = ()
    reordered: tuple[tuple[Hashable, Hashable], ...] = ()

    @property
    def none(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.unknown or self.reordered)


def check_transactions(
    asked: Iterable[Operation], found: Sequence[Hashable], *, ordered: bool = False
) -> Losses:
    """Compare what was acknowledged with what a database holds.

    :param asked: one operation for each transaction; its argument identifies it
    :param found: what the database holds, in its own order
    :param ordered: whether its order means something: then a transaction that was acknowledged
        before another was sent must come before it
    """
    operations = list(asked)
    known = {each.argument for each in operations}
    there: dict[Hashable, int] = {}
    for place, each in enumerate(found):
        there.setdefault(each, place)
    counts: dict[Hashable, int] = defaultdict(int)
    for each in found:
        counts[each] += 1
    answered = [each for each in operations if each.received is not None]
    return Losses(
        lost=tuple(each.argument for each in answered if each.argument not in there),
        doubled=tuple(each for each, count in counts.items() if count > 1),
        unknown=tuple(each for each in there if each not in known),
        reordered=tuple(_reordered(operations, there)) if ordered else (),
    )


def _reordered(
    operations: Sequence[Operation], there: Mapping[Hashable, int]
) -> Iterable[tuple[Hashable, Hashable]]:
    """Neighbours in the database of which the later was answered before the earlier was sent."""
    placed = sorted(
        (each for each in operations if each.argument in there), key=lambda e: there[e.argument]
    )
    latest: Operation | None = None  # of those so far, the one that was sent last
    for each in placed:
        if latest is not None and each.received is not None and each.received < latest.sent:
            yield latest.argument, each.argument
        if latest is None or each.sent > latest.sent:
            latest = each
