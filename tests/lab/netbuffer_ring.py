# SPDX-License-Identifier: Apache-2.0
"""How many transmit slots of a guest stay open while its frames are held; a program for a Dom0.

    netbuffer_ring.py VIF ADDRESS tap|bare

Asks the guest's command service at ADDRESS for large datagrams, holds them with or without a tap
on VIF, and prints one line of JSON: held frames, and requests that netback has taken from the ring
and not answered (nr_pending_reqs in its debugfs file), while they are held and after release.
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from pathlib import Path

from netbuffer.plug import OutputBuffer
from netbuffer.tap import Tap

_COMMAND_PORT = 7070
_DATAGRAMS = 5
# Beyond what netback copies of a frame in any case (XEN_NETBACK_TX_COPY_LEN, 128 bytes).
_SIZE = 1400
_PATIENCE = 60.0


def pending(vif: str) -> int:
    """Requests taken from the guest's transmit ring and not yet answered."""
    shown = Path(f"/sys/kernel/debug/xen-netback/{vif}/io_ring_q0").read_text()
    found = re.search(r"nr_pending_reqs (\d+)", shown)
    assert found, shown
    return int(found[1])


def settled(vif: str) -> int:
    """:func:`pending`, once it has been the same for a while."""
    last, since = pending(vif), time.monotonic()
    while time.monotonic() - since < 1.0:
        time.sleep(0.05)
        now = pending(vif)
        if now != last:
            last, since = now, time.monotonic()
    return last


def main(vif: str, address: str, mode: str) -> int:
    asker = socket.create_connection((address, _COMMAND_PORT), timeout=_PATIENCE)
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind((asker.getsockname()[0], 0))
    receiver.settimeout(_PATIENCE)
    tap = Tap(vif) if mode == "tap" else None
    buffer = OutputBuffer(vif)
    buffer.setup()
    try:
        asker.sendall(f"burst {_DATAGRAMS} {receiver.getsockname()[1]} {_SIZE}\n".encode())
        end = time.monotonic() + _PATIENCE
        while buffer.stats().held_bytes < _DATAGRAMS * _SIZE and time.monotonic() < end:
            time.sleep(0.02)
        held = buffer.stats().held_packets
        while_held = settled(vif)
        buffer.close_epoch()
        buffer.release_epoch()
        got = [receiver.recv(2 * _SIZE).split()[0].decode() for _ in range(_DATAGRAMS)]
        after = settled(vif)
    finally:
        buffer.teardown()
        if tap is not None:
            tap.close()
        asker.close()
        receiver.close()
    print(json.dumps({"held": held, "while_held": while_held, "after": after, "got": got}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
