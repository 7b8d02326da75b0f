# SPDX-License-Identifier: Apache-2.0
"""Holding what a guest sends until told to release it.

::

    guest -> vif -> tap -> tc ingress: matchall, redirect -> ifb: sch_plug ... held ...
                                                                |
                   bridge <- the vif's receive path again <-----+ released

All parts are the kernel's.  A frame that the ifb lets go enters the stack again as if the vif had
just received it, behind taps and ingress filters (docs/netbuffer.md), so bridge, firewall and
whatever else see it once and late, but unchanged.  What the guest receives never comes this way.

Every call is synchronous.  :meth:`OutputBuffer.close_epoch` and
:meth:`OutputBuffer.release_epoch` are one netlink request of bytes prepared at setup: two system
calls.  They need the kernel's RTNL lock, as everything does that configures devices: while
another program removes a device, they wait for it.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass

from netbuffer import messages, remains
from netbuffer.epochs import Epochs, Event, PlugAction, State
from netbuffer.errors import (
    BufferLost,
    EpochError,
    InterfaceBusy,
    Leftover,
    MissingKernelPart,
    NetbufferError,
    NetlinkError,
)
from netbuffer.messages import Link
from netbuffer.netlink import Netlink
from netbuffer.remains import Remains, Removal

_log = logging.getLogger(__name__)

#: Default size of the buffer in bytes of frames.
LIMIT_BYTES = 64 << 20
# The kernel's sk_buff, its shared info and the slack of a small frame's data area.
_OVERHEAD_BYTES = 1024
_HOLD_TRIES = 3


@dataclass(frozen=True, slots=True)
class Stats:
    """What a buffer holds.

    :ivar held_packets: frames held now, of all epochs
    :ivar held_bytes: their length
    :ivar memory_bytes: estimate of the kernel memory that they occupy
    :ivar dropped_packets: frames that did not fit since the buffer was set up, modulo 2**32
    :ivar limit_bytes: length of frames at which the kernel begins to drop
    """

    held_packets: int
    held_bytes: int
    memory_bytes: int
    dropped_packets: int
    limit_bytes: int


class OutputBuffer:
    """The output of one vif.

    Not for several threads at once, but for :meth:`stats`, which one thread may ask while another
    closes or releases an epoch.  All calls may be made from an event loop's thread: none waits for
    anything but the kernel.

    :param vif: network device whose received frames are held, e.g. ``vif3.0``
    :param limit_bytes: length of frames that may be held; what exceeds it is dropped by the
        kernel and counted, so stall the guest at :attr:`high_water`
    :param high_water: :meth:`above_high_water` is true from this many bytes of kernel memory on;
        default: half of ``limit_bytes``
    :param drain_timeout: seconds that released frames may take to leave at :meth:`teardown`
    """

    def __init__(
        self,
        vif: str,
        *,
        limit_bytes: int = LIMIT_BYTES,
        high_water: int | None = None,
        drain_timeout: float = 2.0,
    ) -> None:
        if not 0 < limit_bytes < 1 << 32:
            raise ValueError(f"limit_bytes is {limit_bytes}, expected 1 to {(1 << 32) - 1}")
        self.vif = vif
        self.ifb = remains.ifb_name(vif)
        self.limit_bytes = limit_bytes
        self.high_water = limit_bytes // 2 if high_water is None else high_water
        self._drain_timeout = drain_timeout
        self._epochs = Epochs()
        self._netlink: Netlink | None = None
        self._actions: dict[PlugAction, bytearray] = {}
        self._purposes: dict[PlugAction, str] = {}
        self._get = bytearray()

    @property
    def state(self) -> State:
        """What the buffer does with frames now."""
        return self._epochs.state

    @property
    def closed_epoch(self) -> int:
        """Number of the epoch that was closed last, 0 before the first one."""
        return self._epochs.closed

    @property
    def released_epoch(self) -> int:
        """Number of the last epoch whose frames were let go."""
        return self._epochs.released

    # ---- Hot path ----

    def close_epoch(self) -> int:
        """End the epoch that fills: all frames that reached the buffer until now belong to it.

        :return: its number, counted from 1 since setup
        :raise EpochError: an epoch is closed and not released, or the buffer does not hold
        :raise BufferLost: the buffer was taken away
        :raise NetlinkError: the kernel refused; nothing was changed
        :raise NetlinkTimeout: the outcome is not known
        """
        self._step(Event.CLOSE)
        return self._epochs.closed

    def release_epoch(self) -> int:
        """Let go the frames of the closed epoch, in order; all later ones stay held.

        When this returns they have left the buffer, or leave it as fast as the host can.

        :return: the epoch's number
        :raise EpochError: no epoch is closed
        :raise BufferLost, NetlinkError, NetlinkTimeout: as for :meth:`close_epoch`
        """
        self._step(Event.RELEASE)
        return self._epochs.released

    def release_all(self) -> None:
        """Let go everything that is held, in order, and hold nothing from now on.

        :raise EpochError: the buffer is not set up
        :raise BufferLost, NetlinkError, NetlinkTimeout: as for :meth:`close_epoch`
        """
        self._step(Event.RELEASE_ALL)

    def stats(self) -> Stats:
        """What is held and what was dropped, by one request to the kernel.

        :raise EpochError: the buffer is not set up
        :raise BufferLost: the buffer was taken away
        """
        if self._netlink is None:
            raise EpochError("report its statistics", self.state.value, "set up")
        try:
            queue = messages.read_queue(
                self._netlink.get(self._get, f"read the output buffer of {self.vif}")
            )
        except NetlinkError as err:
            raise self._translate(err) from err
        return Stats(
            held_packets=queue.packets,
            held_bytes=queue.backlog_bytes,
            memory_bytes=queue.backlog_bytes + queue.packets * _OVERHEAD_BYTES,
            dropped_packets=queue.drops,
            limit_bytes=self.limit_bytes,
        )

    def above_high_water(self, stats: Stats) -> bool:
        """Whether the guest must be stalled until frames could leave.

        Counts memory and not length: a million small frames is 64 MiB long and 1 GiB large.
        """
        return stats.memory_bytes >= self.high_water

    # ---- Setting up and taking down ----

    def setup(self) -> None:
        """Build the buffer; from the moment that the last part is in place every frame is held.

        Frames are neither lost nor reordered by it: those that arrive earlier pass.  On any error
        everything is as it was before.

        :raise InterfaceNotFound: there is no such vif
        :raise Leftover: there is a buffer for it already: see :func:`reclaim`
        :raise InterfaceBusy: somebody else filters its ingress
        :raise MissingKernelPart: the kernel lacks a module
        :raise NetlinkError: the kernel refused, e.g. for want of CAP_NET_ADMIN
        :raise EpochError: it is set up already
        """
        self._epochs.begin(Event.SETUP)
        netlink = Netlink()
        try:
            vif, own_ingress = self._check(netlink)
            try:
                index = self._build(netlink, vif, own_ingress)
            except BaseException:
                self._take_down(netlink, release=True)
                raise
        except BaseException:
            netlink.close()
            self._epochs.failed(refused=True)
            raise
        self._netlink = netlink
        self._actions = {a: messages.plug_do(index, a, self.limit_bytes) for a in PlugAction}
        self._purposes = {
            PlugAction.BUFFER: f"close an output epoch of {self.vif}",
            PlugAction.RELEASE_ONE: f"release an output epoch of {self.vif}",
            PlugAction.RELEASE_INDEFINITE: f"release the output of {self.vif}",
        }
        self._get = messages.plug_get(index)
        self._epochs.done()

    def hold(self) -> None:
        """Hold again after :meth:`release_all`; does nothing while the buffer holds.

        When this returns, the buffer is empty of what was released, and numbers go on.

        :raise EpochError: the buffer is not set up
        :raise BufferLost, NetlinkError, NetlinkTimeout: as for :meth:`close_epoch`
        """
        if self._epochs.begin(Event.HOLD) is None:
            self._epochs.done()
            return
        try:
            if self._hold_again():
                self._epochs.done()
                return
        except BaseException:
            self._epochs.failed(refused=False)
            raise
        closed = self._epochs.closed
        self._epochs.failed(refused=True)
        self.teardown()
        self.setup()
        # A new plug; the numbers that callers know go on.
        self._epochs.closed = self._epochs.released = closed

    def teardown(self, *, release: bool = True) -> Removal:
        """Remove every part of the buffer; frames of the guest pass afterwards (idempotent).

        :param release: let the held frames go first, in order; False drops them, for when another
            host runs the guest. Then the guest must be stopped here: what it sends after this
            call leaves
        :raise NetlinkError, NetlinkTimeout: the buffer is not, or not all, removed; call again
        """
        self._epochs.begin(Event.TEARDOWN)
        try:
            if self._netlink is None:
                removal = Removal(False, 0, 0)
            else:
                removal = self._take_down(self._netlink, release=release)
        except BaseException:
            self._epochs.failed(refused=False)
            raise
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
        self._epochs.done()
        return removal

    # ---- Machinery ----

    def _step(self, event: Event) -> None:
        action = self._epochs.begin(event)
        if action is not None:
            try:
                self._request(action)
            except (NetlinkError, BufferLost):
                self._epochs.failed(refused=True)
                raise
            except BaseException:
                self._epochs.failed(refused=False)
                raise
        self._epochs.done()

    def _request(self, action: PlugAction) -> None:
        """Send a prepared action."""
        assert self._netlink is not None, "the epochs allow no action before setup"
        try:
            self._netlink.request(self._actions[action], self._purposes[action])
        except NetlinkError as err:
            raise self._translate(err) from err

    def _hold_again(self) -> bool:
        """Make a plug that lets everything pass hold; False when it stays as it was.

        BUFFER strands frames that RELEASE_INDEFINITE has let go and that have not left yet, since
        no epoch counts them.  Seldom: only when the host cannot keep up with the guest.
        """
        assert self._netlink is not None, "the epochs allow no action before setup"
        for _try in range(_HOLD_TRIES):
            self._request(PlugAction.BUFFER)
            if self.stats().held_packets == 0:
                return True
            self._request(PlugAction.RELEASE_INDEFINITE)
            remains.await_drained(self._netlink, self.ifb, self._drain_timeout)
        return False

    def _translate(self, err: NetlinkError) -> NetbufferError:
        if err.errno in (errno.ENODEV, errno.ENOENT, errno.EINVAL):
            return BufferLost(
                f"The output buffer {self.ifb} of {self.vif} was removed or changed by somebody "
                f"else; what the guest sends is lost until it is torn down ({err})"
            )
        return err

    def _check(self, netlink: Netlink) -> tuple[Link, bool]:
        """(the vif, whether it needs an ingress qdisc of ours)."""
        vif = remains.require_link(netlink, self.vif)
        if remains.find_link(netlink, self.ifb) is not None:
            raise Leftover(self.vif, f"device {self.ifb}")
        kind = remains.ingress_kind(netlink, vif.index)
        if kind:
            ours, others = remains.filters(netlink, vif.index)
            if ours:
                raise Leftover(self.vif, "its filter")
            if others:
                raise InterfaceBusy(self.vif, others)
        return vif, not kind

    def _build(self, netlink: Netlink, vif: Link, own_ingress: bool) -> int:
        """Make all parts, the redirection last; the number of the ifb device.

        The ifb holds before it is up, and is up before a frame can come: a redirect to a device
        that is down loses the frame.
        """
        _ask(netlink, messages.ifb_add(self.ifb), f"make {self.ifb}", _IFB)
        ifb = remains.require_link(netlink, self.ifb)
        description = remains.alias(self.vif, own_ingress=own_ingress)
        netlink.request(messages.alias_set(ifb.index, description), f"describe {self.ifb}")
        try:
            netlink.request(messages.ipv6_silence(ifb.index), f"keep IPv6 off {self.ifb}")
        except NetlinkError as err:
            # No IPv6 in this kernel, or none for this device: then it sends nothing either.
            if err.errno not in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                raise
        plug = messages.plug_add(ifb.index, self.limit_bytes)
        _ask(netlink, plug, f"plug {self.ifb}", _PLUG)
        netlink.request(messages.up_set(ifb.index, True), f"set {self.ifb} up")
        if own_ingress:
            ingress = messages.ingress_add(vif.index)
            _ask(netlink, ingress, f"add ingress to {self.vif}", _INGRESS)
        redirect = messages.redirect_add(vif.index, ifb.index)
        _ask(netlink, redirect, f"redirect {self.vif} to {self.ifb}", _MATCHALL, _MIRRED)
        return ifb.index

    def _take_down(self, netlink: Netlink, *, release: bool) -> Removal:
        return remains.take_down(
            netlink, self.vif, release=release, drain_timeout=self._drain_timeout
        )


def leftovers() -> list[Remains]:
    """Every output buffer of this network namespace, also those in use.

    :raise NetlinkError: the kernel refused
    """
    netlink = Netlink()
    try:
        return remains.find(netlink)
    finally:
        netlink.close()


def reclaim(vif: str, *, release: bool, drain_timeout: float = 2.0) -> Removal:
    """Remove what a killed daemon left of the buffer for ``vif`` (idempotent).

    The vif itself may be gone.  ``release`` is for the caller to decide: held frames belong to
    epochs of which nobody here knows whether the standby has them, so let them go only when it is
    certain that the standby will not run the guest from an older state.

    :param release: let the held frames go, in order; False drops them
    :raise NetlinkError: the kernel refused; call again
    """
    netlink = Netlink()
    try:
        removal = remains.take_down(netlink, vif, release=release, drain_timeout=drain_timeout)
    finally:
        netlink.close()
    if removal.found:
        _log.warning(
            "output buffer of %s from before: %d frames released, %d dropped",
            vif,
            removal.released_packets,
            removal.dropped_packets,
        )
    return removal


# ---- What the kernel says when it lacks a part ----

_Part = tuple[int, str, str, str, str]  # errno, words in its detail, part, module, option

_IFB: _Part = (errno.EOPNOTSUPP, "device type", "device type ifb", "ifb", "CONFIG_IFB")
_PLUG: _Part = (errno.ENOENT, "qdisc", "packet scheduler plug", "sch_plug", "CONFIG_NET_SCH_PLUG")
_INGRESS: _Part = (
    errno.ENOENT,
    "qdisc",
    "ingress qdisc",
    "sch_ingress",
    "CONFIG_NET_SCH_INGRESS",
)
_MATCHALL: _Part = (
    errno.ENOENT,
    "classifier",
    "classifier matchall",
    "cls_matchall",
    "CONFIG_NET_CLS_MATCHALL",
)
_MIRRED: _Part = (errno.ENOENT, "action", "action mirred", "act_mirred", "CONFIG_NET_ACT_MIRRED")


def _ask(netlink: Netlink, message: bytearray, purpose: str, *parts: _Part) -> None:
    """A request that fails when the kernel lacks one of ``parts``."""
    try:
        netlink.request(message, purpose)
    except NetlinkError as err:
        for number, words, part, module, option in parts:
            if err.errno == number and (not err.detail or words in err.detail):
                raise MissingKernelPart(part, module, option) from err
        raise
