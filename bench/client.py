# SPDX-License-Identifier: Apache-2.0
"""Asks the guest for one of the benchmark's loads and tells what came of it.

Run as a program of its own, with nothing but the standard library, at the client's place in the
lab's network; ``vagrant/guest/load.c`` has the commands.  It prints JSON objects:
``done`` with the guest's answer, the bytes that arrived at their destination, and the seconds that
all of it took; before it ``begun``, for loads that are made ready first.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Final

HOST: Final = "10.77.0.10"
PORT: Final = 7171
BLOCK: Final = 64 * 1024
#: Different blocks that are sent by turns: more than the guest could find again cheaply.
BLOCKS: Final = 64
#: Seconds without a byte after which the guest is given up.
PATIENCE: Final = 120.0


class Refused(Exception):
    """The guest's answer is not the one to this command."""


def ask(service: socket.socket, line: str) -> str:
    """Send a command and wait for its answer, which is returned without its first words.

    :raises Refused: it is an error, or no whole line
    """
    service.sendall(line.encode() + b"\n")
    return _answer(service, line.split()[0])


def _answer(service: socket.socket, command: str) -> str:
    with service.makefile("r") as lines:
        answer = lines.readline()
        if answer == "begun\n":
            print(json.dumps({"event": "begun"}), flush=True)
            answer = lines.readline()
    begin = f"ok {command} "
    if not answer.startswith(begin) or not answer.endswith("\n"):
        raise Refused(f"the guest answered {answer[:80]!r} to {command}; expected {begin!r}")
    return answer.removeprefix(begin).strip()


def bulk_send(service: socket.socket, seconds: float) -> int:
    """Have the guest send for so long; the bytes that came."""
    service.sendall(b"send %f\n" % seconds)
    received = 0
    while data := service.recv(1 << 20):
        received += len(data)
    return received


def bulk_receive(service: socket.socket, seconds: float) -> int:
    """Send to the guest for so long; the bytes that it took.

    :raises Refused: it did not say how many
    """
    blocks = [os.urandom(BLOCK) for _ in range(BLOCKS)]
    service.sendall(b"receive\n")
    end = time.monotonic() + seconds
    number = 0
    while time.monotonic() < end:
        service.sendall(blocks[number % BLOCKS])
        number += 1
    service.shutdown(socket.SHUT_WR)
    return int(_answer(service, "receive"))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="client", description="Ask the guest for a load.")
    parser.add_argument("what", choices=("ask", "send", "receive"))
    parser.add_argument("value", help="a command line, or seconds")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=PORT)
    options = parser.parse_args(argv)
    done: dict[str, object] = {"event": "done", "answer": "", "bytes": 0}
    with socket.create_connection((options.host, options.port), timeout=PATIENCE) as service:
        # A command may take as long as it says; the caller has an eye on the time.
        service.settimeout(None if options.what == "ask" else PATIENCE)
        began = time.monotonic()
        match options.what:
            case "ask":
                done["answer"] = ask(service, options.value)
            case "send":
                done["bytes"] = bulk_send(service, float(options.value))
            case "receive":
                done["bytes"] = bulk_receive(service, float(options.value))
        done["seconds"] = time.monotonic() - began
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
