"""The command line: `megatron-oreal train | sft | evaluate | plan weights`.

The first three run alone or under torchrun or srun.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config

USAGE_EXIT = 2
STOPPED_EXIT = 75  # sysexits' EX_TEMPFAIL: a signal stopped the run, which will resume

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
  megatron-oreal plan weights --config configs/oreal_32b.yaml --ranks 128 --ranks-per-node 8

A run that SIGTERM or SIGUSR1 stops is saved, ends with status 75 and, started again, goes on.
Every key, its unit and its default stand in configs/base.yaml.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    2, and a line on rank 0: a user's mistake. 75: SIGTERM or SIGUSR1 stopped a run, which was saved
    and resumes when it is started again.
    """
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.settings, optional=options.optional)
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            finished = (_plan if options.command == "plan" else _run)(options, config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-oreal: {error}", file=sys.stderr)  # noqa: T201  this is the console
        return USAGE_EXIT
    return 0 if finished else STOPPED_EXIT


def _plan(options: argparse.Namespace, config: Config) -> bool:
    """Prints what the weight sync of a cluster costs; returns True."""
    from megatron_oreal.weights.cluster import plan_of_run

    plan = plan_of_run(
        config,
        ranks=options.ranks,
        ranks_per_node=options.ranks_per_node,
        whole_tensors=options.whole_tensors,
    )
    text = json.dumps(plan.summary().as_dict()) if options.json else plan.explain()
    print(text)  # noqa: T201  the result
    return True


def _run(options: argparse.Namespace, config: Config) -> bool:
    """Returns whether the command came to its end."""
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
            return train(config)
        if options.command == "sft":
            return fine_tune(config)
        evaluate(config, as_json=options.json)
        return True
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
    _plan_command(commands)
    return parser


def _plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="compute what a run would cost, on no GPU")
    weights = _command(
        plan.add_subparsers(dest="subject", required=True),
        "weights",
        "plan how new weights reach the engines of a cluster",
        optional=("data.path",),
    )
    weights.add_argument(
        "--ranks", type=_positive, required=True, metavar="N", help="GPUs of the cluster"
    )
    weights.add_argument(
        "--ranks-per-node", type=_positive, default=8, metavar="N", help="GPUs of a node (8)"
    )
    weights.add_argument(
        "--whole-tensors",
        action="store_true",
        help="send every tensor whole to every rank, as engines that cut it themselves ask for",
    )
    weights.add_argument("--json", action="store_true", help="print one JSON object, no table")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: 1 or more")
    return number


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
