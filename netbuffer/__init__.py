# SPDX-License-Identifier: Apache-2.0
"""Output commit: hold what a guest sends until told to release it.

- :class:`netbuffer.plug.OutputBuffer` holds the frames of one vif, in epochs;
- :class:`netbuffer.tap.Tap` tells that a frame was held;
- :func:`netbuffer.announce.announce` tells switches where a guest is now;
- :class:`netbuffer.backlog.Backlog` keeps what is sent to a guest while no host runs it;
- :mod:`netbuffer.errors` has all errors.

Knows nothing of Xen or of checkpoints: a vif is any Ethernet device whose received frames matter.
Needs CAP_NET_ADMIN and CAP_NET_RAW, and a kernel with ifb, sch_plug, sch_ingress, cls_matchall and
act_mirred.  How it works, and its limits: ``docs/netbuffer.md``.
"""
