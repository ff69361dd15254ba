"""vLLM inside the training ranks: `external_launcher`, one engine every `tensor_parallel` ranks.

1. Rank r belongs to engine r // tp. The ranks of one engine each run vLLM's scheduler and stay in
   step because they add the same requests in the same order, each with its own seed, and nothing is
   aborted or timed.
2. Token ids go in and come out; the caller's tokenizer decodes them, vLLM loads none.
3. Log-probabilities are raw: of the model's own distribution, before temperature and top-p; or, for
   importance weights, of the one that is sampled from.
4. Asleep, at vLLM's level 2, weights and cache give up their memory and their content; addresses
   stay. On a CPU vLLM's scheduler alone sleeps: the order of the steps is the same.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import warnings
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.registry import read_model
from megatron_oreal.monitor.pending import waiting
from megatron_oreal.parallel.collectives import broadcast_bytes, world_rank, world_size
from megatron_oreal.parallel.cuda_on_cpu import has_gpu
from megatron_oreal.rollout.cycle import Cycle
from megatron_oreal.rollout.dealing import deal
from megatron_oreal.rollout.exchange import all_gather_rollouts
from megatron_oreal.rollout.process_state import process_state_kept, random_state_kept
from megatron_oreal.rollout.sharing import SharedProgress, named, response_budgets, unanswered
from megatron_oreal.rollout.vllm_arguments import (
    LogprobsMode,
    beside_training,
    engine_arguments,
)
from megatron_oreal.rollout.vllm_live import LiveCheck, with_tied_head
from megatron_oreal.types import Advance, Rollout
from megatron_oreal.weights.vllm_layout import LiveShard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from vllm import RequestOutput
    from vllm.logprobs import FlatLogprobs
    from vllm.v1.engine.llm_engine import LLMEngine

    from megatron_oreal.config.schema import Precision, RolloutConfig, SamplingConfig
    from megatron_oreal.rollout.engine import Finished, Renew, Request
    from megatron_oreal.weights.sums import Checksums

_CPU_WORKER = "megatron_oreal.rollout.vllm_cpu_worker.NamedCpuWorker"


class VllmInProcess:
    """The backend whose engines live in the training ranks; `RolloutEngine` is its contract."""

    def __init__(
        self,
        model_path: str,
        config: RolloutConfig,
        *,
        precision: Precision,
        max_total_tokens: int,
        stop_token_id: int,
        decode: Callable[[Sequence[int]], str],
        logprobs_mode: LogprobsMode = "raw_logprobs",
        weights: bool = True,
        kv_cache_bytes: int | None = None,
        verbose: bool = False,
    ) -> None:
        """Starts this rank's part of its engine; collective over the world.

        Args:
            model_path: Hugging Face folder, read by every rank.
            config: the `rollout` section.
            precision: of weights and KV cache.
            max_total_tokens: the longest prompt and response together that will be asked for.
            stop_token_id: the only token that ends a response.
            decode: response ids -> text, without special tokens.
            logprobs_mode: of which distribution log-probabilities are, as vLLM calls it.
            weights: reads those of `model_path`; without, the engine waits for the first push.
            kv_cache_bytes: of this rank's cache; None: see `vllm_arguments.engine_arguments`.
            verbose: lets vLLM log.

        Raises:
            UserError: vLLM is missing or refuses the configuration; TP does not divide the world.
        """
        _require_vllm(tp := config.tensor_parallel)
        self._tp, self._n_engines, self._engine = tp, world_size() // tp, world_rank() // tp
        self._speaks = world_rank() % tp == 0
        self._max_total_tokens, self._eager = max_total_tokens, config.enforce_eager
        self._stop_token_id, self._decode = stop_token_id, decode
        arguments = engine_arguments(
            model_path,
            config,
            precision,
            max_total_tokens,
            logprobs_mode,
            kv_cache_bytes=kv_cache_bytes,
        ) | beside_training(config, weights=weights)
        with process_state_kept(_environment(verbose)), _quiet(verbose):
            self._llm = _start(arguments)
        self._tied = bool(self._llm.model_config.hf_config.tie_word_embeddings)
        family, dims = read_model(model_path)
        self._names = set(family.tensors(dims))
        self._sleeps, self._addresses = config.sleep, dict[str, int]()
        self._cycle = Cycle("generating" if weights or config.sleep else "weights awake")
        if not weights:
            self.sleep()

    def generate(
        self,
        requests: Sequence[Request],
        sampling: SamplingConfig,
        advance: Advance,
        finished: Finished = lambda _index, _rollout: None,
    ) -> list[Rollout]:
        """Samples one response a request; see `RolloutEngine.generate`."""
        budgets = response_budgets(requests, sampling, self._max_total_tokens)
        lengths = [len(r.tokens) + n for r, n in zip(requests, budgets, strict=True)]
        own = deal(lengths, self._n_engines)[self._engine]
        told_here = set(own[world_rank() % self._tp :: self._tp])  # one rank of an engine each
        progress = SharedProgress(len(own), len(requests), advance)
        rollouts: dict[int, Rollout] = {}
        waits = waiting(lambda: f"vLLM, {unanswered(own, rollouts)}")
        with self._cycle.step("generate"), random_state_kept(), self._compilation(), waits:
            for index in own:
                self._add(index, requests[index], sampling, budgets[index])
            while self._llm.has_unfinished_requests():
                for output in cast("list[RequestOutput]", self._llm.step()):
                    index = int(output.request_id)
                    rollouts[index] = self._rollout(output)
                    progress.report(len(rollouts))
                    if index in told_here:
                        finished(index, rollouts[index])
        gathered = all_gather_rollouts(rollouts if self._speaks else {}, len(requests))
        progress.finish()
        return gathered

    def renew_by(self, renew: Renew) -> None:
        """Ends with its ranks, and is never started again; see `RolloutEngine.renew_by`."""

    @property
    def receivers(self) -> None:
        """All ranks; see `RolloutEngine.receivers`."""
        return

    def live_shard(self) -> LiveShard:
        """Returns what this rank's vLLM computes with; see `RolloutEngine.live_shard`."""
        (parameters,) = self._llm.apply_model(lambda model: dict(model.named_parameters()))
        return LiveShard(parameters, world_rank() % self._tp, self._tp)

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        """Replaces all weights; see `RolloutEngine.load_weights`.

        vLLM keeps a tensor until its layer is complete. Tied embeddings come once, as in the
        checkpoint; the head's copy of them, which vLLM packs on a CPU, is served from here. Where
        weights are checked, what vLLM computes with is read back, see `vllm_live`.
        """
        names: set[str] = set()
        weights = with_tied_head(named(tensors, names), self._tied)
        check = None
        if expected is not None:
            (check,) = self._llm.apply_model(LiveCheck)
            weights = check.noted(weights)
        with self._cycle.step("write"):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            if names != self._names:
                missing, unknown = sorted(self._names - names), sorted(names - self._names)
                raise ValueError(f"weights for vLLM: missing {missing[:3]}, unknown {unknown[:3]}")
        self.forget_prefixes()
        return check.differing() if check else []

    def forget_prefixes(self) -> None:
        """Forgets every cached prefix; see `RolloutEngine.forget_prefixes`."""
        with self._cycle.step("write"):
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache: a request is still running")

    @property
    def needs_weights(self) -> bool:
        """Until the first push, and from `sleep` on; see `RolloutEngine.needs_weights`."""
        return self._cycle.state != "generating"

    def sleep(self) -> None:
        """Gives memory back, unless `rollout.sleep` is off; see `RolloutEngine.sleep`."""
        if not self._sleeps:
            return
        with self._cycle.step("sleep") as due:
            if due:
                self._addresses = self._find_addresses()
                self._llm.sleep(level=2)  # level 1 would copy the weights to the host first

    def wake_weights(self) -> None:
        """Takes memory for the weights; see `RolloutEngine.wake_weights`.

        Raises:
            RuntimeError: They lie elsewhere than before: nothing may be written in place.
        """
        with self._cycle.step("wake_weights") as due:
            if due:
                self._wake("weights")
                if self._find_addresses() != self._addresses:
                    raise RuntimeError("vLLM moved its parameters while it slept")

    def wake_cache(self) -> None:
        """Takes memory for the cache; see `RolloutEngine.wake_cache`."""
        with self._cycle.step("wake_cache") as due:
            if due and self._llm.is_sleeping():  # an engine that never slept has all of it
                self._wake("kv_cache")

    def _wake(self, what: str) -> None:
        if has_gpu():
            torch.cuda.empty_cache()  # what training left unused is not vLLM's to take before
        self._llm.wake_up(tags=[what])

    def _find_addresses(self) -> dict[str, int]:
        parameters = self.live_shard().parameters
        return {name: parameter.data_ptr() for name, parameter in parameters.items()}

    def differing(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> list[str]:
        """Reads all weights back and returns the names of those that are not these tensors'.

        Not collective but for the iterator, of which each rank draws all; a rank compares what its
        part of the engine computes with, element by element.
        """
        (check,) = self._llm.apply_model(LiveCheck)
        return check.differing_from(with_tied_head(tensors, self._tied))

    def close(self) -> None:
        """Frees the engine; collective over the world, whose process group stays."""
        with _world_kept():
            self._llm.engine_core.shutdown()
        del self._llm

    def _compilation(self) -> contextlib.AbstractContextManager[object]:
        # The sampler compiles even in eager mode: on a CPU that needs a C++ compiler and is slower.
        if self._eager and not has_gpu():
            return torch.compiler.set_stance("force_eager")
        return contextlib.nullcontext()

    def _add(self, index: int, request: Request, sampling: SamplingConfig, budget: int) -> None:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        parameters = SamplingParams(
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=budget,
            stop_token_ids=[self._stop_token_id],
            ignore_eos=True,  # the stop token above is the only one
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.tokens))
        self._llm.add_request(str(index), prompt, parameters)

    def _rollout(self, output: RequestOutput) -> Rollout:
        (answer,) = output.outputs
        tokens = tuple(answer.token_ids)
        logprobs = cast("FlatLogprobs", answer.logprobs).logprobs
        return Rollout(
            tokens=tokens,
            logprobs=tuple(logprobs),
            text=self._decode(tokens),
            stopped=answer.finish_reason == "stop",
        )


def _environment(verbose: bool) -> dict[str, str]:
    """What vLLM reads while it starts; `external_launcher` asks for ranks that torch knows."""
    rank = str(world_rank())
    return {
        "RANK": rank,
        "LOCAL_RANK": str(torch.cuda.current_device()) if has_gpu() else rank,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO" if verbose else "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


@contextlib.contextmanager
def _quiet(verbose: bool) -> Iterator[None]:
    """Keeps start-up warnings of vLLM and of what it imports off the console."""
    if verbose:
        yield
        return
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def _require_vllm(tensor_parallel: int) -> None:
    if world_size() % tensor_parallel != 0:
        raise UserError(
            f"rollout.tensor_parallel={tensor_parallel}: set a divisor of the {world_size()} ranks"
        )
    if importlib.util.find_spec("vllm") is None:
        raise UserError("rollout.backend=vllm: vLLM is not installed; see README, Install")


def _start(arguments: Mapping[str, Any]) -> LLMEngine:
    """Builds this rank's part of an engine; collective over the world."""
    from vllm import EngineArgs
    from vllm.v1.engine.llm_engine import LLMEngine

    name = broadcast_bytes(uuid4().hex.encode()).decode()
    settings = EngineArgs(
        **arguments,
        distributed_executor_backend="external_launcher",
        worker_cls="auto" if has_gpu() else _CPU_WORKER,
        additional_config={"engine_name": name},
        use_tqdm_on_load=False,
    )
    try:
        return LLMEngine.from_engine_args(settings)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"rollout: vLLM refuses {arguments['model']} with it: {reason}") from error


@contextlib.contextmanager
def _world_kept() -> Iterator[None]:
    """Lets vLLM destroy the process groups that it made, and not the world that it was lent."""
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda group=None: group and destroy(group)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group = destroy
