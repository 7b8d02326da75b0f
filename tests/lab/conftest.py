# SPDX-License-Identifier: Apache-2.0
"""The lab, for tests: brought up once for the session, made ready again where a test asks for it.

``--lab-suite`` chooses Debian's release in Dom0, ``--lab-state`` the lab's folder.  A lab that is
up already is used, with the project as it is now installed, and stays up afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.protection_world import World
from vagrant.lablib.command import extend_path
from vagrant.lablib.errors import LabError
from vagrant.lablib.lab import DEFAULT_SUITE, REPOSITORY, Lab, Options
from vagrant.lablib.recipe import RECIPES

EVIDENCE = (
    "tail -n 60 /var/log/kemari/kemarid.log; xl list; dmesg | tail -n 15; "
    "tail -n 25 /var/log/xen/guest-*.log /var/log/xen/xl-*.log"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lab")
    group.addoption("--lab-suite", choices=list(RECIPES), default=DEFAULT_SUITE)
    group.addoption("--lab-state", type=Path, default=REPOSITORY / "lab-state")


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config) -> Iterator[Lab]:
    """The lab, up, as whatever ran before has left it."""
    extend_path()
    options = Options(pytestconfig.getoption("lab_suite"))
    lab = Lab(pytestconfig.getoption("lab_state"))
    was_up = lab.network.is_up
    try:
        lab.up(options)
        if was_up:
            lab.install()
        yield lab
    finally:
        if not was_up:
            lab.down()


@pytest.fixture
def fresh_lab(lab: Lab) -> Lab:
    """The lab, ready: links plugged, both hosts up, no guest, kemarid without a memory."""
    lab.reset()
    return lab


@pytest.fixture(scope="module")
def shared_world(lab: Lab) -> Iterator[World]:
    """A module's protected guest."""
    world = World(lab)
    yield world
    world.close()


@pytest.fixture
def world(shared_world: World, request: pytest.FixtureRequest) -> Iterator[World]:
    """The world as the last test has left it; new after one that failed."""
    yield from shared_world.for_test(request)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """A test that failed comes with what the hosts have to say."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    # Whatever a test asked for that is a lab: `lab` itself, or `fresh_lab`.
    given = getattr(item, "funcargs", {}).values()
    lab = next((value for value in given if isinstance(value, Lab)), None)
    if report.failed and lab is not None:
        for name, host in lab.hosts.items():
            report.sections.append((f"console of host {name}", host.console_tail(15)))
            try:
                said = lab.ssh(name, EVIDENCE, check=False, timeout=60).stdout
            except LabError as error:
                said = str(error)
            report.sections.append((f"logs of host {name}", said))
