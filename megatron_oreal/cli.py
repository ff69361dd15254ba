"""The command line: `megatron-oreal train | rollout | check-sync | sft | evaluate | ...`.

plan, doctor, serve and report run alone; all others under torchrun or srun as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.planner.hardware import GPUS, Cluster

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
  megatron-oreal rollout --config configs/my.yaml run.folder=runs/sampled
  megatron-oreal train --config configs/my.yaml rollout.replay=runs/sampled/recorded
  megatron-oreal check-sync --config configs/my.yaml
  megatron-oreal evaluate model.path=runs/oreal/hf/final evaluation.path=held_out.jsonl --json
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

_REFRESH_S = 10.0  # between two looks at a run that goes on


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    1: the doctor misses something, or check-sync finds a difference. 2, and a line on rank 0: a
    user's mistake. 75: SIGTERM or SIGUSR1 stopped a run, which was saved and resumes when it is
    started again.
    """
    options = _parser().parse_args(_with_subject(sys.argv[1:] if arguments is None else arguments))
    try:
        if options.command == "report":
            return _report(options)
        config = load_config(options.config, options.settings, optional=options.optional)
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            return _COMMANDS.get(options.command, _run)(options, config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-oreal: {error}", file=sys.stderr)  # noqa: T201  this is the console
        return USAGE_EXIT


def _with_subject(arguments: Sequence[str]) -> list[str]:
    """Names what is planned where it is left out: `plan --config ...` plans a run."""
    subjects = ("run", "weights", "-h", "--help")
    given = list(arguments)
    if given[:1] == ["plan"] and given[1:2] and given[1] not in subjects:
        given.insert(1, "run")
    return given


def _plan(options: argparse.Namespace, config: Config) -> int:
    """Prints what a run takes, or what its weight sync costs; returns 0."""
    if config.rollout.backend != "vllm":
        raise UserError(
            f"rollout.backend={config.rollout.backend}: plans are of engines inside the training"
            " ranks; set vllm"
        )
    text = (_plan_weights if options.subject == "weights" else _plan_run)(options, config)
    print(text)  # noqa: T201  the result
    return 0


def _plan_run(options: argparse.Namespace, config: Config) -> str:
    from megatron_oreal.models.registry import read_model
    from megatron_oreal.planner.calibrate import Calibration, calibrate, read_run
    from megatron_oreal.planner.duration import assumptions_for
    from megatron_oreal.planner.plan import plan_run, ranked_runs
    from megatron_oreal.planner.table import ranking, ranking_dict, table

    gpu, modules = GPUS[options.gpu], options.modules
    found = Calibration(assumptions_for(config), ())
    if options.calibrate:
        measured = load_config([options.calibrate / "config.yaml"], [])
        run = read_run(options.calibrate, measured)
        found = calibrate(run, read_model(measured.model.path)[1], gpu, modules)
    given = found.given
    if options.mean_response_tokens:
        given = replace(given, mean_response_tokens=float(options.mean_response_tokens))
    _, dims = read_model(config.model.path)
    cluster = Cluster(gpu, options.ranks, modules)
    if options.search:
        plans = ranked_runs(config, dims, cluster, given)
        return json.dumps(ranking_dict(plans)) if options.json else ranking(plans, found.measured)
    plan = plan_run(config, dims, cluster, given)
    return json.dumps(plan.as_dict()) if options.json else table(plan, found.measured)


def _plan_weights(options: argparse.Namespace, config: Config) -> str:
    from megatron_oreal.weights.cluster import plan_of_run

    plan = plan_of_run(
        config,
        ranks=options.ranks,
        ranks_per_node=options.ranks_per_node,
        whole_tensors=options.whole_tensors,
        rollout_ranks=options.rollout_ranks,
    )
    return json.dumps(plan.summary().as_dict()) if options.json else plan.explain()


def _report(options: argparse.Namespace) -> int:
    """Writes a page that shows what runs did, once or while they go on; returns 0."""
    import time

    from megatron_oreal.monitor.report import build

    request = build.Request(
        tuple(options.runs),
        iteration=options.iteration,
        refresh_s=_REFRESH_S if options.watch else 0,
    )
    out = options.out or options.runs[0] / "report.html"
    if options.watch:
        build.watch(request, out, say=_say, sleep=time.sleep)
        return 0
    data = build.write(request, out)
    _say(json.dumps(build.summary(data)) if options.json else "\n".join(build.words(data, out)))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  the result


def _doctor(options: argparse.Namespace, config: Config) -> int:
    """Prints what was found, on rank 0, and returns 1 where something a run needs is missing."""
    from megatron_oreal.doctor.examine import examine
    from megatron_oreal.doctor.report import as_json, as_table, exit_status

    findings = examine(config, with_inputs=bool(options.config or options.settings))
    if os.environ.get("RANK", "0") == "0":
        if options.json:
            print(json.dumps(as_json(findings)))  # noqa: T201  the result
        else:
            Console().print(as_table(findings))
    return exit_status(findings)


def _run(options: argparse.Namespace, config: Config) -> int:
    """Returns 0 where the command came to its end, 75 where a signal stopped it.

    Also 1 where `check-sync` found a difference.
    """
    # Imported here: --help and a mistyped key should not wait for torch, Megatron and vLLM.
    from megatron_oreal.parallel.collectives import start_world, stop_world
    from megatron_oreal.parallel.cuda_on_cpu import has_gpu
    from megatron_oreal.trainer.check_sync import check_sync
    from megatron_oreal.trainer.evaluate import evaluate
    from megatron_oreal.trainer.record_rollouts import record_rollouts
    from megatron_oreal.trainer.sft import fine_tune
    from megatron_oreal.trainer.train import train

    if not has_gpu():  # advice on CUDA's queues
        warnings.filterwarnings("ignore", message="When using sequence parallelism it is recomm")
    start_world(config.watchdog.timeout_s)
    try:
        runs = {"train": train, "rollout": record_rollouts, "sft": fine_tune}
        if options.command in runs:
            return 0 if runs[options.command](config) else STOPPED_EXIT
        if options.command == "check-sync":
            return 0 if check_sync(config, as_json=options.json) else 1
        evaluate(config, as_json=options.json)
        return 0
    finally:
        stop_world()


def _serve(options: argparse.Namespace, config: Config) -> int:
    """Becomes a rollout server."""
    from megatron_oreal.rollout.vllm_arguments import server_command, server_environment

    command = server_command(config, options.host, options.port)
    print(shlex.join(command), flush=True)  # noqa: T201  what is started
    os.execve(command[0], command, server_environment(config))


_COMMANDS = {"plan": _plan, "doctor": _doctor, "serve": _serve}  # all others run on ranks


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
    evaluate.add_argument("--json", action="store_true", help="print one JSON object, no table")
    doctor = _command(
        commands,
        "doctor",
        "look whether this machine can carry a run",
        optional=("model.path", "data.path"),
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object, no table")
    _plan_command(commands)
    _report_command(commands)
    serve = _command(
        commands, "serve", "serve rollouts to a run of this config", optional=("data.path",)
    )
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    serve.add_argument("--port", type=_positive, default=8000, metavar="N", help="port (8000)")
    return parser


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


if __name__ == "__main__":
    sys.exit(main())
