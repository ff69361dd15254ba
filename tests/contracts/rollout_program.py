"""Puts real vLLM engines through the rollout contract; `test_rollout_engine.py` judges them.

torchrun --nproc-per-node 2 -m tests.contracts.rollout_program FOLDER

Rank 0 writes `found.json`: one entry a case, plain numbers and token lists.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import (
    barrier,
    broadcast_bytes,
    start_world,
    stop_world,
    world_rank,
)
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.rollout.vllm_live import LiveCheck, with_tied_head
from megatron_oreal.rollout.vllm_server import VllmServer
from megatron_oreal.rollout.weight_sync import InPlaceRoute, WeightSync
from megatron_oreal.types import Prompt
from megatron_oreal.weights.in_place import open_in_place
from megatron_oreal.weights.sums import whole_sum
from megatron_oreal.weights.vllm_layout import difference, vllm_regions
from tests.contracts.rollout_case import Case, flip_byte, refusal, survey_of
from tests.contracts.rollout_models import (
    SAMPLED,
    WINDOW,
    checkpoint,
    configs,
    prompts,
    save_models,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from megatron_oreal.weights.transport import Meddle


def process_state() -> list[Any]:
    return [
        dict(os.environ),
        random.getstate()[1][:3],
        np.random.get_state()[1][:3].tolist(),
        torch.get_rng_state().sum().item(),
        torch.get_num_threads(),
        torch.set_num_threads is SET_NUM_THREADS,
        [str(entry) for entry in warnings.filters],
        torch.get_default_dtype() is torch.float32,
        str(torch.get_default_device()),
        torch.is_grad_enabled(),
        [torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark],
        [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic],
        [torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled()],
        sorted(os.sched_getaffinity(0)),
        [str(signal.getsignal(number)) for number in signal.valid_signals()],
        [sys.excepthook is EXCEPTHOOK, faulthandler.is_enabled(), str(Path.cwd())],
        [logging.root.level, len(logging.root.handlers), logging.root.manager.disable],
        multiprocessing.get_start_method(allow_none=True),
    ]


SET_NUM_THREADS, EXCEPTHOOK = torch.set_num_threads, sys.excepthook


class InProcess(Case):
    """Engines inside these two ranks."""

    def __init__(
        self,
        folder: Path,
        *,
        tp: int,
        precision: str = "fp32",
        weights: bool = True,
        **rollout: Any,
    ) -> None:
        more = {"weights": weights}
        super().__init__(folder, VllmInProcess, precision, more, tensor_parallel=tp, **rollout)

    def reload(self) -> None:
        """The way through vLLM's reload."""
        self.push("new")
        self.compare()

    def write_in_place(self, weights: str = "new", meddle: Meddle | None = None) -> None:
        """What a trainer does where the live model is plain; rank 0 is all of the policy here."""
        family, dims = read_model(self.folder / weights)
        survey, params = survey_of(self.folder / weights, rank=0)
        live = self.engine.live_shard()
        plan = open_in_place(survey, params, family, dims, live, round_bytes=1 << 16)
        WeightSync(InPlaceRoute(plan, self.engine, meddle), "always").push()

    def not_plain(self) -> str:
        """Why this rank's live model cannot be written in place, empty if it can."""
        family, dims = read_model(self.folder / "new")
        live = self.engine.live_shard()
        dtypes = dict.fromkeys(family.tensors(dims), torch.float32)
        return difference(live, family, dims, dtypes)

    def compare(self) -> None:
        """How many tensors the live model has otherwise than either checkpoint, and of how many."""
        for weights in ("old", "new"):
            (check,) = self.engine._llm.apply_model(LiveCheck)
            tensors = checkpoint(self.folder / weights)
            handed = with_tied_head(iter(tensors.items()), self.engine._tied)
            total = sum(1 for _ in check.noted(handed))
            self.found[f"differs_from_{weights}"] = [len(check.differing()), total]
        tensors = checkpoint(self.folder / "new")
        whole = self.engine.differing(iter(tensors.items()))
        tensors["model.layers.0.mlp.down_proj.weight"][1] += 1  # of one row each rank has a part
        self.found["read_back"] = [whole, self.engine.differing(iter(tensors.items()))]


def run_untied(folder: Path) -> dict[str, Any]:
    """Every clause, two engines of one rank each."""
    before = process_state()
    case = InProcess(folder, tp=1)
    after_start = process_state()
    case.sampling()
    after_generate = process_state()
    case.greedy("old")
    case.reload()
    case.greedy("new")
    groups = generate_groups(
        case.engine,
        [Prompt(str(i), "", "", tokens) for i, tokens in enumerate(prompts())],
        SAMPLED,
        seed=3,
        iteration=4,
        advance=lambda _: None,
    )
    case.found["groups"] = [
        [group.prompt.id, [rollout.tokens for rollout in group.rollouts]] for group in groups
    ]
    case.refusals()
    case.engine.close()
    case.found["state_kept"] = {
        "start": [a == b for a, b in zip(before, after_start, strict=True)],
        "generate": [a == b for a, b in zip(before, after_generate, strict=True)],
        "close": [a == b for a, b in zip(before, process_state(), strict=True)],
    }
    return case.found


def live_regions(case: InProcess) -> list[Any]:
    """Where this rank's vLLM has each tensor, and where `vllm_regions` says so: `[]` if alike.

    Row, column and local row at which each piece begins, and its rows and columns.
    """
    family, dims = read_model(case.folder / "old")
    shapes = family.tensors(dims)
    (check,) = case.engine._llm.apply_model(LiveCheck)
    live = set()
    for name in shapes:
        for part in check._parts[name]:
            rows, columns = (
                range(length)[cut]
                for cut, length in zip(
                    (part.cut.rows, part.cut.columns), (*shapes[name], 1), strict=False
                )
            )
            live.add((name, rows.start, rows.stop, columns.stop, part.cut.local.start or 0))
    tp = case.engine._llm.vllm_config.parallel_config.tensor_parallel_size
    planned = {
        (
            region.tensor,
            region.box.start[0],
            region.box.stop[0],
            (*region.box.stop, 1)[1],
            region.local.start[0],
        )
        for region in vllm_regions(family, dims, world_rank() % tp, tp)
    }
    return sorted(live ^ planned)


def run_tied(folder: Path) -> dict[str, Any]:
    case = InProcess(folder, tp=1)
    case.everywhere("misplaced", live_regions(case))
    case.everywhere("not_plain", case.not_plain())
    case.greedy("old")
    case.sampling()
    case.banked()
    case.reload()
    case.greedy("new")
    case.rest(lambda: case.push("old"))
    case.engine.close()
    return case.found


def run_plain(folder: Path) -> dict[str, Any]:
    """One engine of two ranks, whose live model is plain and written in place."""
    case = InProcess(folder, tp=2)
    case.everywhere("misplaced", live_regions(case))
    case.everywhere("not_plain", case.not_plain())
    case.greedy("old")
    case.sampling()
    case.banked()
    case.found["flipped"] = refusal(lambda: case.write_in_place(meddle=flip_byte))
    case.write_in_place()
    case.compare()
    case.greedy("new")
    case.rest(lambda: case.write_in_place("old"))
    case.engine.close()
    return case.found


@contextlib.contextmanager
def unpacked() -> Iterator[None]:
    """Has vLLM multiply by torch, so that on a CPU as well its live model is plain."""
    from vllm import _custom_ops

    before, _custom_ops._supports_onednn = _custom_ops._supports_onednn, False
    yield
    _custom_ops._supports_onednn = before


def run_family(folder: Path, tp: int) -> dict[str, Any]:
    """What depends on the tensors that a family has, and on their names."""
    case = InProcess(folder, tp=tp, weights=False)
    case.everywhere("misplaced", live_regions(case))
    case.unfilled()
    case.push("old")
    case.greedy("old")
    case.reload()
    case.greedy("new")
    case.engine.close()
    return case.found


@contextlib.contextmanager
def killed_run() -> Iterator[None]:
    """Leaves behind the shared memory of a run that was killed, under vLLM's own names."""
    files = [Path(f"/dev/shm/-tp:0-[0-1]-cpushm_{rank}") for rank in range(2)]
    if world_rank() == 0:
        for file in files:
            file.touch()
    barrier()
    yield
    barrier()
    if world_rank() == 0:
        for file in files:
            file.unlink()


def run_bf16(folder: Path) -> dict[str, Any]:
    case = InProcess(folder, tp=1, precision="bf16")
    case.sampling()
    case.reload()
    case.engine.close()
    return case.found


def run_fp8(folder: Path) -> dict[str, Any]:
    """Layers rounded as weights arrive: they are as near as FP8 allows, all else is equal."""
    case = InProcess(folder, tp=1, precision="bf16", quantization="fp8")
    case.everywhere("not_plain", case.not_plain())
    case.sampling()
    case.push("new")
    case.rest(lambda: case.push("old"))
    tensors = checkpoint(folder / "old")
    case.found["read_back"] = [case.engine.differing(iter(tensors.items()))]
    tensors["model.norm.weight"][1] += 1
    tensors["model.layers.0.self_attn.k_proj.weight"][-1] *= 1.2
    case.found["read_back"].append(case.engine.differing(iter(tensors.items())))
    del tensors["model.layers.1.mlp.down_proj.weight"]
    case.found["missing"] = refusal(lambda: case.engine.load_weights(iter(tensors.items())))
    case.engine.close()
    return case.found


@contextlib.contextmanager
def rounded_by_torch() -> Iterator[None]:
    """Has torch round to FP8, by one scale a tensor, where vLLM's kernel is for GPUs alone."""
    from vllm import _custom_ops

    def quantise(
        tensor: torch.Tensor, scale: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = tensor.float().abs().max().reshape(1) / largest if scale is None else scale
        scaled = (tensor.float() / scale).clamp(-largest, largest)
        return scaled.to(torch.float8_e4m3fn), scale

    before, _custom_ops.scaled_fp8_quant = _custom_ops.scaled_fp8_quant, quantise
    yield
    _custom_ops.scaled_fp8_quant = before


def run_refused_tp(folder: Path) -> dict[str, Any]:
    return {"refusal": refusal(lambda: InProcess(folder, tp=3))}


def run_server(folder: Path, others: Path, host: str) -> dict[str, Any]:
    """One server for two ranks, only one of which has a server to ask."""
    case = Case(folder, VllmServer, "fp32", **served_by(host))
    case.greedy("old")
    case.sampling()
    case.rest(lambda: None)
    case.found["flipped"] = refusal(lambda: case.push("new", flip_byte))
    case.found["flipped_beyond"] = flipped_beyond(case)
    case.push("new")
    case.greedy("new")
    case.refusals()
    case.engine.close()
    case.found["other_model"] = refusal(lambda: Case(others, VllmServer, "fp32", **served_by(host)))
    case.found["other_dtype"] = refusal(lambda: Case(folder, VllmServer, "bf16", **served_by(host)))
    nobody = served_by(f"http://127.0.0.1:{free_port()}", wait_s=0.0)
    case.found["nobody"] = refusal(lambda: Case(folder, VllmServer, "fp32", **nobody))
    return case.found


def flipped_beyond(case: Case) -> list[str]:
    """What the server finds where a byte is flipped only after the trainer has counted."""
    tensors = {name: tensor.clone() for name, tensor in checkpoint(case.folder / "new").items()}
    expected = {name: whole_sum(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        flip_byte(name, tensor)
    mine = tensors if world_rank() in case.engine.receivers else {}
    return case.engine.load_weights(iter(mine.items()), expected)


def served_by(host: str, wait_s: float = 200.0) -> dict[str, Any]:
    return {"backend": "vllm_server", "server_hosts": (host,), "server_wait_s": wait_s}


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A rollout server of the first rank, which starts while the block runs; yields its URL."""
    port = int(broadcast_bytes(str(free_port()).encode()).decode())
    if world_rank() > 0:
        yield f"http://127.0.0.1:{port}"
        return
    settings = [
        f"model.path={folder}/old",
        "model.precision=fp32",
        f"sampling.max_total_tokens={WINDOW}",
        f"sampling.max_new_tokens={SAMPLED.max_new_tokens}",
        "rollout.max_sequences=8",
        "rollout.enforce_eager=true",
    ]
    command = [sys.executable, "-m", "megatron_oreal.cli", "serve", "--port", str(port), *settings]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_world()
    untied, tied = folder / "untied", folder / "tied"
    if world_rank() == 0:
        for name, config in configs().items():
            save_models(folder / name, config)
    barrier()
    with server(tied) as host:
        found = run_all(folder, untied, tied)
        found["server"] = run_server(tied, untied, host)
    if world_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    barrier()
    stop_world()


def run_all(folder: Path, untied: Path, tied: Path) -> dict[str, Any]:
    """The engines inside the ranks."""
    found = {
        "untied": run_untied(untied),
        "tied": run_tied(tied),
        "bf16": run_bf16(untied),
        "tp3": run_refused_tp(untied),
        "llama": run_family(folder / "llama", tp=1),
    }
    with rounded_by_torch():
        found["fp8"] = run_fp8(untied)
    with killed_run():
        found["qwen3"] = run_family(folder / "qwen3", tp=2)
    with unpacked():
        found["tied_tp2"] = run_plain(tied)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
