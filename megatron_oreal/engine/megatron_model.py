"""One Megatron model on this rank and what is done with it: run a batch forward, or step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_oreal.config.schema import Config, OptimizerConfig
from megatron_oreal.config.schema_precision import TOKEN_MULTIPLE, Role
from megatron_oreal.engine.micro_batch import MicroBatch, ScorePosition, lay_out
from megatron_oreal.engine.offload import all_here, free_gradients, park, stays
from megatron_oreal.engine.optimizer import (
    build_optimizer,
    finish_gathers,
    gradient_norm,
    set_learning_rate,
    wrap_for_training,
)
from megatron_oreal.engine.optimizer_state import (
    OptimizerShard,
    optimizer_shards,
    set_steps_taken,
    steps_taken,
)
from megatron_oreal.models.build import PackedGPT, build_stages, head_of
from megatron_oreal.models.family import ModelDims
from megatron_oreal.parallel.collectives import all_reduce_sum
from megatron_oreal.parallel.cuda_on_cpu import cuda_on_cpu
from megatron_oreal.parallel.topology import Topology
from megatron_oreal.types import Advance, PackedBatch, advance_nothing


class HeadResult(NamedTuple):
    """A head's loss of a micro-batch, and named `[n]` values, one a response token it scores.

    Over the ranks of a context-parallel group the losses add up.
    """

    loss: torch.Tensor
    per_token: Mapping[str, torch.Tensor]


class _Record(NamedTuple):
    """What is kept of a micro-batch; `slots` `[n]` count the response tokens of the batch."""

    loss: torch.Tensor
    per_token: Mapping[str, torch.Tensor]
    slots: torch.Tensor


Load = Callable[[Mapping[str, torch.Tensor]], None]
"""Fills this rank's parameters, by name; may be collective over the world."""


Refuse = Callable[[Mapping[str, Sequence[torch.Tensor]]], str]
"""Says, of the per-token values of a step, why it is not to be taken; empty if it is."""


def refuse_nothing(_values: Mapping[str, Sequence[torch.Tensor]]) -> str:
    """Lets every step be taken."""
    return ""


class Head(Protocol):
    """Turns the last stage's hidden states into a loss and the per-token values of these names."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the per-token values it returns."""
        ...

    @property
    def score_position(self) -> ScorePosition:
        """Where it scores a response token."""
        ...

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        """`hidden` is what `PackedGPT.forward_packed` returns on the last stage."""
        ...


class StepResult(NamedTuple):
    """`per_token[name][i]` is `[response_length of trajectory i]`, as it was before the update.

    `refused` says why no weight was changed; empty after an update.
    """

    per_token: dict[str, list[torch.Tensor]]
    loss: float
    grad_norm: float
    refused: str


class MegatronModel:
    """A model of one role on this rank, ready for use once `load` has filled its parameters.

    With an `optimizer` configuration it can `step`; without one nothing ever changes it. What
    `offload.*` names is on the device while a method of it runs, or within `awake`.
    """

    def __init__(
        self,
        dims: ModelDims,
        config: Config,
        topology: Topology,
        role: Role,
        *,
        load: Load,
        optimizer: OptimizerConfig | None,
    ) -> None:
        self.topology = topology
        self.dims = dims
        self.head = head_of(role)
        recipe = config.fp8.role(role).recipe
        self.cut = replace(topology.cut, token_multiple=TOKEN_MULTIPLE[recipe])
        self.lacks_scales = recipe == "delayed"
        self.stages = build_stages(dims, config, topology, role)
        budget = config.engine.tokens_per_micro_batch
        self._fill_to = budget if config.engine.pad_to_budget else 0
        self._optimizer = None
        self._weights_here = self._gradients_here = self._optimizer_here = stays
        self.load(load)
        self._wrapped: Sequence[PackedGPT | DistributedDataParallel] = self.stages
        if optimizer is None:
            # Still `requires_grad`: Megatron multiplies by frozen weights in another way, which
            # rounds differently, and a reference equal to the policy must score equally.
            for stage in self.stages:
                stage.eval()
        else:
            self._prepare_training(config, optimizer)
        away = {"reference": config.offload.reference, "token_rm": config.offload.token_rm}
        self._weights_here = park(self._weights, wanted=away.get(role, False))

    def _prepare_training(self, config: Config, optimizer: OptimizerConfig) -> None:
        """Adds gradient buffers and an optimizer; collective over the world."""
        with cuda_on_cpu():
            self._wrapped = wrapped = wrap_for_training(self.stages, config)
            self._optimizer = build_optimizer(wrapped, optimizer, config)
        settings = self.stages[0].config  # all stages' own
        settings.finalize_model_grads_func = finalize_model_grads
        settings.grad_scale_func = self._optimizer.scale_loss
        self._gradients_here = free_gradients(wrapped, wanted=config.offload.gradients)
        self._optimizer_here = park(self._optimizer_state, wanted=config.offload.optimizer)

    def _weights(self) -> Iterator[torch.Tensor]:
        return iter(self.parameters().values())

    def _optimizer_state(self) -> Iterator[torch.Tensor]:
        """The tensors that the optimizer alone has: in fp32 its weights are the model's."""
        weights = {weight.untyped_storage()._cdata for weight in self._weights()}
        for shard in self.optimizer_shards().values():
            for tensor in shard.tensors.values():
                if tensor.untyped_storage()._cdata not in weights:
                    yield tensor

    def awake(self) -> AbstractContextManager[None]:
        """Brings weights and optimizer to the device until the block ends; not collective."""
        return all_here(self._weights_here, self._optimizer_here)

    def settle(self) -> None:
        """Waits until this rank has all weights of the last step; collective over data parallelism.

        With `parallel.overlap_param_gather` a step leaves the others' share to the next forward
        pass; who reads weights otherwise calls this first.
        """
        if self._optimizer is None:
            return
        with cuda_on_cpu():
            for chunk in self._wrapped:
                assert isinstance(chunk, DistributedDataParallel)
                finish_gathers(chunk)

    def load(self, load: Load) -> None:
        """Fills the parameters; collective where `load` is.

        An optimizer that is there already goes on from them: its weights are theirs afterwards, its
        moments stay.
        """
        with self.awake():
            load(self._stored_in_a_checkpoint())
            if self._optimizer is not None:
                # It has copies of its own of bf16 parameters, and would write them back.
                self._optimizer.reload_model_params()

    def named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """This rank's live parameters by Megatron's names, layers counted over the whole model."""
        return {name: value for stage in self.stages for name, value in stage.named_weights()}

    def parameters(self) -> dict[str, torch.Tensor]:
        """Likewise, detached from any graph."""
        return {name: parameter.detach() for name, parameter in self.named_parameters().items()}

    def _stored_in_a_checkpoint(self) -> dict[str, torch.Tensor]:
        """The parameters that a language model's checkpoint has: all but a scalar head."""
        return {
            name: value
            for name, value in self.parameters().items()
            if self.head == "vocab" or not name.startswith("output_layer.")
        }

    def optimizer_shards(self) -> dict[str, OptimizerShard]:
        """What this rank's optimizer keeps of its parameters, by Megatron's names."""
        assert self._optimizer is not None, "a frozen model has no optimizer"
        return optimizer_shards(self._optimizer, self.named_parameters())

    def steps_taken(self) -> int:
        """How many steps this rank's optimizer has seen; 0 where it has nothing to optimize."""
        assert self._optimizer is not None, "a frozen model has no optimizer"
        return steps_taken(self._optimizer)

    def set_steps_taken(self, steps: int) -> None:
        """Puts an optimizer that has taken none after so many steps, its moments to be filled.

        To be called within `awake`.
        """
        assert self._optimizer is not None, "a frozen model has no optimizer"
        with cuda_on_cpu():
            set_steps_taken(self._optimizer, steps)

    def infer(
        self, batch: PackedBatch, head: Head, advance: Advance = advance_nothing
    ) -> dict[str, list[torch.Tensor]]:
        """Runs the batch forward and returns every trajectory's per-token values on every rank.

        Collective over the world. `advance` is told of this rank's micro-batches as they start.
        """
        with self._weights_here(), torch.no_grad():
            self._learn_scales(batch, head)
            records = self._run(batch, head, advance, forward_only=True)
        return self._spread(batch, head.names, records)

    def step(
        self,
        batch: PackedBatch,
        head: Head,
        learning_rate: float,
        advance: Advance = advance_nothing,
        refuse: Refuse = refuse_nothing,
    ) -> StepResult:
        """Runs the batch forward and backward and updates the weights once, if all is finite.

        Collective over the world, whose ranks all update or all refuse to. The values returned are
        those of the forward pass before the update. `advance`: see `infer`. `refuse` may refuse
        the step as well: it must say the same on every rank.
        """
        assert self._optimizer is not None, "a frozen model takes no step"
        set_learning_rate(self._optimizer, learning_rate)
        with all_here(self._weights_here, self._gradients_here):
            return self._step(batch, head, advance, refuse)

    def _step(self, batch: PackedBatch, head: Head, advance: Advance, refuse: Refuse) -> StepResult:
        assert self._optimizer is not None
        self._learn_scales(batch, head)
        with cuda_on_cpu():
            for stage in self._wrapped:
                assert isinstance(stage, DistributedDataParallel)
                stage.zero_grad_buffer()
            self._optimizer.zero_grad()
        records = self._run(batch, head, advance, forward_only=False)
        per_token = self._spread(batch, head.names, records)
        loss = sum((record.loss.cpu() for record in records), start=torch.zeros(()))
        if not self.topology.reports_scores:
            loss = torch.zeros(())
        total = float(all_reduce_sum(loss.float()))
        with cuda_on_cpu():
            grad_norm = gradient_norm(self._optimizer)
            # The sum is the same on every rank, and not finite if the norm of any is not.
            norms = float(all_reduce_sum(torch.tensor(grad_norm)))
            wrong = not_finite(per_token, total, norms)
            refused = f"{wrong} not finite" if wrong else refuse(per_token)
            if not refused:
                with self._optimizer_here():
                    self._optimizer.step()
        return StepResult(per_token, total, grad_norm, refused)

    def _learn_scales(self, batch: PackedBatch, head: Head) -> None:
        """Passes forward once for the scales of delayed scaling, which begin at 1.

        Collective like `_run`. TE moves scales where gradients are wanted alone, and else would
        round the first scores and the first micro-batch of a step as if nothing were known.
        """
        if self.lacks_scales:
            with torch.enable_grad():
                self._run(batch, head, advance_nothing, forward_only=True)
            self.lacks_scales = False

    def _run(
        self, batch: PackedBatch, head: Head, advance: Advance, *, forward_only: bool
    ) -> list[_Record]:
        """Sends this data-parallel rank's micro-batches through the pipeline.

        Collective over the ranks that share the model; records come on its last stage.
        """
        cut = self.cut
        micro_batches = [
            lay_out(batch, m, cut, score_position=head.score_position, fill_to=self._fill_to)
            for m in batch.micro_batches[self.topology.dp_rank]
        ]
        with cuda_on_cpu():
            return get_forward_backward_func()(
                forward_step_func=functools.partial(_forward_step, head=head),
                # A rank's first stage has a micro-batch before its later ones.
                data_iterator=[
                    _told(micro_batches, advance_nothing if later else advance)
                    for later in range(len(self._wrapped))
                ],
                model=list(self._wrapped),
                num_microbatches=len(micro_batches),
                # Megatron divides it by the context-parallel size.
                seq_length=max(len(m.tokens) for m in micro_batches) * cut.cp_size,
                micro_batch_size=1,
                forward_only=forward_only,
            )

    def _spread(
        self, batch: PackedBatch, names: Sequence[str], records: Sequence[_Record]
    ) -> dict[str, list[torch.Tensor]]:
        """Hands every rank the per-token values of every trajectory.

        Collective over the world: reporting ranks fill in what they hold, all others zeros, and the
        sum is exact.
        """
        lengths = [trajectory.response_length for trajectory in batch.trajectories]
        spread: dict[str, list[torch.Tensor]] = {}
        for name in names:
            values = torch.zeros(sum(lengths))
            if self.topology.reports_scores:
                for record in records:
                    values[record.slots] = record.per_token[name].float().cpu()
            spread[name] = list(all_reduce_sum(values).split(lengths))
        return spread


def _told(micro_batches: Sequence[MicroBatch], advance: Advance) -> Iterator[MicroBatch]:
    for micro_batch in micro_batches:
        yield micro_batch
        advance(1)


def not_finite(
    per_token: Mapping[str, Sequence[torch.Tensor]], loss: float, grad_norm: float
) -> str:
    """Returns the name of the first that is not finite, empty where all are."""
    for name, values in per_token.items():
        if not all(bool(value.isfinite().all()) for value in values):
            return name
    if not math.isfinite(loss):
        return "loss"
    return "" if math.isfinite(grad_norm) else "gradient norm"


def _forward_step(
    micro_batches: Iterator[MicroBatch], model: Any, head: Head
) -> tuple[torch.Tensor, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, _Record]]]:
    """Returns this stage's hidden states, and what the last stage makes of them."""
    micro_batch = next(micro_batches)
    hidden = model(**PackedGPT.packed_inputs(micro_batch.tokens, micro_batch.packed))

    def loss(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, _Record]:
        result = head(hidden, micro_batch)
        # Megatron frees the tensor it gets once it has no more use for its value.
        record = _Record(result.loss.detach(), result.per_token, micro_batch.slots)
        # No tokens are counted: the objective divides, Megatron adds up micro-batches and ranks.
        return result.loss, torch.tensor(0, dtype=torch.int), record

    return hidden, loss
