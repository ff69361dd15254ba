"""The configuration as frozen dataclasses.

`configs/base.yaml` documents every key; `__post_init__` checks one section, `validate.py` checks
across sections.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_oreal.config.checks import (
    above_zero,
    at_least,
    positive_share,
    require,
    share,
    share_below_one,
)
from megatron_oreal.config.schema_data import DataConfig, DemonstrationColumns, EvaluationConfig
from megatron_oreal.config.schema_health import AlarmsConfig, WatchdogConfig
from megatron_oreal.config.schema_importance import ImportanceConfig
from megatron_oreal.config.schema_offload import OffloadConfig
from megatron_oreal.config.schema_precision import Fp8Config
from megatron_oreal.config.schema_rollout import RolloutConfig

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what seeds it."""

    name: str = "oreal"
    folder: str = "runs/oreal"
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "seed")


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
    virtual_pipeline: int = 1
    context: int = 1
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None
    sequence_parallel: bool = True
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    bucket_parameters: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "tensor", "pipeline", "virtual_pipeline", "context")
        late, fix = self.overlap_param_gather, "has no gathers to overlap; set it to false"
        owned = self.distributed_optimizer
        require(owned or not late, "overlap_param_gather", late, f"a whole optimizer {fix}")
        fix = "needs overlap_grad_reduce=true; set it, or this to false"
        require(self.overlap_grad_reduce or not late, "overlap_param_gather", late, fix)
        stages = self.virtual_pipeline
        fix = f"there is no pipeline to interleave (parallel.pipeline={self.pipeline}); set it to 1"
        require(stages == 1 or self.pipeline > 1, "virtual_pipeline", stages, fix)
        optional = ("first_stage_layers", "last_stage_layers", "bucket_parameters")
        at_least(self, 1, *(key for key in optional if getattr(self, key) is not None))


@dataclass(frozen=True)
class EngineConfig:
    """How a batch goes through the Megatron models."""

    tokens_per_micro_batch: int = 16384
    pad_to_budget: bool = False
    recompute: Literal["none", "selective", "full"] = "none"
    head_chunk_tokens: int | None = None
    head_logits_fp32: bool = False
    head_grad_fp32: bool = True
    max_skipped_steps: int = 3

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "tokens_per_micro_batch", "max_skipped_steps")
        if self.head_chunk_tokens is not None:
            at_least(self, 1, "head_chunk_tokens")


@dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    samples_per_question: int = 16
    temperature: float = 1.0
    top_p: float = 0.9
    max_new_tokens: int = 14000
    max_total_tokens: int = 16384

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "samples_per_question", "max_new_tokens", "max_total_tokens")
        at_least(self, 0, "temperature")  # 0 is greedy; training refuses it in validate.py
        positive_share(self, "top_p")


@dataclass(frozen=True)
class VerifierConfig:
    """Rules, their deadlines, and what happens to answers nobody could decide."""

    workers_per_rank: int = 1
    cpu_deadline_s: float = 3.0
    wall_deadline_s: float = 10.0
    thinking_end_markers: tuple[str, ...] = ("</think>",)
    extract: tuple[str, ...] = ("boxed",)
    relative_tolerance: float = 0.0
    default: str = "math"
    routes: tuple[str, ...] = ()
    max_unverified_share: float = 0.1
    unverified_alarm_share: float = 0.05
    unverified_is_incorrect: bool = False

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "workers_per_rank")
        above_zero(self, "cpu_deadline_s", "wall_deadline_s")
        share(self, "max_unverified_share", "unverified_alarm_share")
        share_below_one(self, "relative_tolerance")
        known = {"boxed", "announced", "last_number"}
        ways = self.extract
        fix = "name one or more of boxed, announced, last_number"
        require(bool(ways) and set(ways) <= known, "extract", list(ways), fix)
        markers = self.thinking_end_markers
        require(all(markers), "thinking_end_markers", list(markers), "leave no marker empty")


@dataclass(frozen=True)
class JudgeConfig:
    """Language models that are asked about answers which the rules did not accept.

    Without `hosts` there is no judge, and what the rules say stands.
    """

    when: Literal["never", "undecided", "not_correct"] = "not_correct"
    hosts: tuple[str, ...] = ()
    model: str | None = None
    api_key_variable: str | None = None
    second_vote: bool = False
    concurrency: int = 16
    queue: int = 4096
    attempts: int = 4
    backoff_s: float = 1.0
    request_deadline_s: float = 60.0
    deadline_s: float = 600.0
    health_check_s: float = 10.0
    max_tokens: int = 512
    tail_chars: int = 1000

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "concurrency", "queue", "attempts", "max_tokens", "tail_chars")
        above_zero(self, "backoff_s", "request_deadline_s", "deadline_s", "health_check_s")
        hosts = self.hosts
        if self.model:
            require(bool(hosts), "hosts", list(hosts), "name a server, http://host:port/v1")
        if hosts:
            require(bool(self.model), "model", self.model, "name the model as the servers call it")
        web = all(host.startswith(("http://", "https://")) for host in self.hosts)
        require(web, "hosts", list(self.hosts), "begin each with http:// or https://")


@dataclass(frozen=True)
class TokenWeightsConfig:
    """How token scores become token weights (DESIGN: `threshold`, `topk`, `none`)."""

    kind: Literal["threshold", "topk", "none"] = "threshold"
    c_pos: float = 0.5
    c_neg: float = 0.5
    ratio_pos: float = 0.25
    ratio_neg: float = 0.25

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        share_below_one(self, "c_pos", "c_neg")
        positive_share(self, "ratio_pos", "ratio_neg")


@dataclass(frozen=True)
class OrealConfig:
    """The objective, Eq. 11 and Eq. 12 of arXiv:2502.06781, and every switch around it."""

    shaping: Literal["rloo", "grpo", "none"] = "rloo"
    selection: Literal["pairs", "all_nontrivial", "all"] = "pairs"
    token_score: Literal["before", "at"] = "before"
    token_weights: TokenWeightsConfig = field(default_factory=TokenWeightsConfig)
    positive_factor: float = 1.0
    negative_factor: float = 0.5
    positive_times_advantage: bool = True
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_coefficient: float = 0.01
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "positive_factor", "negative_factor", "kl_coefficient")


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run and the shape of both learning rates."""

    iterations: int = 90
    freeze_iterations: int = 10
    warmup_iterations: int = 10
    count: Literal["iterations", "updates"] = "iterations"

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "iterations")
        at_least(self, 0, "freeze_iterations", "warmup_iterations")


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

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        above_zero(self, "lr", "eps")
        at_least(self, 0, "min_lr", "weight_decay", "clip_grad")
        share_below_one(self, "beta1", "beta2")
        require(self.min_lr <= self.lr, "min_lr", self.min_lr, f"set it to lr ({self.lr}) or below")


@dataclass(frozen=True)
class MonitorConfig:
    """What of a run is written down."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    wandb_project: str = "megatron-oreal"
    transcripts_per_iteration: int = 8
    wandb_rollouts_every: int = 10

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "transcripts_per_iteration", "wandb_rollouts_every")


@dataclass(frozen=True)
class ProfileConfig:
    """Iterations whose time and memory are looked into."""

    iterations: tuple[int, ...] = ()
    phases: tuple[str, ...] = ("token_rm", "reference", "policy", "sync")

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        ok = all(iteration >= 0 for iteration in self.iterations)
        require(ok, "iterations", list(self.iterations), "iterations count from 0")


@dataclass(frozen=True)
class CheckpointConfig:
    """What a run resumes from: how often it is written, how much is kept, what may change."""

    every: int = 10
    keep_last: int = 2
    keep_every: int = 0
    background: bool = True
    resume: Literal["auto", "never"] = "auto"
    allow_changes: tuple[str, ...] = ()
    stop_within_s: float = 420.0

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "every", "keep_every", "stop_within_s")
        at_least(self, 1, "keep_last")


@dataclass(frozen=True)
class ExportConfig:
    """Hugging Face checkpoints written by a run."""

    every: int = 0
    at_end: bool = True
    shard_mib: int = 4096

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 0, "every")
        at_least(self, 1, "shard_mib")


@dataclass(frozen=True)
class SftConfig:
    """Supervised fine-tuning: demonstrations, length, rate."""

    path: str | None = None
    columns: DemonstrationColumns = field(default_factory=DemonstrationColumns)
    epochs: int = 1
    sequences_per_step: int = 64
    warmup_steps: int = 20
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=1e-5, min_lr=1e-6)
    )

    def __post_init__(self) -> None:
        """Checks the ranges of this section."""
        at_least(self, 1, "epochs", "sequences_per_step")
        at_least(self, 0, "warmup_steps")


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    oreal: OrealConfig = field(default_factory=OrealConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    policy_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    token_rm_optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(lr=2e-6, min_lr=4e-7)
    )
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    alarms: AlarmsConfig = field(default_factory=AlarmsConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    sft: SftConfig = field(default_factory=SftConfig)
