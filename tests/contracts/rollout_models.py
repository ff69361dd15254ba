"""The toy models and prompts of the rollout contract, and what transformers says of them."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING

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

from megatron_oreal.config.schema import SamplingConfig

if TYPE_CHECKING:
    from pathlib import Path

    from megatron_oreal.rollout.engine import Request
    from megatron_oreal.types import Rollout

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


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    model = load(folder)
    return {name: tensor.detach() for name, tensor in model.named_parameters()}
