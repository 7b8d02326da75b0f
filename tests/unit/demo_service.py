# SPDX-License-Identifier: Apache-2.0
"""A service like the guest's, on this machine."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Service:
    """Answers as the guest's service does; can fall silent, and misbehave once.

    :ivar misbehave: what to do instead of answering: "twice", "swap", "close", "nonsense" or ""
    """

    def __init__(self) -> None:
        self.answering = threading.Event()
        self.answering.set()
        self.misbehave = ""
        self.largest_burst = 0
        self._listener = socket.create_server(
            ("::", 0), family=socket.AF_INET6, dualstack_ipv6=True
        )
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        count, read, kept = 0, b"", b""
        # A client that ends does not wait for what is still unanswered.
        with connection, contextlib.suppress(ConnectionError):
            while data := connection.recv(65536):
                self.answering.wait()
                *lines, read = (read + data).split(b"\n")
                self.largest_burst = max(self.largest_burst, len(lines))
                out = b""
                for line in lines:
                    count += 1
                    now = time.monotonic_ns()
                    answer = b"%s %d %d %d %d\n" % (line, count, now, now + 5, time.time_ns())
                    trick, self.misbehave = self.misbehave, ""
                    match trick:
                        case "twice":
                            out += answer
                        case "swap":
                            kept, answer = answer, b""
                        case "nonsense":
                            answer = b"what?\n"
                        case "close":
                            return
                    out += answer
                    if kept and answer:
                        out, kept = out + kept, b""
                connection.sendall(out)

    def close(self) -> None:
        self.answering.set()
        self._listener.close()
