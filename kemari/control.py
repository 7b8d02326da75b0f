# SPDX-License-Identifier: Apache-2.0
"""The control socket: JSON lines between the command line and the daemon.

A request is one line, ``{"op": NAME, "args": {...}}``.  The answer is any number of lines
``{"progress": {...}}`` and then one of ``{"ok": true, "result": ...}`` or
``{"ok": false, "error": {"code": CODE, "text": SENTENCE}}``.  Requests on one connection are
answered one after the other.  What a client asked for goes on when the client goes away.  The
socket belongs to root alone (mode 0600): whoever may open it may do anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Final

from checkpoint.errors import CheckpointError
from kemari.errors import BY_CODE, DaemonUnreachable, KemariError, Refused

log = logging.getLogger(__name__)

#: Longest request line in bytes.
MAX_REQUEST: Final = 64 << 10
#: Longest answer line in bytes.
MAX_ANSWER: Final = 16 << 20
#: Clients at a time.
MAX_CLIENTS: Final = 32

Progress = Callable[[dict[str, Any]], None]
#: Carries out a request: (operation, arguments, progress) -> JSON value.
Handler = Callable[[str, dict[str, Any], Progress], Awaitable[Any]]


class ControlServer:
    """Serves the control socket.

    :param path: of the socket; a stale one is replaced, one in use is an error
    :param handler: carries out requests; its CheckpointError and KemariError reach the client
    """

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path = path
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begin to serve.

        :raise KemariError: another daemon serves this socket, or it cannot be made
        """
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            if self._path.exists() and stat.S_ISSOCK(self._path.stat().st_mode):
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_unix_connection(self._path)
                    writer.close()
                    raise KemariError(f"Another kemarid serves {self._path}; expected none")
                self._path.unlink()
            mask = os.umask(0o177)
            try:
                self._server = await asyncio.start_unix_server(
                    self._accept, self._path, limit=MAX_REQUEST
                )
            finally:
                os.umask(mask)
        except OSError as error:
            raise KemariError(f"{self._path} cannot be served: {error.strerror}") from error

    async def close(self) -> None:
        """Stop serving; requests under way are cancelled."""
        if self._server is not None:
            self._server.close()
            for task in list(self._clients):
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)
            self._path.unlink(missing_ok=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients.add(task)
        try:
            if len(self._clients) > MAX_CLIENTS:
                _write(writer, _refusal(Refused("Too many requests at once")))
            else:
                await self._serve(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            log.debug("a client of the control socket went away")
        finally:
            self._clients.discard(task)
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                untrusted = await reader.readline()
            except ValueError:
                _write(writer, _refusal(Refused(f"A request is at most {MAX_REQUEST} bytes")))
                return
            if not untrusted.endswith(b"\n"):
                return
            _write(writer, await self._answer(untrusted, writer))
            await writer.drain()

    async def _answer(self, untrusted: bytes, writer: asyncio.StreamWriter) -> dict[str, Any]:
        try:
            operation, arguments = _parse(untrusted)
            result = await self._handler(
                operation, arguments, lambda progress: _write(writer, {"progress": progress})
            )
        except (CheckpointError, KemariError) as error:
            return _refusal(error)
        except Exception as error:
            log.exception("a request failed: %s", untrusted[:200])
            return _refusal(
                KemariError(f"A fault in kemarid: {error!r}; the daemon's log has more")
            )
        return {"ok": True, "result": result}


def _parse(untrusted: bytes) -> tuple[str, dict[str, Any]]:
    try:
        request = json.loads(untrusted)
    except ValueError:
        raise Refused("The request is not JSON") from None
    if not isinstance(request, dict):
        raise Refused("The request is not an object")
    operation, arguments = request.get("op"), request.get("args", {})
    if not isinstance(operation, str) or not isinstance(arguments, dict):
        raise Refused("The request has no operation and arguments")
    return operation, arguments


def _refusal(error: Exception) -> dict[str, Any]:
    code = error.code if isinstance(error, KemariError) else "failed"
    return {"ok": False, "error": {"code": code, "text": str(error)}}


def _write(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")


# ---- The client: plain sockets, because importing asyncio takes longer than the request ----------


def request(
    path: Path,
    operation: str,
    arguments: dict[str, Any],
    progress: Progress = lambda figures: None,
) -> Any:
    """Send a request and return its result.

    :raise DaemonUnreachable: nobody serves the socket, or the daemon went away meanwhile
    :raise KemariError: the daemon's refusal
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as connection:
        try:
            connection.connect(str(path))
            line = json.dumps({"op": operation, "args": arguments}).encode() + b"\n"
            connection.sendall(line)
            for answer in _answers(connection):
                if "progress" in answer:
                    progress(answer["progress"])
                elif answer.get("ok"):
                    return answer.get("result")
                else:
                    error = answer.get("error", {})
                    kind = BY_CODE.get(error.get("code", ""), KemariError)
                    raise kind(error.get("text", "failed"))
        except PermissionError:
            raise DaemonUnreachable(f"{path} may only be used by root") from None
        except OSError as failure:
            raise DaemonUnreachable(
                f"kemarid does not answer on {path}: {failure.strerror}"
            ) from None
    raise DaemonUnreachable("kemarid went away before it had answered")


def _answers(connection: socket.socket) -> Iterator[dict[str, Any]]:
    with connection.makefile("rb") as file:
        while line := file.readline(MAX_ANSWER):
            yield json.loads(line)
