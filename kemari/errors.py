# SPDX-License-Identifier: Apache-2.0
"""Errors of the product.

::

    KemariError                may be shown to an administrator as it is
    ├── ConfigError            /etc/kemari/kemari.toml does not say what it should
    ├── Refused                a request that cannot be met in the present state
    │   └── NoSuchProtection   the domain does not exist, or is not protected on this host
    ├── PeerError              the other host answered, and said no or nothing sensible
    │   └── PeerUnreachable    no answer from the other host
    └── DaemonUnreachable      kemarid does not answer on its control socket

Each class has the exit status that the command line ends with (see ``docs/cli.md``).  Messages
state the fact and what was expected, in one sentence: no commands, no blame, no second person.
"""

from __future__ import annotations


class KemariError(Exception):
    """Base of all errors that this package raises on purpose.

    :cvar status: exit status of the command line
    :cvar code: the error's name in the control protocol and in ``--json``
    """

    status = 1
    code = "failed"


class ConfigError(KemariError):
    """The configuration file does not say what it should."""

    code = "config"


class Refused(KemariError):
    """A request that cannot be met in the present state."""

    code = "refused"


class NoSuchProtection(Refused):
    """The domain does not exist, or is not protected on this host."""

    status = 4
    code = "no-such-protection"


class PeerError(KemariError):
    """The other host answered, and said no or nothing sensible."""

    code = "peer"


class PeerUnreachable(PeerError):
    """No answer from the other host."""

    status = 5
    code = "peer-unreachable"


class DaemonUnreachable(KemariError):
    """kemarid does not answer on its control socket."""

    status = 3
    code = "daemon-unreachable"


#: Error classes by their name in the control protocol.
BY_CODE: dict[str, type[KemariError]] = {
    kind.code: kind
    for kind in (
        KemariError,
        ConfigError,
        Refused,
        NoSuchProtection,
        PeerError,
        PeerUnreachable,
        DaemonUnreachable,
    )
}
