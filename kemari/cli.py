# SPDX-License-Identifier: Apache-2.0
"""``kemari``: the command line.  Talks to ``kemarid`` over its control socket.

Imports are few and late: this program also runs on slow machines.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from kemari import __version__
from kemari.errors import KemariError

#: Exit statuses; ``docs/cli.md`` explains them.  2 is click's own, for wrong usage.
OK, FAILED, USAGE, NO_DAEMON, NOT_PROTECTED, NO_PEER = range(6)

DEFAULT_SOCKET = "/run/kemari/kemarid.sock"


class Client:
    """What all subcommands share.

    :param socket: the daemon's control socket
    :param as_json: print one JSON value instead of text
    """

    def __init__(self, socket: str, as_json: bool = False) -> None:
        self.socket = Path(socket)
        self.as_json = as_json

    def request(
        self,
        operation: str,
        arguments: dict[str, Any],
        progress: Callable[[dict[str, Any]], None] = lambda figures: None,
    ) -> Any:
        """Ask the daemon; a refusal ends the program."""
        from kemari.control import request

        try:
            return request(self.socket, operation, arguments, progress)
        except KemariError as error:
            self.fail(error)
        except KeyboardInterrupt:
            sys.exit(130)

    def fail(self, error: KemariError) -> NoReturn:
        """End with the error's sentence and status."""
        if self.as_json:
            click.echo(json.dumps({"error": {"code": error.code, "text": str(error)}}))
        click.echo(f"kemari: {error}", err=True)
        sys.exit(error.status)

    def show(self, value: Any, render: Callable[[Any], str]) -> None:
        """Print a result."""
        text = json.dumps(value, indent=2) if self.as_json else render(value)
        if text:
            click.echo(text)


def _common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every subcommand has."""

    def set_json(context: click.Context, _option: click.Parameter, value: bool) -> None:
        context.obj.as_json = context.obj.as_json or value

    return click.option(
        "--json",
        is_flag=True,
        expose_value=False,
        callback=set_json,
        help="Print JSON instead of text.",
    )(click.pass_obj(command))


def _complete_guest(
    context: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[str]:
    """Names of guests that the daemon knows, for the shell's completion."""
    from kemari.control import request

    try:
        socket = context.find_root().params.get("socket") or DEFAULT_SOCKET
        known = request(Path(socket), "list", {})
    except KemariError:
        return []  # completion has no way to say so
    return [entry["guest"] for entry in known if entry["guest"].startswith(incomplete)]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kemari")
@click.option(
    "--socket",
    default=DEFAULT_SOCKET,
    show_default=True,
    envvar="KEMARI_SOCKET",
    help="Control socket of kemarid.",
)
@click.pass_context
def cli(context: click.Context, socket: str) -> None:
    """Keep Xen guests running through the power cut of their host."""
    context.obj = Client(socket)


@cli.command()
@click.argument("domain")
@click.argument("standby")
@click.option(
    "-i",
    "--interval",
    type=click.IntRange(10, 60_000),
    metavar="MS",
    help="Longest time between two checkpoints (default: the configuration's).",
)
@click.option(
    "--interval-only", is_flag=True, help="Checkpoints by the timer only, not for held output."
)
@click.option(
    "--pace",
    type=click.Choice(["latency", "adaptive", "throughput"]),
    help="What comes first between two checkpoints (default: the configuration's).",
)
@click.option(
    "--compression",
    type=click.Choice(["none", "lz4", "zstd"]),
    help="Compression of replicated pages (default: the configuration's).",
)
@click.option("--wait/--no-wait", default=True, help="Wait for the first checkpoint (default).")
@click.option(
    "--progress/--no-progress",
    default=None,
    help="Show the first copy's progress (default: on a terminal).",
)
@_common
def start(
    client: Client,
    domain: str,
    standby: str,
    interval: int | None,
    interval_only: bool,
    pace: str | None,
    compression: str | None,
    wait: bool,
    progress: bool | None,
) -> None:
    """Protect DOMAIN to STANDBY.

    DOMAIN is a name or a number.  STANDBY is a host named in the configuration, or an address.
    Returns when the first checkpoint is acknowledged: from then on the guest survives.
    """
    from kemari.render import progress_line, protected

    arguments: dict[str, Any] = {
        "domain": domain,
        "standby": standby,
        "interval_only": interval_only,
        "wait": wait,
    }
    if interval is not None:
        arguments["interval_ms"] = interval
    if pace is not None:
        arguments["pace"] = pace
    if compression is not None:
        arguments["compression"] = compression
    shows = sys.stderr.isatty() if progress is None else progress
    drawn = False

    def draw(figures: dict[str, Any]) -> None:
        nonlocal drawn
        drawn = True
        click.echo(f"\r{progress_line(figures):<72}", err=True, nl=False)

    status = client.request("start", arguments, draw if shows else lambda figures: None)
    if drawn:
        click.echo(err=True)
    client.show(status, protected)


@cli.command()
@click.argument("domain", shell_complete=_complete_guest)
@click.option(
    "--force",
    is_flag=True,
    help="Let output go without the standby's promise. Only if the standby is surely off.",
)
@_common
def stop(client: Client, domain: str, force: bool) -> None:
    """End the protection of DOMAIN; the guest goes on."""
    result = client.request("stop", {"domain": domain, "force": force})
    client.show(result, lambda value: str(value["text"]))


@cli.command()
@click.argument("domain", shell_complete=_complete_guest)
@_common
def failover(client: Client, domain: str) -> None:
    """Move DOMAIN to its standby now, planned: nothing is lost."""
    result = client.request("failover", {"domain": domain})
    client.show(
        result,
        lambda value: (
            f"{value['guest']} runs on {value['host']}, unprotected; "
            f"moving it took {value['seconds']:.1f} s"
        ),
    )


@cli.command()
@click.argument("domain", shell_complete=_complete_guest)
@click.option(
    "--force",
    is_flag=True,
    help="Although it may be the only good copy.",
)
@_common
def forget(client: Client, domain: str, force: bool) -> None:
    """Forget DOMAIN, which has nothing to do with this host any more.

    Its name goes from the list, and the copies of its disks are free for other use; their contents
    stay as they are.
    """
    result = client.request("forget", {"domain": domain, "force": force})
    client.show(result, lambda value: str(value["text"]))


@cli.command()
@click.argument("domain", required=False, shell_complete=_complete_guest)
@_common
def status(client: Client, domain: str | None) -> None:
    """Show how DOMAIN, or every guest known here, fares."""
    from kemari.render import statuses

    found = client.request("status", {"domain": domain} if domain else {})
    client.show(found, statuses)


@cli.command("list")
@_common
def list_(client: Client) -> None:
    """List the guests known here, one on a line."""
    from kemari.render import table

    client.show(client.request("list", {}), table)


@cli.command()
@click.argument("domain", required=False, shell_complete=_complete_guest)
@click.option("-f", "--follow", is_flag=True, help="Go on with new events as they come.")
@click.option(
    "-n", "--lines", type=click.IntRange(1, 10_000), default=100, show_default=True, metavar="N"
)
@_common
def log(client: Client, domain: str | None, follow: bool, lines: int) -> None:
    """Show what was decided and why, for DOMAIN or all guests."""
    from kemari.render import event

    arguments: dict[str, Any] = {"last": lines, "follow": follow}
    if domain:
        arguments["domain"] = domain

    def say(entry: dict[str, Any]) -> None:
        click.echo(json.dumps(entry) if client.as_json else event(entry))

    entries = client.request("log", arguments, say)
    client.show(entries, lambda found: "\n".join(event(entry) for entry in found))


@cli.command()
@click.argument("domain", required=False)
@_common
def doctor(client: Client, domain: str | None) -> None:
    """Check what this host, and DOMAIN if named, needs to be protected."""
    from kemari.doctor import examine
    from kemari.render import findings

    found = examine(client.socket, domain or "")
    client.show(found, findings)
    if any(not finding["ok"] for finding in found):
        sys.exit(FAILED)


def main() -> None:
    """Entry point of ``kemari``."""
    cli(prog_name="kemari")


if __name__ == "__main__":
    main()
