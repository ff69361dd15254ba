"""The command line: `megatron-oreal train | sft | evaluate`, alone or under torchrun or srun."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config

USAGE_EXIT = 2

# What the libraries say of themselves, once a rank, and no user can mend.
_NOISE = (
    r".*(Apex|Transformer Engine).* not installed",
    r"full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
)

_EPILOG = """
examples:
  megatron-oreal train --config configs/my.yaml
  torchrun --nproc-per-node 2 --no-python megatron-oreal train --config configs/my.yaml run.seed=1
  megatron-oreal evaluate model.path=runs/oreal/hf/final evaluation.path=held_out.jsonl --json

Every key, its unit and its default stand in configs/base.yaml.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; a user's mistake ends it with a line on rank 0 and status 2 on all ranks."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.settings, optional=options.optional)
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            _run(options, config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-oreal: {error}", file=sys.stderr)  # noqa: T201  this is the console
        return USAGE_EXIT
    return 0


def _run(options: argparse.Namespace, config: Config) -> None:
    # Imported here: --help and a mistyped key should not wait for torch, Megatron and vLLM.
    from megatron_oreal.parallel.collectives import start_world, stop_world
    from megatron_oreal.parallel.cuda_on_cpu import has_gpu
    from megatron_oreal.trainer.evaluate import evaluate
    from megatron_oreal.trainer.sft import fine_tune
    from megatron_oreal.trainer.train import train

    if not has_gpu():  # advice on CUDA's queues
        warnings.filterwarnings("ignore", message="When using sequence parallelism it is recomm")
    start_world()
    try:
        if options.command == "train":
            train(config)
        elif options.command == "sft":
            fine_tune(config)
        else:
            evaluate(config, as_json=options.json)
    finally:
        stop_world()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megatron-oreal",
        description="OREAL (arXiv:2502.06781) on Megatron-Core with vLLM rollouts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _command(commands, "train", "train a policy with OREAL", optional=())
    _command(
        commands, "sft", "fine-tune an initial policy on demonstrations", optional=("data.path",)
    )
    evaluate = _command(
        commands, "evaluate", "score a checkpoint on held-out questions", optional=("data.path",)
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    does: str,
    *,
    optional: tuple[str, ...],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=does,
        description=f"{does.capitalize()}.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file; may be given more than once, later files win",
    )
    command.add_argument(
        "settings", nargs="*", metavar="key=value", help="settings that win over every file"
    )
    command.set_defaults(optional=optional)
    return command


if __name__ == "__main__":
    sys.exit(main())
