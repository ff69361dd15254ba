"""Writes down which compiled packages an image has, and fails where one has changed since.

`write FILE` writes `name==version` lines, which pip obeys as constraints; `check FILE` compares.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

KEPT = ("torch", "torchvision", "triton", "pytorch-triton")
KEPT += ("transformer-engine", "apex", "flash-attn")


def lines() -> list[str]:
    """Returns `name==version` of what is installed of `KEPT`."""
    found = []
    for name in KEPT:
        try:
            found.append(f"{name}=={version(name)}")
        except PackageNotFoundError:
            continue
    return found


def main(action: str, file: str) -> int:
    """Returns 1 where a package has changed."""
    if action == "write":
        Path(file).write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
        return 0
    before = set(Path(file).read_text(encoding="utf-8").split())
    changed = sorted(before - set(lines()))
    if changed:
        print(f"replaced or removed: {', '.join(changed)}", file=sys.stderr)
    return int(bool(changed))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
