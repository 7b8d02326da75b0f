# SPDX-License-Identifier: Apache-2.0
"""Results of the command line as text for people."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

Status = dict[str, Any]

_COLUMNS = ("guest", "role", "state", "peer", "generation")


def table(entries: Sequence[Status]) -> str:
    """One line for each guest, under a heading; "" when there are none."""
    if not entries:
        return ""
    rows = [[column.upper() for column in _COLUMNS]]
    rows += [[str(entry[column]) or "-" for column in _COLUMNS] for entry in entries]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def statuses(found: Sequence[Status]) -> str:
    """Everything about each guest."""
    return "\n\n".join(_status(status) for status in found) or "No guest is protected here."


def _status(status: Status) -> str:
    lines = [f"{status['guest']}: {_headline(status)}"]
    lines.append(f"  why         {status['why']}")
    lines.append(f"  generation  {status['generation']}, since {_clock(status['since'])}")
    if "epoch" in status:
        lines.append(f"  epoch       {status['epoch']}")
    if status["state"] in ("copying", "connecting") and "progress" in status:
        lines += _first_copy(status["progress"])
    else:
        lines += [_disk_figures(disk) for disk in status.get("disks", ())]
    figures = status.get("statistics")
    if figures and figures.get("checkpoints"):
        lines += _figures(figures)
    return "\n".join(lines)


def _headline(status: Status) -> str:
    peer, host = status["peer"], status["host"]
    match status["role"]:
        case "primary" if status["protected"]:
            return f"protected, runs on {host}, standby {peer}"
        case "primary" if status["state"] == "unprotected":
            return f"runs on {host} UNPROTECTED"
        case "primary":
            return f"{status['state']}, runs on {host}, standby {peer}"
        case "standby":
            return f"runs on {peer}, {host} stands by ({status['state']})"
        case "owner":
            came = f", came from {status['came_from']}" if status["came_from"] else ""
            return f"runs on {host} UNPROTECTED{came}"
        case "none":
            return f"{host} stands by no more for {peer}, and keeps copies of its disks"
    return f"runs on {peer}; {host} must not run it"


def _figures(figures: dict[str, Any]) -> list[str]:
    def spread(name: str, unit: str) -> str:
        values = figures[name]
        return f"p50 {values['p50']:g}, p99 {values['p99']:g}, max {values['max']:g} {unit}"

    return [
        f"  checkpoints {figures['checkpoints']} ({figures['by_output']} for held output, "
        f"{figures['by_interval']} by the interval)",
        f"  pause       {spread('pause_ms', 'ms')}",
        f"  commit      {spread('commit_ms', 'ms')}",
        f"  pages       {spread('pages', '')}".rstrip(),
        f"  sent        {spread('wire_bytes', 'bytes')}",
        f"  stalls      {figures['stalls']} ({figures['stalled_ms']:g} ms), "
        f"{figures['late']} for a standby that it outpaced",
    ]


def protected(status: Status) -> str:
    """The answer to ``kemari start``."""
    if not status["protected"]:
        return f"{status['guest']} is {status['state']}"
    copied = status["progress"]
    what = _size(copied["wire_bytes"])
    disks = sum(disk["total"] for disk in copied["disks"])
    if disks:
        what += f" of memory, {_size(disks)} of disks"
    return (
        f"{status['guest']} is protected to {status['peer']} "
        f"(first copy {what} in {copied['seconds']:.1f} s)"
    )


def progress_line(figures: dict[str, Any]) -> str:
    """How far the first copy is: the disks, then the rounds over the memory."""
    return ", ".join([*_disks_in_short(figures["disks"], figures["round"]), *_memory(figures)])


def _first_copy(figures: dict[str, Any]) -> list[str]:
    """The same for ``kemari status``, with a line for each disk."""
    parts = [*(_disk(copy) for copy in figures["disks"]), ", ".join(_memory(figures))]
    heads = ["  first copy  ", *[" " * 14] * (len(parts) - 1)]
    return [head + part for head, part in zip(heads, parts, strict=True)]


def _memory(figures: dict[str, Any]) -> list[str]:
    seconds = f"{figures['seconds']:.0f} s"
    if figures["round"] == 0:
        return [seconds]
    share = _share(figures["done"], figures["total"])
    return [
        f"round {figures['round']}: {share} of {figures['total']} pages",
        f"{_size(figures['wire_bytes'])} sent",
        seconds,
    ]


def _disks_in_short(copies: Sequence[dict[str, Any]], memory_round: int) -> list[str]:
    """The first disk that is not whole yet, and how many more there are."""
    if memory_round:
        return []
    left = [copy for copy in copies if copy["left"]] or list(copies[-1:])
    if not left:
        return ["begins"]
    more = [f"{len(left) - 1} more to copy"] if left[1:] else []
    return [_disk(left[0]), *more]


def _disk(copy: dict[str, Any]) -> str:
    total = copy["total"]
    done = total - copy["left"]
    return f"disk {copy['vdev']}: {_share(done, total)}, {_mib(done)} of {_mib(total)} MiB"


def _disk_figures(disk: dict[str, Any]) -> str:
    return (
        f"  disk        {disk['vdev']} ({disk['target']}): {_size(disk['unconfirmed'])} not yet on "
        f"the standby's disk, {disk['waits']} waits, {disk['errors']} errors"
    )


def _share(done: int, total: int) -> str:
    return f"{min(100, 100 * done // total) if total else 100:3d} %"


def _mib(count: int) -> str:
    return f"{count / (1 << 20):.0f}"


def event(entry: dict[str, Any]) -> str:
    """One line of the event log."""
    guest = entry.get("guest") or "-"
    return f"{_clock(entry.get('time', 0))}  {entry.get('host', '-')}  {guest}  {entry.get('text')}"


def findings(found: Sequence[dict[str, Any]]) -> str:
    """What ``kemari doctor`` found."""
    return "\n".join(f"{'ok ' if each['ok'] else 'BAD'}  {each['text']}" for each in found)


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
