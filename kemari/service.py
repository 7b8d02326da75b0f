# SPDX-License-Identifier: Apache-2.0
"""``kemarid`` as a process: arguments, logging, signals, the service manager."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoint.driver import Hypervisor
from checkpoint.errors import CheckpointError
from kemari import __version__, config, faultpoints
from kemari.daemon import Daemon
from kemari.errors import KemariError
from kemari.notify import notify, watchdog_interval
from kemari.output import Network

log = logging.getLogger(__name__)

#: syslog priorities, which journald reads at the start of a line of stderr (sd-daemon(3)).
_PRIORITIES = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


class _JournalFormatter(logging.Formatter):
    """``<6>message``: journald adds time and name itself."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record).replace("\n", "\n ")
        return f"<{_PRIORITIES.get(record.levelno, 6)}>{text}"


def set_up_logging(*, debug: bool, journald: bool) -> None:
    """Log to stderr, in the form of whoever reads it."""
    handler = logging.StreamHandler()
    if journald:
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG if debug else logging.INFO, handlers=[handler])


def open_host(kind: str, host: str) -> tuple[Hypervisor, Network]:
    """The hypervisor and the network of this machine.

    :param kind: "xen", or "memory" for tests: then a guest named ``demo-HOST`` runs
    :raise CheckpointError: there is no such hypervisor here
    """
    if kind == "memory":
        from checkpoint.memory import MemoryHypervisor
        from kemari.memory import MemoryNetwork, Switch

        network = MemoryNetwork(host, Switch())
        hypervisor = MemoryHypervisor(network.transmit)
        hypervisor.boot(f"demo-{host}")
        return hypervisor, network
    import checkpoint.xen
    from kemari.frames import FrameNetwork

    return checkpoint.xen.open(), FrameNetwork()


async def serve(daemon: Daemon) -> None:
    """Run a daemon until SIGTERM or SIGINT, then end it in good order."""
    loop = asyncio.get_running_loop()
    ending = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    await daemon.start()
    # What was made so far stays: without this, a look for garbage goes through every module again
    # and again, and stops the daemon in the middle of an epoch for as long as many epochs take.
    gc.collect()
    gc.freeze()
    notify(f"READY=1\nSTATUS=Serving on {', '.join(daemon.host.advertised)}")
    interval = watchdog_interval()
    while not ending.is_set():
        if interval:
            notify("WATCHDOG=1")
        try:
            async with asyncio.timeout(interval or None):
                await ending.wait()
        except TimeoutError:
            continue
    notify("STOPPING=1")
    await daemon.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``kemarid``."""
    parser = argparse.ArgumentParser(
        prog="kemarid", description="Keep Xen guests running through the power cut of their host."
    )
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH, metavar="FILE")
    parser.add_argument(
        "--hypervisor", choices=("xen", "memory"), default="xen", help="memory is for tests only"
    )
    parser.add_argument("--check", action="store_true", help="check the configuration and end")
    parser.add_argument("--debug", action="store_true", help="log more, with tracebacks")
    parser.add_argument("--version", action="version", version=f"kemarid {__version__}")
    options = parser.parse_args(arguments)
    set_up_logging(debug=options.debug, journald="JOURNAL_STREAM" in os.environ)
    try:
        settings = config.load(options.config)
        if options.check:
            return
        faultpoints.arm_from_environment(settings.paths.run)
        hypervisor, network = open_host(options.hypervisor, settings.host)
        asyncio.run(serve(Daemon(settings, hypervisor, network)))
    except (CheckpointError, KemariError) as error:
        log.debug("kemarid ends", exc_info=error)
        print(f"kemarid: {error}", file=sys.stderr)
        sys.exit(1)
