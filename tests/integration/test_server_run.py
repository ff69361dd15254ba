"""A run whose engines are a server, against the same run with its engine in the rank."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_oreal.monitor.metrics import MEASURED, read_metrics
from tests.integration import toy
from tests.integration.commands import COMMAND, alone, started
from tests.integration.conftest import FineTuning

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def lines_of(root: Path, run: str, model: Path, **more: Any) -> list[dict[str, Any]]:
    """Trains three iterations, one of them frozen, and returns their metrics."""
    chosen = toy.settings(
        root,
        run,
        model,
        run__seed=7,
        schedule__iterations=3,
        schedule__freeze_iterations=1,
        evaluation__at_end="true",
        monitor__wandb="disabled",
        rollout__check_sync="always",
        **more,
    )
    finished = alone("train", *chosen)
    assert finished.status == 0, finished.stderr
    assert "weights reach the engines whole tensors, since" in finished.stdout
    return read_metrics(root / run / "metrics.jsonl")


def test_a_server_gives_the_run_that_an_engine_in_the_rank_gives(
    root: Path, fine_tuning: FineTuning
) -> None:
    inside = lines_of(root, "inside", fine_tuning.model)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    chosen = toy.settings(root, "unused", fine_tuning.model)
    serve = [sys.executable, *COMMAND, "serve", "--port", str(port), *chosen]
    with started(serve):
        hosts = f"[http://127.0.0.1:{port}]"
        outside = lines_of(
            root,
            "outside",
            fine_tuning.model,
            rollout__backend="vllm_server",
            rollout__server_hosts=hosts,
        )
    for line, again in zip(inside, outside, strict=True):
        names = {name for name in line if not name.startswith(MEASURED)}
        assert {name: line[name] for name in names} == {name: again[name] for name in names}
