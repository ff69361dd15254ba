"""Measures the report on a synthetic run: time to write, size, and time to open in Chromium.

The run has the demanded size by default: 90 iterations, 128 transcripts of 16,384 tokens in each.
Texts differ by iteration; the tokens' numbers are drawn once and shared by all files. Also timed:
how long an iteration waits for its transcripts.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_oreal.config.load import resolve_config_yaml
from megatron_oreal.config.schema import Config, RunConfig, ScheduleConfig
from megatron_oreal.monitor.report import build
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.sinks import JsonlSink
from megatron_oreal.monitor.transcripts import write_transcripts
from megatron_oreal.types import (
    Outcome,
    PackedBatch,
    Prompt,
    Rollout,
    RolloutGroup,
    Trajectory,
    Verdict,
)

WORDS = ["the ", "sum ", "of ", "$x^2$ ", "is ", "so ", "we ", "get ", "\\frac{1}{2} ", "12", "\n"]
CHROMIUM = shutil.which("chromium")


def make_groups(questions: int, tokens: int, seed: int) -> tuple[list[RolloutGroup], PackedBatch]:
    """Returns pairs of a correct and an incorrect answer, and the batch that trains on them."""
    generator = torch.Generator().manual_seed(seed)
    groups, trajectories = [], []
    for q in range(questions):
        rollouts = []
        for k in range(2):
            ids = torch.randint(len(WORDS), (tokens - k,), generator=generator).tolist()
            logprobs = torch.rand(tokens - k, generator=generator).log().tolist()
            text = "".join(map(WORDS.__getitem__, ids))
            rollouts.append(Rollout(tuple(ids), tuple(logprobs), text, stopped=True))
        groups.append(_group(f"q{q}", rollouts, pass_rate=(q % 15 + 1) / 16))
        trajectories += [
            Trajectory(f"q{q}", (0, *rollout.tokens), 1, reward, reward)
            for rollout, reward in zip(rollouts, (1.0, -1.0), strict=True)
        ]
    lengths = [t.response_length for t in trajectories]
    fields = {
        name: [torch.rand(n, generator=generator) for n in lengths]
        for name in ("logprobs", "reference_logprobs", "entropy", "token_score", "token_weight")
    }
    return groups, PackedBatch(tuple(trajectories), ((tuple(range(len(lengths))),),), fields)


def _group(name: str, rollouts: Sequence[Rollout], pass_rate: float) -> RolloutGroup:
    outcomes = (Outcome.CORRECT, Outcome.INCORRECT)
    return RolloutGroup(
        Prompt(name, f"What is {name}?", "12", (0,)),
        tuple(rollouts),
        tuple(Verdict(outcome, "rule", "not equal", "12", 0.0) for outcome in outcomes),
        rewards=(1.0, -1.0),
        advantages=(1.0, -1.0),
        pass_rate=pass_rate,
    )


def make_run(root: Path, iterations: int, transcripts: int, tokens: int, seed: int) -> float:
    """Writes the run's folder and returns the seconds that one iteration's transcripts took."""
    folder = RunFolder(root)
    config = Config(
        run=RunConfig(name="synthetic", folder=str(root)),
        schedule=ScheduleConfig(iterations=iterations),
    )
    folder.create(resolve_config_yaml(config))
    folder.write_vocabulary([word.encode() for word in WORDS])
    groups, batch = make_groups(transcripts // 2, tokens, seed)
    started = time.perf_counter()
    first = write_transcripts(folder.rollouts, 0, groups, count=transcripts, seed=seed, batch=batch)
    seconds = time.perf_counter() - started
    assert first is not None
    lines = [json.loads(line) for line in first.read_text().splitlines()]
    for iteration in range(1, iterations):
        path = folder.rollouts / f"iter_{iteration:06d}.jsonl"
        with path.open("w") as file:
            file.writelines(json.dumps(line | {"iteration": iteration}) + "\n" for line in lines)
        os.link(first.with_suffix(".npz"), path.with_suffix(".npz"))
    _write_metrics(folder, iterations, random.Random(seed))
    folder.write_summary({"hf": None})
    return seconds


def _write_metrics(folder: RunFolder, iterations: int, chance: random.Random) -> None:
    names = ("rollout/pass_rate", "oreal/loss", "oreal/entropy", "token_rm/auc", "time/generate_s")
    sink = JsonlSink(folder.metrics)
    for iteration in range(iterations):
        sink.write(iteration, {name: chance.random() for name in names})
    sink.close()


def open_in_chromium(page: Path, times: int) -> list[float]:
    """Returns the seconds from the request of the page to its last chart, a browser each time."""
    from playwright.sync_api import sync_playwright

    seconds = []
    with sync_playwright() as playwright:
        for _ in range(times):
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-opened]", state="attached")
            seconds.append(int(tab.get_attribute("html", "data-opened") or 0) / 1000)
            browser.close()
    return seconds


def measure(options: argparse.Namespace, root: Path) -> dict[str, float | int | list[float]]:
    """Writes the run and its report below `root` and returns what that took."""
    size = (options.iterations, options.transcripts, options.tokens)
    transcripts_s = make_run(root, *size, seed=options.seed)
    out = root / "report.html"
    started = time.perf_counter()
    data = build.write(build.Request((root,)), out)
    report_s = time.perf_counter() - started
    shown = data["runs"][0]["transcripts"]
    return {
        "run_tokens": options.iterations * options.transcripts * options.tokens,
        "transcripts_of_an_iteration_s": round(transcripts_s, 3),
        "transcripts_of_an_iteration_mib": round(_mib(root / "rollouts" / "iter_000000.npz"), 1),
        "report_s": round(report_s, 1),
        "shown_transcripts": shown["shown"],
        "shown_tokens": shown["shown_tokens"],
        "page_mib": round(_mib(out), 1),
        "open_s": open_in_chromium(out, options.times) if CHROMIUM else [],
    }


def _mib(path: Path) -> float:
    return path.stat().st_size / 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the measurements as one JSON object; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--iterations", type=int, default=90, help="of the run (90)")
    parser.add_argument("--transcripts", type=int, default=128, help="of an iteration (128)")
    parser.add_argument("--tokens", type=int, default=16_384, help="of a response (16384)")
    parser.add_argument("--times", type=int, default=3, help="the page is opened (3)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder) / "run"), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
