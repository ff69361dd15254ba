"""The configuration as frozen dataclasses; `configs/base.yaml` documents every key, `validate.py` checks across sections."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what seeds it."""

    name: str = "oreal"
    folder: str = "runs/oreal"
    seed: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The Hugging Face folder that policy, reference and token_rm start from."""

    path: str = "???"
    stop_token: str | None = None
    precision: Precision = "bf16"


@dataclass(frozen=True)
class ParallelConfig:
    """Megatron's layout; data parallelism fills what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = True
    distributed_optimizer: bool = True


@dataclass(frozen=True)
class EngineConfig:
    """How a batch goes through the Megatron models."""

    tokens_per_micro_batch: int = 16384
    head_chunk_tokens: int = 512


@dataclass(frozen=True)
class DataConfig:
    """The training questions."""

    path: str = "???"
    system_prompt: str | None = None
    balance_by_pass_rate: bool = True
    questions_per_iteration: int = 64


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    samples_per_question: int = 16
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 14000
    max_total_tokens: int = 16384


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM engines inside the training ranks."""

    backend: Literal["vllm"] = "vllm"
    tensor_parallel: int = 1
    max_sequences: int = 256
    kv_cache_gib: int = 1
    gpu_memory_utilization: float = 0.5
    enforce_eager: bool = False
    max_mean_logprob_difference: float = 0.1
    sync_round_mib: int = 256


@dataclass(frozen=True)
class VerifierConfig:
    """Rules, their deadlines, and what happens to answers nobody could decide."""

    workers_per_rank: int = 1
    cpu_deadline_s: float = 3.0
    wall_deadline_s: float = 10.0
    thinking_end_markers: tuple[str, ...] = ("</think>",)
    max_unverified_share: float = 0.1
    unverified_is_incorrect: bool = False


@dataclass(frozen=True)
class TokenWeightsConfig:
    """How token scores become token weights (DESIGN: `threshold`, `topk`, `none`)."""

    kind: Literal["threshold", "topk", "none"] = "threshold"
    c_pos: float = 0.5
    c_neg: float = 0.5
    ratio_pos: float = 0.25
    ratio_neg: float = 0.25


@dataclass(frozen=True)
class OrealConfig:
    """The objective, Eq. 11 and Eq. 12 of arXiv:2502.06781, and every switch around it."""

    shaping: Literal["rloo", "grpo"] = "rloo"
    selection: Literal["pairs", "all_nontrivial", "all"] = "pairs"
    token_score: Literal["before", "at"] = "before"
    token_weights: TokenWeightsConfig = field(default_factory=TokenWeightsConfig)
    positive_factor: float = 1.0
    negative_factor: float = 0.5
    positive_times_advantage: bool = True
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coefficient: float = 0.01


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and the shape of both learning rates."""

    iterations: int = 90
    freeze_iterations: int = 10
    warmup_iterations: int = 10
    count: Literal["iterations", "updates"] = "iterations"


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW of one model."""

    lr: float = 5e-7
    min_lr: float = 1e-7
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_grad: float = 1.0


@dataclass(frozen=True)
class EvaluationConfig:
    """Held-out questions, inside a run and for `megatron-oreal evaluate`."""

    path: str | None = None
    every: int = 0
    at_start: bool = False
    at_end: bool = False
    samples_per_question: int = 8
    pass_at: tuple[int, ...] = (1, 8)
    greedy: bool = True
    max_questions: int | None = None


@dataclass(frozen=True)
class MonitorConfig:
    """What of a run is written down."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megatron-oreal"
    transcripts_per_iteration: int = 8


@dataclass(frozen=True)
class ExportConfig:
    """Hugging Face checkpoints written by a run."""

    every: int = 0
    at_end: bool = True
    shard_mib: int = 4096


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning: demonstrations, length, rate."""

    path: str | None = None
    epochs: int = 1
    sequences_per_step: int = 64
    warmup_steps: int = 20
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6))


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    oreal: OrealConfig = field(default_factory=OrealConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    token_rm_optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=2e-6, min_lr=4e-7))
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sft: SftConfig = field(default_factory=SftConfig)
