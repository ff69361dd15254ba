"""Cuts weights for a Megatron layout: from a Hugging Face folder, or from another layout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.config.schema import ParallelConfig
from megatron_oreal.weights.convert import Rate, convert_to_megatron, run_tool

EPILOG = """
The output holds one file for each of tensor x pipeline ranks, a manifest that says which box of
which Hugging Face tensor lies where, config.json and the tokenizer's files. Values are neither
computed nor converted: going there and back again is bitwise the same. Any layout may be read by
any other, so training need not have the layout that was converted for. One rank's file at a time
is held in memory. The folder gets its name once everything was read back and compared.

examples:
  python tools/convert_hf_to_megatron.py models/qwen2.5-7b models/7b-tp4 --tensor 4
  torchrun --nproc-per-node 8 tools/convert_hf_to_megatron.py models/32b models/32b-tp8-pp2 \\
      --tensor 8 --pipeline 2
  python tools/convert_hf_to_megatron.py models/7b-tp4 models/7b-pp2 --pipeline 2   # another layout
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Converts; a user's mistake ends it with a line on rank 0 and status 2 on all ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of weights, of either kind")
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--tensor", type=int, default=1, metavar="N", help="tensor parallelism (1)")
    parser.add_argument("--pipeline", type=int, default=1, metavar="N", help="pipeline stages (1)")
    for end in ("first", "last"):
        parser.add_argument(
            f"--{end}-stage-layers", type=int, metavar="N", help=f"of the {end} stage (as others)"
        )
    options = parser.parse_args(arguments)

    def convert(rate: Rate) -> None:
        parallel = ParallelConfig(
            tensor=options.tensor,
            pipeline=options.pipeline,
            first_stage_layers=options.first_stage_layers,
            last_stage_layers=options.last_stage_layers,
        )
        convert_to_megatron(options.source, options.out, parallel, rate=rate)

    return run_tool("convert_hf_to_megatron", convert)


if __name__ == "__main__":
    sys.exit(main())
