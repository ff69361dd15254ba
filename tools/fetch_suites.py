"""Fetches public evaluation suites and writes them in the format of docs/evaluation.md.

    python tools/fetch_suites.py math500 aime24 aime25 livemath olympiad --output suites
    python tools/fetch_suites.py math500 --from a/copy/of/test.jsonl --output suites
    python tools/fetch_suites.py                                # what there is, under which licence

Needs network to the Hugging Face hub, or a copy (--from). Beside NAME.jsonl it leaves NAME.json:
title, source, licence, number of questions, and the checksum of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.suite_sources import SUITES, convert
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write_text


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 and one line where a user can mend it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suites", nargs="*", metavar="NAME", help=", ".join(SUITES))
    parser.add_argument("--output", type=Path, default=Path("suites"), metavar="FOLDER")
    parser.add_argument("--from", dest="copy", metavar="SOURCE", help="a copy of the one suite")
    options = parser.parse_args(arguments)
    if not options.suites:
        Console().print(_table())
        return 0
    try:
        if options.copy and len(options.suites) > 1:
            raise UserError(f"--from={options.copy}: is of one suite; name one")
        for name in options.suites:
            _fetch(name, options.copy, options.output)
    except (UserError, OSError) as error:
        print(f"fetch_suites: {error}", file=sys.stderr)
        return 2
    return 0


def _fetch(name: str, copy: str | None, folder: Path) -> None:
    lines = convert(name, copy)
    suite = SUITES[name]
    text = "".join(f"{to_json(line)}\n" for line in lines)
    about = {
        "title": suite.title,
        "source": copy or suite.url,
        "licence": suite.licence,
        "questions": len(lines),
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / f"{name}.jsonl", text)
    atomic_write_text(folder / f"{name}.json", f"{to_json(about, indent=2)}\n")
    known = suite.questions in (None, len(lines))
    expected = "" if known else f", not the {suite.questions} expected"
    print(f"{folder / name}.jsonl: {len(lines)} questions{expected}; licence: {suite.licence}")


def _table() -> Table:
    table = Table("suite", "questions", "what", "licence", "source")
    for name, suite in SUITES.items():
        table.add_row(name, str(suite.questions or "?"), suite.title, suite.licence, suite.url)
    return table


if __name__ == "__main__":
    sys.exit(main())
