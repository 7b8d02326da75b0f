# SPDX-License-Identifier: Apache-2.0
"""A client of the echo service that says something only when it is told to.

Run as a program of its own at the client's place in the lab's network, with an IPv4 and an IPv6
connection.  Each line on standard input has one request sent on both; ``said`` has the answers.
"""

from __future__ import annotations

import json
import socket
import sys
import time

from vagrant.demolib.client import GUEST, PORT

#: Seconds to wait for a connection, or for an answer.
PATIENCE = 300.0


def main() -> None:
    """Entry point."""
    streams = [
        socket.create_connection((address, PORT), timeout=PATIENCE).makefile("rw")
        for address in GUEST
    ]
    print(json.dumps({"event": "connected"}), flush=True)
    for number, _ in enumerate(sys.stdin, start=1):
        said = []
        for stream in streams:
            sent = time.monotonic()
            stream.write(f"{number}\n")
            stream.flush()
            words = [int(word) for word in stream.readline().split()]
            said.append({"sent": sent, "words": words})
        print(json.dumps({"event": "said", "number": number, "said": said}), flush=True)


if __name__ == "__main__":
    main()
