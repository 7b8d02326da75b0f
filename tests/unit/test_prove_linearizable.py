# SPDX-License-Identifier: Apache-2.0
"""The checker of histories: what must fail fails, and it agrees with trying every order."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from tests.prove import linearizable
from tests.prove.linearizable import (
    Losses,
    Operation,
    Undecided,
    check,
    check_transactions,
    counter,
    listing,
    register,
)


def op(
    name: str,
    argument: Any,
    answer: Any,
    sent: float,
    received: float | None,
    *,
    client: int = 0,
    key: str = "x",
) -> Operation:
    return Operation(client, key, name, argument, answer, sent, received)


GOOD: dict[str, tuple[list[Operation], Any, Any]] = {
    "nothing": ([], register, None),
    "in order": (
        [op("put", 1, "ok", 0, 1), op("get", None, 1, 2, 3), op("put", 2, "ok", 4, 5)],
        register,
        None,
    ),
    "a read that overlaps a write may see either": (
        [op("put", 1, "ok", 0, 10), op("get", None, None, 1, 2), op("get", None, 1, 3, 4)],
        register,
        None,
    ),
    "a write without an answer that happened": (
        [op("put", 1, None, 0, None), op("get", None, 1, 5, 6)],
        register,
        None,
    ),
    "a write without an answer that did not": (
        [op("put", 1, None, 0, None), op("get", None, None, 5, 6)],
        register,
        None,
    ),
    "a write without an answer that happened late": (
        [
            op("put", 1, None, 0, None),
            op("put", 2, "ok", 1, 2),
            op("get", None, 2, 3, 4),
            op("get", None, 1, 5, 6),
        ],
        register,
        None,
    ),
    "one of two compare-and-swap": (
        [
            op("put", 1, "ok", 0, 1),
            op("cas", (1, 2), True, 2, 9),
            op("cas", (1, 3), False, 2, 9, client=1),
        ],
        register,
        None,
    ),
    "a counter": (
        [op("incr", 1, 2, 0, 5), op("incr", 1, 1, 0, 5, client=1), op("get", None, 2, 6, 7)],
        counter,
        0,
    ),
    "a list": (
        [
            op("append", "a", 1, 0, 1),
            op("append", "b", 2, 2, 3),
            op("read", None, ("a", "b"), 4, 5),
        ],
        listing,
        (),
    ),
}

BAD: dict[str, tuple[list[Operation], Any, Any]] = {
    "a lost write": (
        [op("put", 1, "ok", 0, 1), op("get", None, None, 2, 3)],
        register,
        None,
    ),
    "a stale read": (
        [op("put", 1, "ok", 0, 1), op("put", 2, "ok", 2, 3), op("get", None, 1, 4, 5)],
        register,
        None,
    ),
    "a read of the future": (
        [op("get", None, 1, 0, 1), op("put", 1, "ok", 2, 3)],
        register,
        None,
    ),
    "a read that goes back": (
        [
            op("put", 1, "ok", 0, 1),
            op("put", 2, "ok", 2, 20),
            op("get", None, 2, 3, 4),
            op("get", None, 1, 5, 6),
        ],
        register,
        None,
    ),
    "both of two compare-and-swap": (
        [
            op("put", 1, "ok", 0, 1),
            op("cas", (1, 2), True, 2, 9),
            op("cas", (1, 3), True, 2, 9, client=1),
        ],
        register,
        None,
    ),
    "an increment that was forgotten": (
        [op("incr", 1, 1, 0, 1), op("incr", 1, 1, 2, 3)],
        counter,
        0,
    ),
    "an increment that was carried out twice": (
        [op("incr", 1, 1, 0, 1), op("incr", 1, 3, 2, 3)],
        counter,
        0,
    ),
    "a reordered list": (
        [
            op("append", "a", 1, 0, 1),
            op("append", "b", 2, 2, 3),
            op("read", None, ("b", "a"), 4, 5),
        ],
        listing,
        (),
    ),
    "a value from nowhere": ([op("get", None, 7, 0, 1)], register, None),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_histories(name: str) -> None:
    history, model, initial = GOOD[name]
    for _ in range(4):
        judgement = check(history, model, initial)
        assert judgement.linearizable, judgement.sentences()
        assert judgement.operations == len(history)
        history = history[::-1]  # the order in which they were written down means nothing


@pytest.mark.parametrize("name", BAD)
def test_bad_histories(name: str) -> None:
    history, model, initial = BAD[name]
    judgement = check(history, model, initial)
    assert not judgement.linearizable
    assert judgement.sentences()[0].startswith("x: after ")


def test_keys_are_judged_one_by_one() -> None:
    good = [op("put", 1, "ok", 0, 1, key="a"), op("get", None, 1, 2, 3, key="a")]
    bad = [op("put", 1, "ok", 0, 1, key="b"), op("get", None, None, 2, 3, key="b")]
    judgement = check([*good, *bad], register, None)
    assert list(judgement.broken) == ["b"]
    assert judgement.keys == 2


def test_an_answer_before_its_question_is_refused() -> None:
    with pytest.raises(ValueError, match="answered before it was asked"):
        check([op("get", None, None, 2, 1)], register, None)


def test_a_search_that_is_too_long_is_not_called_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linearizable, "MOST_TRIED", 50)
    history = [op("put", number, "ok", 0, 100, client=number) for number in range(12)]
    with pytest.raises(Undecided):
        check([*history, op("get", None, 99, 101, 102)], register, None)


def _by_every_order(history: list[Operation], model: Any, initial: Any) -> bool:
    """The definition itself."""
    answered = [each for each in history if each.received is not None]
    open_ones = [each for each in history if each.received is None]
    for count in range(len(open_ones) + 1):
        for chosen in itertools.combinations(open_ones, count):
            for order in itertools.permutations([*answered, *chosen]):
                if _in_time(order) and _explains(order, model, initial):
                    return True
    return False


def _in_time(order: tuple[Operation, ...]) -> bool:
    return not any(
        later.received is not None and later.received < earlier.sent
        for place, earlier in enumerate(order)
        for later in order[place + 1 :]
    )


def _explains(order: tuple[Operation, ...], model: Any, state: Any) -> bool:
    for each in order:
        state, answer = model(state, each.name, each.argument)
        if each.received is not None and answer != each.answer:
            return False
    return True


def _random_history(chance: random.Random) -> list[Operation]:
    history = []
    for client in range(chance.randint(1, 6)):
        sent = chance.randint(0, 8)
        received = None if chance.random() < 0.2 else sent + chance.randint(0, 5)
        kind = chance.choice(("get", "put", "cas"))
        value = chance.randint(0, 2)
        argument: Any
        answer: Any
        match kind:
            case "get":
                argument, answer = None, chance.choice((None, 0, 1, 2))
            case "put":
                argument, answer = value, "ok"
            case _:
                argument, answer = (chance.randint(0, 2), value), chance.random() < 0.5
        history.append(op(kind, argument, answer, sent, received, client=client))
    return history


def test_it_agrees_with_trying_every_order() -> None:
    chance = random.Random(1)
    verdicts = {True: 0, False: 0}
    for _ in range(3000):
        history = _random_history(chance)
        expected = _by_every_order(history, register, None)
        assert check(history, register, None).linearizable is expected, history
        verdicts[expected] += 1
    assert min(verdicts.values()) > 500, "both verdicts are wanted"


def test_a_long_history_of_a_real_register_is_good_and_a_damaged_one_is_not() -> None:
    chance = random.Random(2)
    history, state, now = [], None, 0.0
    for number in range(4000):
        now += chance.random()
        kind = chance.choice(("get", "put"))
        state, answer = register(state, kind, number)
        # Each takes effect at ``now``; six of them overlap.
        history.append(
            op(kind, number, answer, now - 3 * chance.random(), now + 3 * chance.random())
        )
    assert check(history, register, None).linearizable
    reads = [each for each, _ in enumerate(history) if history[each].name == "get"]
    first, late = reads[10], reads[-10]
    damaged = list(history)
    old = history[late]
    damaged[late] = op("get", old.argument, history[first].answer, old.sent, old.received)
    assert not check(damaged, register, None).linearizable


# ---- Transactions ----


def _asked(*numbers: int, unanswered: tuple[int, ...] = ()) -> list[Operation]:
    return [
        op("add", number, "ok", number, None if number in unanswered else number + 0.5)
        for number in numbers
    ]


@pytest.mark.parametrize(
    ("found", "losses"),
    [
        ([1, 2, 3], Losses()),
        ([1, 2, 3, 4], Losses()),
        ([1, 3], Losses(lost=(2,))),
        ([1, 2, 2, 3], Losses(doubled=(2,))),
        ([1, 2, 3, 9], Losses(unknown=(9,))),
        ([1, 3, 2], Losses(reordered=((3, 2),))),
        ([], Losses(lost=(1, 2, 3))),
    ],
)
def test_transactions(found: list[int], losses: Losses) -> None:
    asked = _asked(1, 2, 3, 4, unanswered=(4,))
    result = check_transactions(asked, found, ordered=True)
    assert result == losses
    assert result.none is (losses == Losses())


def test_transactions_that_overlapped_may_be_in_any_order() -> None:
    asked = [op("add", 1, "ok", 0, 5), op("add", 2, "ok", 0, 5, client=1)]
    assert check_transactions(asked, [2, 1], ordered=True).none
    assert check_transactions(_asked(1, 2), [2, 1]).none
