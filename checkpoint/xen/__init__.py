# SPDX-License-Identifier: Apache-2.0
"""Everything that touches Xen: control library, foreign memory, event channels, grants, xenstore.

:func:`open` gives the host's :class:`checkpoint.driver.Hypervisor`; the Xen libraries are loaded
then, not at import.
"""

from __future__ import annotations

from checkpoint.driver import Hypervisor


def open() -> Hypervisor:  # noqa: A001 - read as checkpoint.xen.open()
    """The Xen that this host runs.

    :raise UnsupportedGuest: not a Dom0 of a supported Xen
    """
    from checkpoint.xen.host import XenHost

    return XenHost()
