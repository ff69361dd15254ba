"""Algorithm 1 of arXiv:2502.06781 and nothing else; what it is made of stands in `setup.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_oreal.algorithm import importance, objectives, selection, shaping
from megatron_oreal.algorithm.schedule import policy_is_frozen
from megatron_oreal.algorithm.token_weights import token_weights, uniform_weights
from megatron_oreal.config.schema import Config
from megatron_oreal.data.sampler import PromptSampler
from megatron_oreal.engine.roles import Policy, Reference, TokenRewardModel
from megatron_oreal.rollout.weight_sync import WeightSync
from megatron_oreal.trainer.group_source import GroupSource
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.probe import check_difference
from megatron_oreal.trainer.rates import Rates
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import Advance, PackedBatch


@dataclass
class OrealLoop:
    """One iteration of OREAL; every rank runs the same lines, each collective over the world."""

    config: Config
    prompts: PromptSampler
    source: GroupSource
    packer: Packer
    policy: Policy
    reference: Reference
    token_rm: TokenRewardModel | None
    weight_sync: WeightSync | None
    rates: Rates
    journal: Journal
    skipped: SkippedSteps
    alarms: RunAlarms
    engine_checked: bool = False

    def iterate(self, iteration: int) -> None:
        """Asks, has judged, and learns where a question is neither solved nor failed throughout."""
        cfg, journal = self.config, self.journal
        journal.watchdog.begin(iteration)
        prompts = self.prompts.next_batch(cfg.data.questions_per_iteration)  # l. 4
        judged = self.source.answer(prompts, iteration)  # l. 5-6
        journal.groups(judged)
        self.alarms.sampled(judged)
        groups, dropped = shaping.drop_unverified(
            judged, cfg.verifier.max_unverified_share, cfg.verifier.unverified_is_incorrect
        )
        groups = shaping.shape_rewards(groups, cfg.oreal)  # l. 7
        trajectories = selection.select(groups, cfg.oreal, cfg.run.seed, iteration)  # l. 8-9
        batch = self.packer.pack(trajectories)
        if trajectories:
            self._rest_engines()
            self._check_start(batch)
            weighed = self._weigh(batch, iteration)  # l. 10-11
            batch = self._update(batch, weighed["token_weight"], iteration)  # l. 12
            batch = batch.with_fields(**weighed)
        journal.iteration(
            iteration,
            trajectories=len(trajectories),
            dropped=dropped,
            updates=self.rates.policy_updates,
            refused=len(self.skipped.reasons),
        )
        journal.transcripts(iteration, groups, batch)
        if self.alarms.end_iteration(iteration, self.skipped) or self.skipped.reasons:
            self.source.keep(judged, iteration)
        journal.write(iteration)
        self.alarms.stop(iteration)
        self.skipped.end_iteration(iteration)

    def _check_start(self, batch: PackedBatch) -> None:
        """Compares, once, the policy with the reference, which it still is, and with the engine.

        Refuses to train if engine and policy score the same tokens too differently.
        """
        if self.engine_checked:
            return
        with self.journal.phase("check"):
            logprobs = self.policy.logprobs(batch).logprobs
            reference = self.reference.logprobs(batch).logprobs
        mismatch = check_difference(logprobs, batch.trajectories, self.config)
        self.journal.start(logprobs, reference, mismatch)
        self.engine_checked = True

    def _weigh(self, batch: PackedBatch, iteration: int) -> dict[str, list[Tensor]]:
        """Token weights from the scores of the forward before the token_rm's own step (Eq. 12)."""
        if self.token_rm is None:
            lengths = [t.response_length for t in batch.trajectories]
            return {"token_weight": uniform_weights(lengths)}
        objective = objectives.token_rm_objective(len(batch.trajectories))
        rate = self.rates.token_rm(iteration)
        with self._phase("token_rm", batch) as advance:
            step = self.token_rm.step(batch, objective, rate, advance, self.alarms.refuse)
        if self.skipped.took("token_rm", step):
            self.rates.token_rm_updates += 1
        self.journal.token_rm(batch, step, rate)
        rewards = [t.reward for t in batch.trajectories]
        weights = token_weights(step.scores, rewards, self.config.oreal.token_weights)
        return {"token_weight": weights, "token_score": step.scores}

    def _update(self, batch: PackedBatch, weights: list[Tensor], iteration: int) -> PackedBatch:
        """One step down Eq. 11, and the new weights to the engines; nothing moves while frozen."""
        with self._phase("reference", batch) as advance:
            reference = self.reference.logprobs(batch, advance).logprobs
        trajectories = batch.trajectories
        batch = batch.with_fields(**objectives.policy_fields(trajectories, weights, reference))
        batch = self._correct(batch)
        objective = objectives.policy_objective(
            self.config.oreal, *objectives.count_tokens(trajectories)
        )
        frozen = policy_is_frozen(iteration, self.config.schedule)
        rate = self.rates.policy(iteration)
        refuse = self.alarms.refuse_policy(batch)
        with self._phase("policy", batch) as advance:
            step = (
                self.policy.logprobs(batch, advance)
                if frozen
                else self.policy.step(batch, objective, rate, advance, refuse)
            )
        self.journal.policy(batch, step, rate)
        if not frozen and self.skipped.took("policy", step):
            self.rates.policy_updates += 1
            self.push_weights()
        self.wake_engines()
        return batch.with_fields(logprobs=step.logprobs, entropy=step.entropy)

    def _correct(self, batch: PackedBatch) -> PackedBatch:
        """Adds importance weights from a forward of the policy as it sampled; none while off.

        A pass of its own: a response's ratio is known only after its last token.
        """
        cfg = self.config.oreal.importance
        if cfg.level == "none":
            return batch
        with self._phase("importance", batch) as advance:
            logprobs = self.policy.logprobs(batch, advance).logprobs
        rollout = [torch.tensor(t.rollout_logprobs) for t in batch.trajectories]
        ratios = importance.log_ratios(logprobs, rollout)
        self.journal.add(importance.importance_metrics(cfg, ratios))
        return batch.with_fields(importance_weight=importance.importance_weights(cfg, ratios))

    def _phase(self, name: str, batch: PackedBatch) -> AbstractContextManager[Advance]:
        return self.journal.phase(name, len(batch.micro_batches[0]), "micro-batches")

    def push_weights(self) -> None:
        """Hands the policy's weights to the engines, where there are any."""
        if self.weight_sync:
            with self.journal.phase("sync"):
                self.weight_sync.push()

    def wake_engines(self) -> None:
        """Does the same where engines sleep: what sleeps has lost its weights."""
        if self.weight_sync and self.weight_sync.engine.needs_weights:
            self.push_weights()

    def _rest_engines(self) -> None:
        """Has the engines give their memory to the training, until they are given weights again."""
        if self.weight_sync:
            with self.journal.phase("sleep"):
                self.weight_sync.engine.sleep()
