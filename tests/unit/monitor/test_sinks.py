from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_oreal.config.schema import Config, MonitorConfig
from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.monitor.sinks import COLUMNS, ConsoleSink, JsonlSink, open_sinks, summary_line

if TYPE_CHECKING:
    from pathlib import Path


def test_each_line_is_on_the_disk_when_write_returns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path)
    sink.write(0, {"oreal/loss": 0.5, "oreal/kl_k3": math.nan})
    sink.write(0, {"eval/greedy": 0.25}, "eval")
    lines = path.read_text(encoding="utf-8").splitlines()
    sink.close()
    assert [json.loads(line) for line in lines] == [
        {"kind": "train", "iteration": 0, "oreal/loss": 0.5, "oreal/kl_k3": "nan"},
        {"kind": "eval", "iteration": 0, "eval/greedy": 0.25},
    ]


def test_a_resumed_run_appends_and_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    first.write(0, {"a/x": 1.0})
    first.close()
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "iter')
    second = JsonlSink(path)
    second.write(1, {"a/x": 2.0})
    second.close()
    assert [(r["iteration"], r["a/x"]) for r in read_metrics(path)] == [(0, 1.0), (1, 2.0)]


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlSink(path)
    first.write(0, {"a/x": 1.0})
    kept = path.stat().st_size
    first.write(1, {"a/x": 2.0})
    first.close()
    second = JsonlSink(path, keep_bytes=kept)
    second.write(1, {"a/x": 3.0})
    second.close()
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["a/x"] for line in lines] == [1.0, 3.0]
    JsonlSink(path, keep_bytes=10_000).close()
    assert len(read_metrics(path)) == 2


def test_the_summary_line_leaves_out_what_was_not_measured() -> None:
    metrics = {"oreal/loss": 0.123456, "rollout/pass_rate": 0.5}
    assert summary_line(3, 90, metrics) == "train  3/90  pass 0.500  loss 0.1235"


def test_the_summary_line_fits_120_columns_whatever_the_numbers() -> None:
    metrics = {name: -1.23456789e-123 for name, _, _ in COLUMNS}
    assert len(summary_line(99_999, 100_000, metrics)) <= 120
    metrics = {name: 1e60 for name, _, _ in COLUMNS}
    assert len(summary_line(99_999, 100_000, metrics)) <= 120


def test_the_usual_line_shows_every_column() -> None:
    line = summary_line(
        11,
        90,
        {
            "rollout/pass_rate": 0.5123,
            "oreal/loss": -0.01234567,
            "token_rm/loss": 0.6931,
            "token_rm/accuracy": 0.71,
            "oreal/kl_k3": 0.000123,
            "oreal/entropy": 0.4567,
            "rollout/response_length_mean": 1234.5,
            "time/iteration_s": 321.98,
            "rollout/mismatch_mean": 1.5e-6,
        },
    )
    assert line == (
        "train 11/90  pass 0.512  loss -0.01235  rm 0.6931  rm acc 0.71  kl 0.00012  H 0.457"
        "  len 1234  s 322.0  mismatch 1.5e-06"
    )


def test_the_console_prints_one_line_and_no_markup() -> None:
    file = io.StringIO()
    sink = ConsoleSink(90, Console(file=file, width=40))
    sink.write(0, {"rollout/pass_rate": 0.5, "oreal/loss": 0.25, "oreal/entropy": 1.0})
    sink.write(0, {"eval/pass_at_1": 0.5, "time/eval_s": 3.0, "eval/[red]": 1.0}, "eval")
    sink.close()
    assert file.getvalue() == (
        "train  0/90  pass 0.500  loss 0.25  H 1.000\neval   0/90  pass_at_1 0.5  [red] 1\n"
    )


def test_sinks_open_on_one_rank_only(tmp_path: Path) -> None:
    config = replace(Config(), monitor=MonitorConfig(wandb="disabled"))
    for enabled in (False, True):
        folder = RunFolder(tmp_path / str(enabled))
        folder.create("")
        file = io.StringIO()
        sinks = open_sinks(config, folder, Console(file=file), steps=90, enabled=enabled)
        sinks.write(0, {"oreal/loss": 1.0})
        sinks.close()
        assert folder.metrics.exists() is enabled
        assert bool(file.getvalue()) is enabled
