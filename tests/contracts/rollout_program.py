"""Puts real vLLM engines through the rollout contract; `test_rollout_engine.py` judges them.

torchrun --nproc-per-node 2 -m tests.contracts.rollout_program FOLDER

Rank 0 writes `found.json`: one entry a case, plain numbers and token lists.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import RolloutConfig, SamplingConfig
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import (
    all_gather_bytes,
    barrier,
    start_world,
    stop_world,
    world_rank,
)
from megatron_oreal.rollout.engine import Request
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.rollout.seeds import sample_seed
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.rollout.vllm_live import LiveCheck
from megatron_oreal.types import Prompt, Rollout
from megatron_oreal.weights.vllm_layout import vllm_regions

if TYPE_CHECKING:
    from collections.abc import Iterator

VOCABULARY, STOP, END_OF_CONFIG = 100, 1, 2
WINDOW = 200
SAMPLED = SamplingConfig(
    samples_per_question=4, temperature=1.0, top_p=0.9, max_new_tokens=24, max_total_tokens=WINDOW
)
GREEDY = replace(SAMPLED, temperature=0.0)
# A block of the prefix cache is 128 tokens on a CPU: the second prompt is long enough for it.
LENGTHS = (5, 140, 17, 33, 5)


def prompts() -> list[tuple[int, ...]]:
    rng = random.Random(0)
    return [tuple(rng.randrange(3, VOCABULARY) for _ in range(length)) for length in LENGTHS]


SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": END_OF_CONFIG,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def configs() -> dict[str, PreTrainedConfig]:
    """Tied embeddings of the Qwen2 go with one KV head, which TP=2 has to replicate."""
    nine_heads = {"hidden_size": 288, "num_attention_heads": 9, "num_key_value_heads": 3}
    return {
        "untied": Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=False),
        "tied": Qwen2Config(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True),
        "qwen3": Qwen3Config(
            **SHAPE, num_key_value_heads=2, head_dim=64, tie_word_embeddings=False
        ),
        "llama": LlamaConfig(
            **SHAPE | nine_heads, rope_parameters=LLAMA3, tie_word_embeddings=True
        ),
    }


def save_models(folder: Path, config: PreTrainedConfig) -> None:
    """Two models of one shape."""
    for name in ("old", "new"):
        torch.manual_seed(ord(name[0]))
        model = AutoModelForCausalLM.from_config(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(parameter, mean=float("norm" in parameter_name), std=0.2)
        model.save_pretrained(folder / name)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompt: tuple[int, ...]) -> list[int]:
    tokens = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == STOP:
            break
    return tokens[len(prompt) :]


@torch.no_grad()
def logprob_differences(
    model: PreTrainedModel, requests: list[Request], rollouts: list[Rollout]
) -> dict[str, float]:
    differences: list[float] = []
    for request, rollout in zip(requests, rollouts, strict=True):
        tokens = torch.tensor([request.tokens + rollout.tokens])
        logprobs = model(tokens).logits[0].float().log_softmax(-1)
        for i, (token, logprob) in enumerate(zip(rollout.tokens, rollout.logprobs, strict=True)):
            differences.append(abs(float(logprobs[len(request.tokens) - 1 + i, token]) - logprob))
    return {"mean": float(np.mean(differences)), "max": max(differences)}


def alike_on_all_ranks(rollouts: list[Rollout]) -> bool:
    payloads = all_gather_bytes(json.dumps([asdict(rollout) for rollout in rollouts]).encode())
    return len(set(payloads)) == 1


class Case:
    """One engine on one pair of models."""

    def __init__(self, folder: Path, *, tp: int, precision: str = "fp32") -> None:
        self.folder = folder
        started = time.monotonic()
        self.engine = VllmInProcess(
            str(folder / "old"),
            RolloutConfig(tensor_parallel=tp, max_sequences=8, enforce_eager=True),
            precision=precision,
            max_total_tokens=WINDOW,
            stop_token_id=STOP,
            decode=lambda tokens: " ".join(map(str, tokens)),
        )
        self.found: dict[str, Any] = {"start_s": time.monotonic() - started}
        self.requests = [
            Request(tokens, sample_seed(0, 0, str(i), sample))
            for i, tokens in enumerate(prompts())
            for sample in range(SAMPLED.samples_per_question)
        ]

    def generate(self, requests: list[Request], sampling: SamplingConfig) -> list[Rollout]:
        advanced: list[int] = []
        rollouts = self.engine.generate(requests, sampling, advanced.append)
        if sum(advanced) != len(requests) or not all(n > 0 for n in advanced):
            raise AssertionError(f"{len(requests)} requests, advanced by {advanced}")
        if not alike_on_all_ranks(rollouts):
            raise AssertionError("ranks got different rollouts")
        return rollouts

    def everywhere(self, name: str, value: Any) -> None:
        """Notes what each rank has to say."""
        self.found[name] = [json.loads(t) for t in all_gather_bytes(json.dumps(value).encode())]

    def sampling(self) -> None:
        """All at once over all engines; shuffled; and one by one, all on the first engine."""
        rollouts = self.generate(self.requests, SAMPLED)
        order = random.Random(1).sample(range(len(self.requests)), len(self.requests))
        shuffled = self.generate([self.requests[i] for i in order], SAMPLED)
        alone = [self.generate([request], SAMPLED)[0] for request in self.requests[:8]]
        self.found |= {
            "rollouts": [asdict(rollout) for rollout in rollouts],
            "shuffled": [shuffled[order.index(i)].tokens for i in range(len(order))],
            "alone": [rollout.tokens for rollout in alone],
            "nothing_asked": self.generate([], SAMPLED),
            "logprob_difference": logprob_differences(
                load(self.folder / "old"), self.requests, rollouts
            ),
        }

    def greedy(self, weights: str) -> None:
        """Twice the same prompts, the second time from the prefix cache where that holds them."""
        requests = [Request(tokens, 0) for tokens in prompts()]
        rollouts = self.generate(requests * 2, GREEDY)
        model = load(self.folder / weights)
        self.found[f"greedy_{weights}"] = [rollout.tokens for rollout in rollouts]
        self.found[f"expected_{weights}"] = [greedy_tokens(model, r.tokens) for r in requests] * 2

    def reload(self) -> None:
        """What a trainer streams: the tensors of the checkpoint, tied ones once."""
        self.engine.load_weights(iter(checkpoint(self.folder / "new").items()))
        for weights in ("old", "new"):
            (check,) = self.engine._llm.apply_model(LiveCheck)
            tensors = checkpoint(self.folder / weights)
            handed = self.engine._with_tied_head(iter(tensors.items()), set())
            total = sum(1 for _ in check.noted(handed))
            self.found[f"differs_from_{weights}"] = [len(check.differing()), total]

    def refusals(self) -> None:
        too_long = [Request((3,) * WINDOW, 0)]
        self.found["too_long"] = refusal(lambda: self.engine.generate(too_long, SAMPLED, print))
        tensors = checkpoint(self.folder / "new")
        del tensors["model.norm.weight"]
        self.found["missing"] = refusal(lambda: self.engine.load_weights(iter(tensors.items())))


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    model = load(folder)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}


def refusal(call: Any) -> list[str]:
    try:
        call()
    except (UserError, ValueError) as error:
        return [type(error).__name__, str(error)]
    return ["", "accepted"]


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
        torch.is_grad_enabled(),
        sorted(os.sched_getaffinity(0)),
    ]


SET_NUM_THREADS = torch.set_num_threads


def run_untied(folder: Path) -> dict[str, Any]:
    """Every clause, two engines of one rank each."""
    before = process_state()
    case = Case(folder, tp=1)
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


def live_regions(case: Case) -> list[Any]:
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


def run_tied(folder: Path, tp: int) -> dict[str, Any]:
    case = Case(folder, tp=tp)
    case.everywhere("misplaced", live_regions(case))
    case.greedy("old")
    case.sampling()
    case.reload()
    case.greedy("new")
    case.engine.close()
    return case.found


def run_family(folder: Path) -> dict[str, Any]:
    """What depends on the tensors that a family has, and on their names."""
    case = Case(folder, tp=1)
    case.everywhere("misplaced", live_regions(case))
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
    case = Case(folder, tp=1, precision="bf16")
    case.sampling()
    case.reload()
    case.engine.close()
    return case.found


def run_refused_tp(folder: Path) -> dict[str, Any]:
    return {"refusal": refusal(lambda: Case(folder, tp=3))}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    start_world()
    untied, tied = folder / "untied", folder / "tied"
    if world_rank() == 0:
        for name, config in configs().items():
            save_models(folder / name, config)
    barrier()
    found = {
        "untied": run_untied(untied),
        "tied": run_tied(tied, tp=1),
        "bf16": run_bf16(untied),
        "tp3": run_refused_tp(untied),
        "qwen3": run_family(folder / "qwen3"),
        "llama": run_family(folder / "llama"),
    }
    with killed_run():
        found["tied_tp2"] = run_tied(tied, tp=2)
    if world_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    barrier()
    stop_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
