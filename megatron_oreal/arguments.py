"""What may be written on the command line, and what `--help` says of it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_oreal.planner.hardware import GPUS

_EPILOG = """
examples:
  megatron-oreal train --config configs/my.yaml
  torchrun --nproc-per-node 2 --no-python megatron-oreal train --config configs/my.yaml run.seed=1
  megatron-oreal rollout --config configs/my.yaml run.folder=runs/sampled
  megatron-oreal train --config configs/my.yaml rollout.replay=runs/sampled/recorded
  megatron-oreal check-sync --config configs/my.yaml
  megatron-oreal evaluate model.path=runs/oreal/hf/final evaluation.path=held_out.jsonl --json
  megatron-oreal evaluate model.path=runs/oreal/hf/final --suite math500:4,aime24:32 --output after
  megatron-oreal compare before after
  megatron-oreal doctor --config configs/oreal_7b.yaml
  megatron-oreal plan --config configs/oreal_7b.yaml --ranks 32 --gpu a100-80
  megatron-oreal plan --config configs/oreal_7b.yaml --ranks 32 --search --calibrate runs/first
  megatron-oreal plan weights --config configs/oreal_32b.yaml --ranks 128 --ranks-per-node 8
  megatron-oreal serve --config configs/my.yaml --port 8000
  megatron-oreal report runs/oreal

A run that SIGTERM or SIGUSR1 stops is saved, ends with status 75 and, started again, goes on.
Every key, its unit and its default stand in configs/base.yaml.
"""


_REPORT_EPILOG = """
The page needs no network and no server: open it in a browser, copy it, attach it. Keys 1 to 4
choose overview, rollouts, tokens and health; ? lists all keys. It holds a million tokens of
transcripts at most, a seeded sample over iterations, verdicts and pass rates, and says what share
that is; --iteration holds all of one.

examples:
  megatron-oreal report runs/quickstart/seed_0/oreal
  megatron-oreal report runs/oreal --watch                          # beside a run that goes on
  megatron-oreal report runs/oreal --iteration 12 --out it12.html   # all of one iteration
  megatron-oreal report runs/a runs/b --out both.html               # two runs, one page
"""


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Reads a command line; settings may stand anywhere after the command, later ones win.

    Raises:
        SystemExit: With 2, something is unknown or missing; with 0, `--help`.
    """
    commands = parser()
    options, more = commands.parse_known_args(_with_subject(arguments))
    # argparse takes a command's settings in one piece; what stands behind an option is left over.
    unknown = [word for word in more if word.startswith("-") or "=" not in word]
    if unknown or (more and "settings" not in options):
        commands.error(f"unrecognized arguments: {' '.join(unknown or more)}")
    if more:
        options.settings += more
    return options


def _with_subject(arguments: Sequence[str]) -> list[str]:
    """Names what is planned where it is left out: `plan --config ...` plans a run."""
    subjects = ("run", "weights", "-h", "--help")
    given = list(arguments)
    if given[:1] == ["plan"] and given[1:2] and given[1] not in subjects:
        given.insert(1, "run")
    return given


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands; what they mean is in `cli`."""
    whole = argparse.ArgumentParser(
        prog="megatron-oreal",
        description="OREAL (arXiv:2502.06781) on Megatron-Core with vLLM rollouts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = whole.add_subparsers(dest="command", required=True)
    _command(commands, "train", "train a policy with OREAL", optional=())
    _command(
        commands, "rollout", "sample, judge and record iterations, and train nothing", optional=()
    )
    check_sync = _command(
        commands, "check-sync", "push the policy's weights to the engines and compare", optional=()
    )
    check_sync.add_argument("--json", action="store_true", help="print one JSON object, no table")
    _command(
        commands, "sft", "fine-tune an initial policy on demonstrations", optional=("data.path",)
    )
    evaluate = _command(
        commands, "evaluate", "score a checkpoint on held-out questions", optional=("data.path",)
    )
    _evaluate_options(evaluate)
    doctor = _command(
        commands,
        "doctor",
        "look whether this machine can carry a run",
        optional=("model.path", "data.path"),
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object, no table")
    _plan_command(commands)
    _report_command(commands)
    _compare_command(commands)
    serve = _command(
        commands, "serve", "serve rollouts to a run of this config", optional=("data.path",)
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    serve.add_argument("--port", type=_positive, default=8000, metavar="N", help="port (8000)")
    serve.add_argument(
        "--restart",
        type=_positive,
        default=0,
        metavar="N",
        help="start it again when it ends badly, N times at most (0)",
    )
    return whole


def _evaluate_options(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--suite",
        metavar="NAME[:N],...",
        help="suites of evaluation.suites_folder, N responses a question (evaluation.path alone)",
    )
    evaluate.add_argument(
        "--output", type=Path, metavar="FOLDER", help="of the results (run.folder/evaluation)"
    )
    evaluate.add_argument("--json", action="store_true", help="print one JSON object, no table")


def _compare_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    compare = commands.add_parser(
        "compare",
        help="say whether two evaluations differ by more than chance",
        description="Compares two evaluations question by question: a paired bootstrap interval"
        " of the difference and the p-value of a paired permutation test.",
    )
    compare.add_argument(
        "evaluations", type=Path, nargs=2, metavar="FOLDER", help="--output of an evaluation"
    )
    compare.add_argument("--k", type=_positive, default=1, help="of pass@k (1, which is avg@n)")
    compare.add_argument("--markdown", action="store_true", help="print a table in markdown")
    compare.add_argument("--json", action="store_true", help="print one JSON array, no table")


def _report_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    report = commands.add_parser(
        "report",
        help="show what runs did, in one HTML file",
        description="Writes one HTML file that shows runs: curves, answers, tokens, alarms.",
        epilog=_REPORT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="folder of a run (run.folder); of several, curves are drawn together",
    )
    report.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/report.html)")
    report.add_argument(
        "--watch",
        action="store_true",
        help="write it again whenever the run has written something, until it is finished",
    )
    report.add_argument(
        "--iteration",
        type=int,
        metavar="N",
        help="hold every transcript of this iteration instead of a sample of the run",
    )
    report.add_argument(
        "--json", action="store_true", help="print what the overview says as one JSON array"
    )


def _plan_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plan = commands.add_parser("plan", help="compute what a run would cost, on no GPU")
    subjects = plan.add_subparsers(dest="subject", required=True)
    run = _plan_subject(subjects, "run", "plan the memory and the time of a run (the default)")
    run.add_argument(
        "--gpu", choices=tuple(GPUS), default="h100-80", help="what each rank has (h100-80)"
    )
    run.add_argument(
        "--mean-response-tokens",
        type=_positive,
        metavar="N",
        help="length of a response on average (a third of sampling.max_new_tokens)",
    )
    run.add_argument(
        "--modules",
        choices=("transformer_engine", "torch"),
        default="transformer_engine",
        help="what layers are made of there; the doctor says which (transformer_engine)",
    )
    run.add_argument(
        "--calibrate",
        type=Path,
        metavar="RUN",
        help="folder of a run on such GPUs that has ended: assumptions from its metrics",
    )
    run.add_argument(
        "--search", action="store_true", help="rank the layouts that fit, the fastest first"
    )
    weights = _plan_subject(
        subjects, "weights", "plan what it takes to send engines their parts of new weights"
    )
    weights.add_argument(
        "--ranks-per-node", type=_positive, default=8, metavar="N", help="GPUs of a node (8)"
    )
    weights.add_argument(
        "--rollout-ranks",
        type=_positive,
        default=0,
        metavar="N",
        help="GPUs of engines on nodes of their own (0: the policy's own GPUs)",
    )
    weights.add_argument(
        "--whole-tensors",
        action="store_true",
        help="every rank gets every tensor whole, as where vLLM packs its parameters",
    )


def _plan_subject(
    subjects: argparse._SubParsersAction[argparse.ArgumentParser], name: str, does: str
) -> argparse.ArgumentParser:
    subject = _command(subjects, name, does, optional=("data.path",))
    subject.add_argument(
        "--ranks", type=_positive, required=True, metavar="N", help="GPUs of the cluster"
    )
    subject.add_argument("--json", action="store_true", help="print one JSON object, no table")
    return subject


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
