# SPDX-License-Identifier: Apache-2.0
"""Whether what the documents refer to in this repository is there, headings included."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`[^`\n]*`")
_HEADING = re.compile(r"^#{1,6} +(.*?)[ #]*$", re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Names of a document's headings in a link, as the usual renderers make them."""
    found: set[str] = set()
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        name = re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")
        number = 0
        while (unique := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(unique)
    return found


def problems(document: Path) -> list[str]:
    """What a document refers to that is not there, as sentences."""
    text = document.read_text()
    found = []
    for link in _LINK.findall(_CODE.sub("", _FENCE.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        name = document.relative_to(ROOT)
        if not target.exists():
            found.append(f"{name} refers to {path}, which is not there")
        elif anchor and target.suffix == ".md" and anchor not in anchors(target.read_text()):
            found.append(f"{name} refers to a heading #{anchor} that {path or name} does not have")
    return found


def main() -> int:
    """Check all documents of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    found = [problem for name in listed for problem in problems(ROOT / name)]
    print("\n".join(found) if found else f"{len(listed)} documents refer to what is there")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
