# SPDX-License-Identifier: Apache-2.0
"""Seeing that a guest has sent something, at once and at next to no cost.

A packet socket on the vif does two jobs:

*The trigger.*  It becomes readable when the guest sends a frame, so an event loop can begin a
checkpoint as soon as output is held, without polling.

*The cure for lent pages.*  xen-netback lends the pages of a frame (all but its first bytes) to
the network stack without copying and answers the guest's request only when the stack frees the
frame (``xenvif_zerocopy_callback`` in Linux ``drivers/net/xen-netback/netback.c``).  In an output
buffer that would be after the release: held frames would keep transmit ring slots open, and a
checkpoint would never see the ring at rest.  For every frame that it hands to a packet socket the
kernel first copies lent pages and gives them back (``deliver_skb`` calls ``skb_orphan_frags_rx``,
Linux ``net/core/dev.c``).  The redirection alone does not: it passes on the frame itself
(``tcf_mirred``, Linux ``net/sched/act_mirred.c``: no clone for a redirect at ingress).

Why each frame is seen exactly once, and before it is held (``__netif_receive_skb_core``, Linux
``net/core/dev.c``): packet sockets for all protocols come first, and the last of them is served
at the beginning of ``sch_handle_ingress``, before its filters run; a frame that ifb lets go
carries ``tc_skip_classify`` (``ifb_ri_tasklet``, Linux ``drivers/net/ifb.c``) and passes by
packet sockets and ingress filters to the label ``skip_classify``.
"""

from __future__ import annotations

import errno
import socket

from netbuffer import packets
from netbuffer.errors import InterfaceNotFound, TapError

_PACKET_IGNORE_OUTGOING = 23  # Linux linux/if_packet.h, since 4.20
_SNAP_BYTES = 1
_DRAIN_MAX = 64


class Tap:
    """A packet socket that sees every frame *from* the guest behind ``vif``, and keeps one byte.

    Its receive buffer is as small as the kernel allows: when it is full, further frames cost one
    comparison each, and the socket stays readable.  Lent pages are given back also for those.

    Open it before the guest may send, close it after the buffer is torn down.

    :param vif: network device, e.g. ``vif3.0``
    :raise InterfaceNotFound: there is no such device
    :raise TapError: the kernel refused, e.g. for want of CAP_NET_RAW
    """

    def __init__(self, vif: str) -> None:
        self.vif = vif
        self._scratch = bytearray(_SNAP_BYTES)
        try:
            self._socket = packets.unbound()
        except PermissionError:
            raise TapError(f"A packet socket on {vif} needs CAP_NET_RAW") from None
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            self._socket.setsockopt(packets.SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
            # One byte of each frame; none would mean not to see it.
            packets.attach(self._socket, [(packets.RETURN, 0, 0, _SNAP_BYTES)])
            self._socket.bind((vif, packets.EVERY_KIND))
        except OSError as err:
            self._socket.close()
            if err.errno == errno.ENODEV:
                raise InterfaceNotFound(vif) from None
            raise TapError(f"Frames on {vif} cannot be seen: {err.strerror}") from err

    def fileno(self) -> int:
        """The file descriptor, for an event loop; -1 once closed."""
        return self._socket.fileno()

    def drain(self) -> int:
        """Forget what was seen; number of frames read, 0 if there was none.

        Not the number of frames that the guest sent: most do not fit.  At most 64 system calls;
        what is left after those makes the socket readable again.

        Drain *before* the epoch is closed: a frame that comes in between then triggers one
        checkpoint that was not needed, while drained after closing it would trigger none.

        :raise TapError: the device is gone or down
        """
        for count in range(_DRAIN_MAX):
            try:
                self._socket.recv_into(self._scratch)
            except BlockingIOError:
                return count
            except OSError as err:
                raise TapError(f"Frames on {self.vif} are no longer seen: {err.strerror}") from err
        return _DRAIN_MAX

    def close(self) -> None:
        """Close the socket (idempotent)."""
        self._socket.close()

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
