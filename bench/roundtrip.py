# SPDX-License-Identifier: Apache-2.0
"""How long an empty replication link takes there and back: what no checkpoint can do without.

One Dom0 sends as many bytes as a checkpoint has when the guest answers requests, the other answers
with as many as an ack has, over TCP without delay; both programs do nothing else.
"""

from __future__ import annotations

import json
import shlex
from typing import Final

from bench.ways import PRIMARY, STANDBY, STANDBY_ADDRESS
from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import Lab

#: Of nobody else in the lab.
PORT: Final = 7999
#: Bytes that go there, and those that come back.
THERE: Final = 6144
BACK: Final = 32
#: Round trips before and while times are taken.
WARM: Final = 20
COUNTED: Final = 400
#: Seconds after which either side gives up.
PATIENCE: Final = 60

_ANSWER = f"""
import os, socket
server = socket.create_server(("", {PORT}))
server.settimeout({PATIENCE})
if os.fork():
    # Only now may the other side begin.
    os._exit(0)
os.setsid()
for descriptor in (0, 1, 2):
    os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
link, _ = server.accept()
link.settimeout({PATIENCE})
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
for _ in range({WARM + COUNTED}):
    wanted = {THERE}
    while wanted:
        wanted -= len(link.recv(wanted)) or os._exit(1)
    link.sendall(bytes({BACK}))
"""

_ASK = f"""
import json, os, socket, sys, time
link = socket.create_connection((sys.argv[1], {PORT}), timeout={PATIENCE})
link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
frame, times = os.urandom({THERE}), []
for _ in range({WARM + COUNTED}):
    begin = time.monotonic()
    link.sendall(frame)
    if len(link.recv({BACK}, socket.MSG_WAITALL)) < {BACK}:
        raise SystemExit("the other side is gone")
    times.append(1000 * (time.monotonic() - begin))
times = sorted(times[{WARM}:])
print(json.dumps(times[len(times) // 2]))
"""


def measure(lab: Lab, address: str = STANDBY_ADDRESS) -> float:
    """The median in milliseconds, while no guest runs.

    :param address: of the standby
    :raises LabError: the hosts do not reach each other, or tell something else
    """
    for host, script in ((STANDBY, _ANSWER), (PRIMARY, _ASK)):
        shown = lab.ssh(host, shlex.join(["python3", "-S", "-c", script, address])).stdout
    try:
        return float(json.loads(shown))
    except (ValueError, TypeError):
        raise LabError("The link's round trip cannot be read; expected a number.", shown) from None
