# SPDX-License-Identifier: Apache-2.0
"""What differs between the Xen releases that Kemari knows: one table.

``libxenctrl`` changes its soname with every release and promises no ABI; the other libraries
keep theirs.  A release that is not in the table is refused by name, because a structure that has
moved would be found out only by damage.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from checkpoint.errors import UnsupportedGuest


@dataclass(frozen=True, slots=True)
class Release:
    """Facts of one Xen release.

    :ivar name: "MAJOR.MINOR" as in ``/sys/hypervisor/version``
    :ivar libxenctrl: soname of the control library
    :ivar libxenguest: soname of the domain builder's library, which has the CPU policy calls
    :ivar python_path: where Debian keeps ``xen.lowlevel`` for this release
    :ivar domctl: ``XEN_DOMCTL_INTERFACE_VERSION`` (xen/include/public/domctl.h): Xen refuses a
        control call that was written for another one
    """

    name: str
    libxenctrl: str
    libxenguest: str
    python_path: str
    domctl: int


def _release(name: str, domctl: int) -> Release:
    return Release(
        name,
        f"libxenctrl.so.{name}",
        f"libxenguest.so.{name}",
        f"/usr/lib/xen-{name}/lib/python",
        domctl,
    )


#: xc_dominfo, domctl and save-record layouts compared with the headers of each release
RELEASES = {release.name: release for release in (_release("4.17", 0x15), _release("4.20", 0x17))}


def running_release(root: Path = Path("/sys/hypervisor")) -> Release:
    """The release that this host runs.

    :raise UnsupportedGuest: when this is not a Xen Dom0, or the release is not in the table
    """
    try:
        kind = (root / "type").read_text().strip()
        major = (root / "version/major").read_text().strip()
        minor = (root / "version/minor").read_text().strip()
    except OSError:
        raise UnsupportedGuest("this host does not run Xen (expected a Xen Dom0)") from None
    name = f"{major}.{minor}"
    release = RELEASES.get(name)
    if kind != "xen" or release is None:
        known = ", ".join(RELEASES)
        raise UnsupportedGuest(f"Xen {name} is not supported (expected one of {known})")
    return release
