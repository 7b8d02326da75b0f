# SPDX-License-Identifier: Apache-2.0
"""The lab itself: what it promises to everything that is tried in it."""

from __future__ import annotations

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from vagrant.lablib.errors import LabError
from vagrant.lablib.guest import GuestOptions
from vagrant.lablib.lab import Lab
from vagrant.lablib.network import HOSTS, LAN_ADDRESS
from vagrant.lablib.recipe import recipe_for

# Says whether sshd at an address greets within some seconds: ADDRESS SECONDS.
GREETING = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 22), timeout=float(sys.argv[2])) as server:
        server.settimeout(float(sys.argv[2]))
        print(server.recv(4).decode())
except TimeoutError:
    print("silence")
except OSError as error:
    print("silence" if error.errno == 113 else error)
"""

# Talks to the guest's service over both protocols and prints what came back as JSON.
TALK = """
import json, socket, sys
said = {}
for address in ("10.77.0.10", "fd77::10"):
    with socket.create_connection((address, 7777), timeout=60) as service:
        lines = service.makefile("rw", newline="\\n")
        answers = []
        for number in range(20):
            lines.write(f"m{number}\\n")
            lines.flush()
            answers.append(lines.readline().split())
        said[address] = answers
    with socket.create_connection((address, 7070), timeout=60) as control:
        lines = control.makefile("rw", newline="\\n")
        with socket.socket(control.family, socket.SOCK_DGRAM) as udp:
            udp.bind(("", 0))
            udp.settimeout(60)
            for command in ("dirty 50", "stop", "clock 0.5", f"burst 5 {udp.getsockname()[1]}"):
                lines.write(command + "\\n")
                lines.flush()
                said[f"{address} {command.split()[0]}"] = lines.readline().strip()
            said[f"{address} datagrams"] = [udp.recv(2000).split()[0].decode() for _ in range(5)]
print(json.dumps(said))
"""

# Connects to a host's sshd, says so, and then waits for anything to come: data, an end, an error.
LISTEN_ON = """
import socket, sys
with socket.create_connection((sys.argv[1], 22), timeout=60) as server:
    server.recv(100)
    print("connected", flush=True)
    sys.stdin.readline()
    server.settimeout(8)
    try:
        print("heard", server.recv(100))
    except TimeoutError:
        print("nothing")
"""


def greeting(lab: Lab, address: str, seconds: float) -> str:
    return lab.run_in_net(["python3", "-c", GREETING, address, str(seconds)]).stdout.strip()


def test_both_hosts_are_up_and_run_the_hypervisor_of_the_suite(fresh_lab: Lab) -> None:
    expected = recipe_for(fresh_lab.options.suite)
    for name in HOSTS:
        shown = fresh_lab.ssh(name, "xl info").stdout.splitlines()
        parts = [line.partition(":") for line in shown]
        info = {key.strip(): value.strip() for key, _, value in parts}
        assert info["host"] == name
        assert info["xen_version"].startswith(expected.xen + ".")
        # The dirty log needs hardware-assisted paging, also when it is emulated.
        assert {"hvm", "hap"} <= set(info["virt_caps"].split())


def test_output_can_be_held_by_the_kernel_of_a_host(fresh_lab: Lab) -> None:
    fresh_lab.ssh("a", "ip link add plugtest type ifb && ip link set plugtest up")
    try:
        fresh_lab.ssh("a", "tc qdisc add dev plugtest root plug limit 1000000")
        assert "qdisc plug" in fresh_lab.ssh("a", "tc qdisc show dev plugtest").stdout
        fresh_lab.ssh("a", "tc qdisc add dev plugtest ingress")
        fresh_lab.ssh(
            "a",
            "tc filter add dev plugtest parent ffff: protocol all matchall "
            "action mirred egress redirect dev plugtest",
        )
    finally:
        fresh_lab.ssh("a", "ip link del plugtest")


def test_the_project_is_installed_from_its_wheel(fresh_lab: Lab) -> None:
    recipe = recipe_for(fresh_lab.options.suite)
    found = fresh_lab.ssh(
        "b",
        "python3 -c 'import importlib.metadata as m, kemari, checkpoint.native; "
        'd = m.distribution("kemari"); print(kemari.__file__); '
        "print([str(f) for f in d.files if not f.locate().exists()])' && kemari --help",
    ).stdout.splitlines()
    assert found[0] == f"/{recipe.dist_packages}/kemari/__init__.py"
    assert found[1] == "[]"


def test_kemarid_is_started_again_when_it_is_killed(fresh_lab: Lab) -> None:
    before = fresh_lab.ssh("a", "cat /etc/service/kemarid/supervise/pid").stdout.strip()
    assert before.isdigit()
    fresh_lab.ssh("a", f"kill -9 {before}")
    # `sv up` returns when it runs.
    fresh_lab.ssh("a", f"while kill -0 {before} 2>/dev/null; do :; done; sv -w 60 up kemarid")
    after = fresh_lab.ssh("a", "cat /etc/service/kemarid/supervise/pid").stdout.strip()
    assert after.isdigit()
    assert after != before


def test_an_unplugged_link_is_silent_both_ways_and_the_other_one_is_not(fresh_lab: Lab) -> None:
    assert greeting(fresh_lab, LAN_ADDRESS["a"], 60) == "SSH-"
    fresh_lab.unplug("a", "lan")
    assert fresh_lab.status()["hosts"]["a"]["unplugged"] == ["lan"]
    assert greeting(fresh_lab, LAN_ADDRESS["a"], 4) == "silence"
    assert greeting(fresh_lab, LAN_ADDRESS["b"], 60) == "SSH-"
    assert fresh_lab.ssh("a", "ping -c 1 -W 2 10.77.0.254", check=False).status == 1
    assert fresh_lab.ssh("a", "ping -c 1 -W 30 10.78.0.2").status == 0
    fresh_lab.plug("a", "lan")
    assert greeting(fresh_lab, LAN_ADDRESS["a"], 60) == "SSH-"

    fresh_lab.unplug("b", "repl")
    assert fresh_lab.ssh("a", "ping -c 1 -W 2 10.78.0.2", check=False).status == 1
    assert fresh_lab.ssh("b", "ping -c 1 -W 2 10.78.0.1", check=False).status == 1
    assert fresh_lab.ssh("a", "ping -c 1 -W 30 fd77::2").status == 0
    fresh_lab.plug("b", "repl")
    assert fresh_lab.ssh("b", "ping -c 1 -W 30 10.78.0.1").status == 0


@pytest.mark.long  # every test with a guest talks to it
@pytest.mark.parametrize("vcpus", [1, 2])
def test_the_guest_answers_over_ipv4_and_ipv6_and_shuts_down_when_asked(
    fresh_lab: Lab, vcpus: int
) -> None:
    fresh_lab.guest_start("a", GuestOptions(vcpus=vcpus))
    cpus = fresh_lab.ssh("a", "xl vcpu-list demo").stdout.splitlines()[1:]
    assert len(cpus) == vcpus
    said = json.loads(fresh_lab.run_in_net(["python3", "-c", TALK]).stdout)
    for address in ("10.77.0.10", "fd77::10"):
        answers = said[address]
        assert [answer[:2] for answer in answers] == [[f"m{n}", str(n + 1)] for n in range(20)]
        for clock in (2, 3):
            times = [int(answer[clock]) for answer in answers]
            assert times == sorted(times)
        assert said[f"{address} dirty"] == "ok"
        assert said[f"{address} stop"] == "ok"
        clock_report = said[f"{address} clock"].split()
        assert clock_report[:2] == ["ok", "clock"]
        assert clock_report[clock_report.index("backwards_ns") + 1] == "0"
        assert said[f"{address} burst"] == "ok burst 5 failed 0"
        assert said[f"{address} datagrams"] == ["1", "2", "3", "4", "5"]
    fresh_lab.guest_stop("a")
    assert fresh_lab.ssh("a", "xl domid demo", check=False).status != 0


@pytest.mark.long  # every test that cuts the power relies on it
def test_a_power_cut_says_no_goodbye_and_the_disk_is_as_it_was(fresh_lab: Lab) -> None:
    fresh_lab.ssh("b", "echo kept > /root/kept && sync")
    listener = subprocess.Popen(
        fresh_lab.net_argv(["python3", "-c", LISTEN_ON, LAN_ADDRESS["b"]]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert listener.stdout is not None
    assert listener.stdout.readline() == "connected\n"
    fresh_lab.power_cut("b")
    said, _ = listener.communicate("now\n", timeout=120)
    assert said == "nothing\n"
    with pytest.raises(LabError, match="Host b has no power"):
        fresh_lab.ssh("b", "true")
    with pytest.raises(LabError, match="Host b has no power already"):
        fresh_lab.power_cut("b")
    fresh_lab.boot("b")
    assert fresh_lab.ssh("b", "cat /root/kept && rm /root/kept").stdout == "kept\n"


def test_commands_on_a_host_cost_little(fresh_lab: Lab) -> None:
    """Over one lasting connection each; a login would be several seconds a command."""
    with ThreadPoolExecutor() as pool:
        replies = list(pool.map(lambda n: fresh_lab.ssh("a", f"echo {n}").stdout, range(10)))
    assert replies == [f"{n}\n" for n in range(10)]
    master = fresh_lab.ssh("a", "pgrep -c -f '^sshd: root'").stdout
    assert int(master) <= 2


@pytest.mark.long
def test_a_host_that_does_not_come_up_is_reported_with_its_console(fresh_lab: Lab) -> None:
    fresh_lab.ssh("b", "mv /usr/lib/kemari-lab/init /usr/lib/kemari-lab/init.away && sync")
    fresh_lab.power_cut("b")
    try:
        with pytest.raises(LabError, match="Host b ") as caught:
            fresh_lab.boot("b")
        assert "Kernel panic" in caught.value.details
    finally:
        # Only a fresh disk brings it back.
        fresh_lab.hosts["b"].power_cut()
        fresh_lab.hosts["b"].fresh_disk()
        fresh_lab.boot("b")
