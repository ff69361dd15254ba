"""Toy models on disk, trajectories for it, and the models of a run over it, for tests on ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from megatron_oreal.config.schema import (
    Config,
    EngineConfig,
    ModelConfig,
    OptimizerConfig,
    OrealConfig,
    ParallelConfig,
)
from megatron_oreal.engine.micro_batch import ScorePosition
from megatron_oreal.engine.roles import Policy, PolicyStep, Reference, TokenRewardModel
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel import topology
from megatron_oreal.trainer.models import ModelSource
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.types import PackedBatch, Trajectory
from megatron_oreal.weights.bridge import open_stream

VOCAB = 61  # odd: there is padding at every tensor-parallel size
# prompt and response lengths; (1, 1) is the shortest there can be
LENGTHS = ((3, 9), (5, 1), (1, 14), (1, 1), (7, 6))
ROOMY = 4096  # tokens per micro-batch: all trajectories in one
TIGHT = 15  # the longest trajectory alone
CONFIG_JSON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
TOYS: dict[str, dict[str, object]] = {
    "qwen2": {"tie_word_embeddings": False},
    "qwen2_tied": {"tie_word_embeddings": True},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 16,  # twice hidden size / heads
        "tie_word_embeddings": True,
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
    },
    "smollm2": {  # its numbers of heads
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,  # enough for pipeline stages of different depth
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
    },
}
"""What each toy's `config.json` has over `CONFIG_JSON`, one or more of every family."""


def write_model(folder: Path, *, tied: bool) -> Path:
    """Writes the toy Qwen2, see `write_toy`."""
    return write_toy(folder, "qwen2_tied" if tied else "qwen2")


def write_toy(folder: Path, toy: str, spread: float = 0.25, **changes: object) -> Path:
    """Writes random weights, norms and biases random too, large enough to tell tokens apart.

    `spread` is the standard deviation of all but norms; `changes` are keys of `config.json` that
    differ from the toy's.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG_JSON | TOYS[toy] | changes))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    family, dims = read_model(folder)
    for name, shape in family.tensors(dims).items():
        drawn = torch.randn(shape, generator=generator)
        tensors[name] = 1 + 0.3 * drawn if "norm" in name else spread * drawn
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_trajectories(count: int = len(LENGTHS)) -> list[Trajectory]:
    """Random tokens, rewards +1 and -1 by turns, advantages of either size."""
    generator = torch.Generator().manual_seed(7)
    return [
        Trajectory(
            prompt_id=str(i),
            tokens=tuple(torch.randint(VOCAB, (prompt + response,), generator=generator).tolist()),
            prompt_length=prompt,
            reward=(-1.0) ** i,
            advantage=(-1.0) ** i * (0.25 + i / 4),
        )
        for i, (prompt, response) in enumerate(LENGTHS[:count])
    ]


def make_config(
    folder: Path,
    *,
    sequence_parallel: bool = True,
    distributed_optimizer: bool = True,
    token_score: ScorePosition = "before",
    optimizer: OptimizerConfig | None = None,
    **engine: Any,
) -> Config:
    """A config in fp32 of the layout that this rank's world has; `engine`: keys of that section."""
    here = topology.current()
    optimizer = optimizer or OptimizerConfig(lr=1e-3)
    return Config(
        model=ModelConfig(path=str(folder), precision="fp32"),
        parallel=ParallelConfig(
            tensor=here.tp_size,
            pipeline=here.pp_size,
            virtual_pipeline=here.vpp_size,
            context=here.cp_size,
            sequence_parallel=sequence_parallel,
            distributed_optimizer=distributed_optimizer,
        ),
        engine=EngineConfig(**{"head_chunk_tokens": 4, **engine}),  # chunks in every micro-batch
        oreal=OrealConfig(token_score=token_score),
        policy_optimizer=optimizer,
        token_rm_optimizer=optimizer,
    )


def pack(trajectories: list[Trajectory], tokens_per_micro_batch: int = ROOMY) -> PackedBatch:
    """Packs for the data-parallel ranks that there are."""
    return Packer.for_layout(topology.current(), tokens_per_micro_batch).pack(trajectories)


def open_models(config: Config) -> ModelSource:
    """The source of this rank's models, in the layout that is set up already."""
    return ModelSource(config, *read_model(config.model.path), topology.current())


def make_policy(source: ModelSource) -> Policy:
    """The policy as a run builds it."""
    config = source.config
    return Policy(source.dims, config, source.topology, source.load, config.policy_optimizer)


def make_reference(source: ModelSource) -> Reference:
    """The frozen reference as a run builds it."""
    return Reference(source.dims, source.config, source.topology, source.load)


def make_token_rm(source: ModelSource) -> TokenRewardModel:
    """The token reward model as a run builds it."""
    return TokenRewardModel(source.dims, source.config, source.topology, source.load)


def whole_weights(source: ModelSource, model: Policy | TokenRewardModel) -> dict[str, torch.Tensor]:
    """Every weight as a whole Hugging Face tensor, on every rank; collective over the world.

    Without its scalar head a token reward model is like one with tied embeddings: no checkpoint
    has anything for its output layer.
    """
    params, dims = model.model.parameters(), source.dims
    if isinstance(model, TokenRewardModel):
        params.pop("output_layer.weight", None)
        dims = replace(dims, tied_embeddings=True)
    stream = open_stream(params, source.family, dims, source.place, round_bytes=1 << 16)
    return dict(stream.full_tensors())


class Scored(NamedTuple):
    """What the models make of the trajectories; `head` is None off the last pipeline stage.

    `policy` holds one result a micro-batch budget, roomy and tight; `scores` one a position.
    """

    policy: tuple[PolicyStep, PolicyStep]
    scores: dict[ScorePosition, list[torch.Tensor]]
    head: torch.Tensor | None


def score(folder: Path) -> Scored:
    """Scores all trajectories with policy and token_rm, forward only; collective over the world."""
    positions: tuple[ScorePosition, ...] = ("before", "at")
    roomy, tight = (pack(make_trajectories(), budget) for budget in (ROOMY, TIGHT))
    source = open_models(make_config(folder))
    policy = make_policy(source)
    scores, weights = {}, {}
    for position in positions:
        token_rm = make_token_rm(open_models(make_config(folder, token_score=position)))
        scores[position] = token_rm.scores(roomy)
        weights = token_rm.model.parameters()
    head = weights["output_layer.weight"] if source.topology.is_last_stage else None
    return Scored((policy.logprobs(roomy), policy.logprobs(tight)), scores, head)
