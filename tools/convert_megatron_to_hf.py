"""Joins the weights of a Megatron layout to a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.weights.convert import convert_to_hf, run_tool

EPILOG = """
The source is what convert_hf_to_megatron.py wrote, for any layout; its config.json and tokenizer
go along. Values are not converted. One file of --shard-mib at a time is held in memory on each
rank. The folder gets its name once everything was read back and compared. A Hugging Face folder as
the source is written anew in shards of another size.

examples:
  python tools/convert_megatron_to_hf.py models/7b-tp4 models/7b-back
  torchrun --nproc-per-node 8 tools/convert_megatron_to_hf.py models/32b-tp8-pp2 models/32b-back
"""
MIB = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; a user's mistake ends it with a line on rank 0 and status 2 on all ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of weights, of either kind")
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument(
        "--shard-mib", type=int, default=4096, metavar="MiB", help="most in one file (4096)"
    )
    options = parser.parse_args(arguments)
    return run_tool(
        "convert_megatron_to_hf",
        lambda rate: convert_to_hf(
            options.source, options.out, shard_bytes=options.shard_mib * MIB, rate=rate
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
