# SPDX-License-Identifier: Apache-2.0
"""The product: command line, daemon, protection life cycle, failover, configuration.

``kemari`` joins the engine (:mod:`checkpoint`) and the output buffer (:mod:`netbuffer`), which know
nothing of each other nor of this package.  Decisions are made by cores without I/O
(:mod:`kemari.epoch`, :mod:`kemari.successor`, :mod:`kemari.liveness`, :mod:`kemari.ledger`); the
asyncio code around them carries the decisions out.
"""

__version__ = "0.1.0"
