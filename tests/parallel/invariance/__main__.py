"""Runs every layout and keeps the numbers; `make invariance` is this, on both Megatrons.

python -m tests.parallel.invariance measure FILE           every layout, on the Megatron found
python -m tests.parallel.invariance write DOCUMENT FILE..  what was measured, as tables
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from rich.console import Console
from rich.progress import track

from tests.parallel.invariance.compare import Differences, compare
from tests.parallel.invariance.inputs import write_inputs
from tests.parallel.invariance.layouts import Layout, full_product
from tests.parallel.invariance.report import Measured, document, failures, measured, table
from tests.parallel.invariance.run import Seen, run
from tests.ranks import RankPools

LAYOUTS_A_CALL = 3


def measure(console: Console, file: Path, side_by_side: int) -> Measured:
    """Runs the full product, on so many pools of ranks at a time.

    The file is written after every call: a run that is cut off leaves what it has.
    """
    started, rows = time.monotonic(), []
    idle: SimpleQueue[RankPools] = SimpleQueue()
    for _ in range(side_by_side):
        idle.put(RankPools())
    plain: dict[Layout, Seen] = {}

    def differences(layouts: list[Layout]) -> list[tuple[Layout, dict[str, Differences]]]:
        pools, folder = idle.get(), folders[layouts[0].tied]
        found = run(pools(layouts[0].ranks), folder, layouts)
        idle.put(pools)
        return [
            (layout, compare(folder, seen, plain[layout.plain]))
            for layout, seen in zip(layouts, found, strict=True)
        ]

    with tempfile.TemporaryDirectory(prefix="invariance-") as root:
        folders = {tied: write_inputs(Path(root) / str(tied), tied=tied) for tied in (False, True)}
        calls, pools = _calls(), idle.get()
        for layout in {layout.plain for layouts in calls for layout in layouts}:
            plain[layout] = run(pools(1), folders[layout.tied], [layout])[0][0]
        idle.put(pools)
        with ThreadPoolExecutor(side_by_side) as executor:
            done = executor.map(differences, calls)
            for found in track(done, "layouts", len(calls), console=console, transient=True):
                rows += found
                file.write_text(json.dumps(measured(rows, time.monotonic() - started)))
    for _ in range(side_by_side):
        idle.get().close()
    return measured(rows, time.monotonic() - started)


def _calls() -> list[list[Layout]]:
    """The full product, a few layouts of one shape at a time: setting up a shape costs as much.

    Every shape has its first turn before any has its second.
    """
    shapes: defaultdict[tuple[str, bool], list[Layout]] = defaultdict(list)
    for layout in full_product():
        shapes[layout.shape, layout.tied].append(layout)
    most = max(len(layouts) for layouts in shapes.values())
    return [
        layouts[first : first + LAYOUTS_A_CALL]
        for first in range(0, most, LAYOUTS_A_CALL)
        for layouts in shapes.values()
        if first < len(layouts)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parallel.invariance")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("file", type=Path)
    measuring.add_argument("--side-by-side", type=int, default=2, help="pools of ranks")
    write = commands.add_parser("write")
    write.add_argument("document", type=Path)
    write.add_argument("files", type=Path, nargs="+")
    asked, console = parser.parse_args(), Console(width=120)
    if asked.command == "write":
        found = [json.loads(file.read_text()) for file in asked.files]
        asked.document.write_text(document(found))
        return 0
    found = measure(console, asked.file, asked.side_by_side)
    console.print(table(found))
    for line in failures(found):
        console.print(line, style="red", highlight=False)
    return 1 if failures(found) else 0


if __name__ == "__main__":
    sys.exit(main())
