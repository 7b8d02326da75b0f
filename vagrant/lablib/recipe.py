# SPDX-License-Identifier: Apache-2.0
"""What a lab host consists of: one declarative recipe for each Debian suite."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from vagrant.lablib.errors import LabError

# Raised when the way an image is built from a recipe changes without the recipe changing.
IMAGE_FORMAT = 5

COMMON_PACKAGES = (
    "bridge-utils",
    "busybox-static",
    "ca-certificates",
    # Not in every suite by itself; makes and checks the guest's file system.
    "e2fsprogs",
    "iproute2",
    "iputils-arping",
    "iputils-ping",
    "kmod",
    "linux-image-amd64",
    "nbd-client",
    "nbdkit",
    "openssh-server",
    "procps",
    "python3",
    "python3-cffi",
    "python3-click",
    "python3-lz4",
    "python3-pyroute2",
    "python3-pyxs",
    "python3-zstandard",
    # The guest's database.
    "redis-tools",
    "runit",
    "strace",
    "systemd-sysv",
    "tcpdump",
    "udev",
    "xen-utils-common",
    "xenstore-utils",
)

# Needed before Dom0's root file system can be mounted.  crc32c_generic is asked for by name by
# ext4 (crypto_alloc_shash("crc32c")), so modules.dep does not show it.
DOM0_BOOT_MODULES = ("crc32c_generic", "virtio_pci", "virtio_blk", "ext4")

# The guest's own drivers: the real frontends, not built into Debian's kernel, and its file system.
GUEST_MODULES = ("xen-netfront", "xen-blkfront", "crc32c_generic", "ext4")


@dataclass(frozen=True, slots=True)
class Recipe:
    """One suite's Dom0.

    :ivar suite: Debian's name of the release
    :ivar xen: version of the hypervisor as in Debian's package names, e.g. ``4.17``
    :ivar python: version of the interpreter there, e.g. ``3.11``
    :ivar packages: Debian packages asked for by name
    :ivar image_mib: size of the root file system, in MiB; unused space is a hole in the file
    """

    suite: str
    xen: str
    python: str
    packages: tuple[str, ...]
    image_mib: int = 3072

    @property
    def digest(self) -> str:
        """Names everything that decides what the built image holds; 16 hexadecimal digits."""
        material = {
            "format": IMAGE_FORMAT,
            "recipe": asdict(self),
            "boot": DOM0_BOOT_MODULES,
            "guest": GUEST_MODULES,
        }
        return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def dist_packages(self) -> str:
        """Where an administrator's ``pip install`` puts modules on this suite, without a /."""
        return f"usr/local/lib/python{self.python}/dist-packages"


def _recipe(suite: str, xen: str, python: str) -> Recipe:
    packages = (*COMMON_PACKAGES, f"xen-hypervisor-{xen}-amd64", f"xen-utils-{xen}")
    return Recipe(suite, xen, python, tuple(sorted(packages)))


RECIPES = {
    recipe.suite: recipe
    for recipe in (_recipe("bookworm", "4.17", "3.11"), _recipe("trixie", "4.20", "3.13"))
}

# Debian packages that the machine needs on which the lab runs, and one program of each.
NEEDED = {
    "e2fsprogs": ("mkfs.ext4", "debugfs"),
    "gcc": ("gcc",),
    "iproute2": ("ip",),
    "libc6-dev": (),
    # The guest's second database.
    "libsqlite3-dev": (),
    "mmdebstrap": ("mmdebstrap",),
    # The disk's plug-in is compiled with the native module.
    "nbdkit-plugin-dev": (),
    "openssh-client": ("ssh", "ssh-keygen"),
    # The project's native module is compiled on the way to its wheel.
    "python3-dev": (),
    "python3-pip": (),
    "python3-setuptools": (),
    "python3-wheel": (),
    "qemu-system-x86": ("qemu-system-x86_64",),
    "qemu-utils": ("qemu-img",),
    "util-linux": ("unshare", "nsenter"),
    "zlib1g-dev": (),
}


def recipe_for(suite: str) -> Recipe:
    """The recipe of a suite.

    :raises LabError: there is none
    """
    try:
        return RECIPES[suite]
    except KeyError:
        known = " or ".join(RECIPES)
        raise LabError(f"No recipe for suite {suite!r}; expected {known}.") from None
