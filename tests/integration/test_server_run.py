"""Runs whose engines are a server, one of which is killed, against a run with its engine inside."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_oreal.monitor.metrics import read_metrics
from megatron_oreal.monitor.whereabouts import read_all
from tests.integration import toy
from tests.integration.commands import COMMAND, Finished, alone, started
from tests.integration.conftest import FineTuning

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]

DEADLINE_S = 240.0


def trained(root: Path, run: str, model: Path, **more: Any) -> Finished:
    """Trains three iterations, one of them frozen."""
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
    return finished


def metrics_of(root: Path, run: str) -> list[dict[str, Any]]:
    """All that no clock says."""
    names_out = ("time/", "throughput/", "memory/")
    return [
        {name: value for name, value in line.items() if not name.startswith(names_out)}
        for line in read_metrics(root / run / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def inside(root: Path, fine_tuning: FineTuning) -> list[dict[str, Any]]:
    trained(root, "inside", fine_tuning.model)
    return metrics_of(root, "inside")


@contextlib.contextmanager
def served(root: Path, model: Path, *options: str) -> Iterator[tuple[psutil.Process, str]]:
    """A server of the toy, as a process and a URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    chosen = toy.settings(root, "unused", model)
    line = [sys.executable, *COMMAND, "serve", "--port", port, *options, *chosen]
    with started(line) as process:
        yield psutil.Process(process.pid), f"http://127.0.0.1:{port}"


def test_a_server_gives_the_run_that_an_engine_in_the_rank_gives(
    root: Path, fine_tuning: FineTuning, inside: list[dict[str, Any]]
) -> None:
    with served(root, fine_tuning.model) as (_, host):
        hosts = {"rollout__backend": "vllm_server", "rollout__server_hosts": f"[{host}]"}
        trained(root, "outside", fine_tuning.model, **hosts)
    assert metrics_of(root, "outside") == inside


def kill_in_generation(ranks: Path, server: psutil.Process) -> None:
    """Kills what the supervisor runs, once the run samples its second iteration."""
    deadline = time.monotonic() + DEADLINE_S
    while [(w.phase, w.iteration) for w in read_all(ranks, 1)] != [("generate", 1)]:
        if time.monotonic() > deadline:
            return
        time.sleep(0.005)
    for process in server.children(recursive=True):
        process.kill()


def test_a_killed_server_comes_back_and_the_run_is_the_same(
    root: Path, fine_tuning: FineTuning, inside: list[dict[str, Any]]
) -> None:
    """The second iteration is sampled from weights that no checkpoint has."""
    with served(root, fine_tuning.model, "--restart", "1") as (server, host):
        hosts = {"rollout__backend": "vllm_server", "rollout__server_hosts": f"[{host}]"}
        killer = threading.Thread(
            target=kill_in_generation, args=(root / "killed-server" / "ranks", server)
        )
        killer.start()
        try:
            finished = trained(root, "killed-server", fine_tuning.model, **hosts)
        finally:
            killer.join()
    assert "waiting for the servers, to send them the policy's weights" in finished.stdout
    assert "what has no answer is asked again" in finished.stdout
    assert metrics_of(root, "killed-server") == inside
