# SPDX-License-Identifier: Apache-2.0
"""Domains that cannot be protected, and a host that has no room: made paused, never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vagrant.lablib.lab import Lab


@contextmanager
def paused_domain(lab: Lab, host: str, name: str, *lines: str, memory: int = 128) -> Iterator[None]:
    """A domain of this name on a host, with the guest's kernel, created paused.

    :param lines: further lines of its configuration
    :param memory: in MiB
    """
    config = "\n".join([f'name = "{name}"', f"memory = {memory}", "vcpus = 1", *lines])
    file = f"/root/{name}.cfg"
    text = config.encode() + b"\n"
    lab.ssh(host, f"cat > {file}; grep ^kernel /root/guest.cfg >> {file}", stdin=text)
    lab.ssh(host, f"xl create -q -p {file}")
    try:
        yield
    finally:
        lab.ssh(host, f"xl destroy {name}; rm {file}")


def free_memory(lab: Lab, host: str) -> int:
    """Memory in MiB that a host could give to guests."""
    for line in lab.ssh(host, "xl info").stdout.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "free_memory":
            return int(value)
    raise AssertionError(f"`xl info` on host {host} tells no free_memory")
