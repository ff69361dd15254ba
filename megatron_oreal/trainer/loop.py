"""Algorithm 1 of arXiv:2502.06781 and nothing else; what it is made of stands in `setup.py`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_oreal.algorithm import objectives, selection, shaping
from megatron_oreal.algorithm.schedule import policy_is_frozen
from megatron_oreal.algorithm.token_weights import token_weights, uniform_weights
from megatron_oreal.config.schema import Config
from megatron_oreal.data.sampler import PromptSampler
from megatron_oreal.engine.roles import Policy, Reference, TokenRewardModel
from megatron_oreal.rollout.groups import generate_groups
from megatron_oreal.trainer.judging import judge_groups
from megatron_oreal.types import PackedBatch, Trajectory

