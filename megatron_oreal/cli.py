"""The command line: `megatron-oreal train | rollout | check-sync | sft | evaluate | ...`.

plan, doctor, serve, report and compare run alone; all others under torchrun or srun as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import FrameType
from typing import NoReturn

from rich.console import Console

from megatron_oreal.arguments import read_arguments
from megatron_oreal.config.compile_caches import cache_variables, compiler_versions
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.monitor.watchdog import STOPPED_EXIT
from megatron_oreal.planner.hardware import GPUS, Cluster

USAGE_EXIT = 2
INTERRUPTED_EXIT = 130  # as of any command that Ctrl-C ends

# What the libraries say of themselves, once a rank, and no user can mend.
_NOISE = (
    r".*(Apex|Transformer Engine).* not installed",
    r"full scope is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf",
    r"`torch\.distributed\.\w+` is deprecated",
)

_REFRESH_S = 10.0  # between two looks at a run that goes on


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status.

    1: the doctor misses something, or check-sync finds a difference. 2, and a line on rank 0: a
    user's mistake. 75: SIGTERM or SIGUSR1 stopped a run, which resumes when it is started again.
    130: Ctrl-C.
    """
    options = read_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command in _OF_FOLDERS:
            return _OF_FOLDERS[options.command](options)
        config = load_config(options.config, options.settings, optional=options.optional)
        os.environ.update(cache_variables(os.environ, compiler_versions()))
        with warnings.catch_warnings():
            for message in _NOISE:
                warnings.filterwarnings("ignore", message=message)
            return _COMMANDS.get(options.command, _run)(options, config)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"megatron-oreal: {error}", file=sys.stderr)  # noqa: T201  this is the console
        return USAGE_EXIT


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
        max_tokens=build.MAX_TOKENS if options.iteration is None else None,
        refresh_s=_REFRESH_S if options.watch else 0,
    )
    out = options.out or options.runs[0] / "report.html"
    if options.watch:
        build.watch(request, out, say=_say, sleep=time.sleep)
        return 0
    data = build.write(request, out)
    _say(json.dumps(build.summary(data)) if options.json else "\n".join(build.words(data, out)))
    return 0


def _compare(options: argparse.Namespace) -> int:
    """Prints how two evaluations differ; returns 0."""
    from megatron_oreal.trainer import compare

    a, b = options.evaluations
    found = compare.compare_folders(a, b, options.k)
    if options.json:
        _say(json.dumps(compare.as_json(found)))
    elif options.markdown:
        _say(compare.as_markdown(found))
    else:
        Console().print(compare.as_table(found, a, b, options.k))
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
    signal.signal(signal.SIGINT, _interrupted)
    # Imported here: --help and a mistyped key should not wait for torch, Megatron and vLLM.
    from megatron_oreal.parallel.collectives import start_world, stop_world
    from megatron_oreal.parallel.cuda_on_cpu import has_gpu
    from megatron_oreal.trainer.check_sync import check_sync
    from megatron_oreal.trainer.evaluate import evaluate
    from megatron_oreal.trainer.record_rollouts import record_rollouts
    from megatron_oreal.trainer.sft import fine_tune
    from megatron_oreal.trainer.start import check_start
    from megatron_oreal.trainer.train import train

    if not has_gpu():  # advice on CUDA's queues
        warnings.filterwarnings("ignore", message="When using sequence parallelism it is recomm")
    start_world(config.watchdog.timeout_s)
    try:
        check_start(config, judges=options.command in ("train", "rollout", "evaluate"))
        runs = {"train": train, "rollout": record_rollouts, "sft": fine_tune}
        if options.command in runs:
            return 0 if runs[options.command](config) else STOPPED_EXIT
        if options.command == "check-sync":
            return 0 if check_sync(config, as_json=options.json) else 1
        evaluate(config, suites=options.suite, output=options.output, as_json=options.json)
        return 0
    finally:
        stop_world()


def _interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """Ends this process at once: to end in order would be to wait for ranks that are gone.

    What is on the disk is whole at every moment.
    """
    if os.environ.get("RANK", "0") == "0":
        cursor = "\x1b[?25h" if sys.stdout.isatty() else ""  # a progress bar hides it
        fix = "started again, a run goes on"
        os.write(2, f"{cursor}\nmegatron-oreal: interrupted; {fix}\n".encode())
    os._exit(INTERRUPTED_EXIT)


def _serve(options: argparse.Namespace, config: Config) -> int:
    """Becomes a rollout server, or keeps one alive and returns how it ended."""
    from megatron_oreal.rollout.supervise import supervise
    from megatron_oreal.rollout.vllm_arguments import server_command, server_environment

    command = server_command(config, options.host, options.port)
    print(shlex.join(command), flush=True)  # noqa: T201  what is started
    environment = server_environment(config)
    if not options.restart:
        os.execve(command[0], command, environment)
    return supervise(command, environment, options.restart)


_OF_FOLDERS = {"report": _report, "compare": _compare}  # read what was written, need no config
_COMMANDS = {"plan": _plan, "doctor": _doctor, "serve": _serve}  # all others run on ranks


if __name__ == "__main__":
    sys.exit(main())
