# SPDX-License-Identifier: Apache-2.0
"""All clients of the guest's databases: what was acknowledged must be there ever after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vagrant.demolib.ledger import Writers
from vagrant.demolib.program import Event, Program, connected
from vagrant.lablib.lab import Lab


class Transactions(Program):
    """Clients of the guest's transactions, on several connections.

    :param pause_ms: greatest pause between two transactions of a connection
    :raises LabError: the lab is down, or the database does not answer
    """

    def __init__(self, lab: Lab, errors: Path, connections: int, pause_ms: float) -> None:
        words = ["vagrant.demolib.transactions", "--connections", str(connections)]
        super().__init__(lab, "transactions' client", [*words, "--pause", str(pause_ms)], errors)
        self._connections = connections
        self.begin("the connections", *map(connected, range(connections)))

    def wait_done(self, count: int, *, timeout: float = 300) -> None:
        """Wait until so many more were acknowledged on each connection.

        :raises LabError: they were not in time, or the client ended
        """
        since = self.seen
        for index in range(self._connections):
            left = count

            def wanted(event: Event, index: int = index) -> bool:
                nonlocal left
                if event["event"] == "done" and event["connection"] == index:
                    left -= 1
                return left <= 0

            self.wait(f"{count} more transactions", wanted, since=since, timeout=timeout)

    def look(self) -> list[str]:
        """Look at the tables: one sentence for everything that does not hold.

        :raises LabError: the database does not answer
        """
        mark = self.seen
        self.tell("look")
        looked = self.wait("a look", lambda event: event["event"] == "looked", since=mark)
        return list(looked["faults"])

    def stop(self) -> list[str]:
        """Have them add no more, and look at everything.

        :return: one sentence for everything that does not hold
        :raises LabError: they did not end
        """
        end = self.result()
        broken = [f"connection {index} ended: {why}" for index, why in end["broken"].items()]
        late = [f"{end['late']} transactions have no answer"] if end["late"] else []
        return [*broken, *late, *self.events("looked")[-1]["faults"]]


@dataclass(frozen=True, slots=True)
class Databases:
    """Clients of both databases of the guest."""

    writers: Writers
    transactions: Transactions

    @property
    def writes(self) -> int:
        """Writes that the key-value store has acknowledged so far."""
        return self.writers.count

    @property
    def commits(self) -> int:
        """Transactions that were acknowledged so far."""
        return len(self.transactions.events("done"))

    def wait_done(self, count: int) -> None:
        """Wait until so many more writes, and transactions, were acknowledged on each connection.

        :raises LabError: they were not in time, or a client ended
        """
        self.writers.wait_done(count)
        self.transactions.wait_done(count)

    def noticed(self) -> list[str]:
        """One sentence for everything that does not hold, while the clients go on.

        :raises LabError: a database does not answer
        """
        return [*self.writers.noticed(), *self.transactions.look()]

    def stop(self) -> list[str]:
        """Have them write no more, and compare all that was acknowledged with what is there.

        :return: one sentence for everything that does not fit
        :raises LabError: they did not end
        """
        return [*self.writers.stop(), *self.transactions.stop()]


@contextmanager
def clients(lab: Lab, out: Path, connections: int = 4, pause_ms: float = 0) -> Iterator[Databases]:
    """Clients that write to both databases.

    :param out: folder for what they say on standard error
    :param connections: to the key-value store; half as many to the transactions
    :param pause_ms: greatest pause between two writes of a connection
    :raises LabError: the lab is down, or a database does not answer
    """
    half = max(2, connections // 2)
    with (
        Writers(lab, out / "writer.err", connections, pause_ms) as writers,
        Transactions(lab, out / "transactions.err", half, pause_ms) as transactions,
    ):
        yield Databases(writers, transactions)
