"""vLLM as servers in other processes, on this machine or others: `rollout.backend=vllm_server`.

1. Host h is rank h % world's to ask; the requests are dealt to the hosts by expected length, and
   every rank gets all rollouts in the end. Token ids go in and come out.
2. The world's first rank alone sends weights. Servers are paused meanwhile, take whole tensors
   through vLLM's weight-transfer API, and forget their prefixes before they resume.
3. A server is believed only as far as it says what it serves: see `check_server`.
4. A server that has died is waited for: whoever started it starts it again, as `serve --restart`
   does. It begins with the weights of the checkpoint, so that all servers are joined and given the
   policy's weights anew; then the requests without an answer are asked again, whose seeds make the
   answers the same. One that died while nothing was asked shows by its other `oreal_life`.
"""

from __future__ import annotations

import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_oreal.config.errors import UserError
from megatron_oreal.models.hf_config import read_config_json
from megatron_oreal.models.registry import read_model
from megatron_oreal.monitor.pending import waiting
from megatron_oreal.parallel.collectives import (
    agree,
    all_gather_bytes,
    broadcast_bytes,
    world_rank,
    world_size,
)
from megatron_oreal.rollout.dealing import deal
from megatron_oreal.rollout.exchange import all_gather_rollouts
from megatron_oreal.rollout.server_client import (
    Asked,
    Sample,
    Server,
    ServerLost,
    alongside,
    sample_all,
)
from megatron_oreal.rollout.server_link import Fleet, GlooLink, Link
from megatron_oreal.rollout.sharing import SharedProgress, named, response_budgets, unanswered
from megatron_oreal.rollout.vllm_arguments import DTYPES, LogprobsMode
from megatron_oreal.rollout.vllm_plugin import TRANSFERS
from megatron_oreal.types import Advance, Rollout
from megatron_oreal.weights.plan import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from megatron_oreal.config.schema import Precision, RolloutConfig, SamplingConfig
    from megatron_oreal.rollout.engine import Finished, Renew, Request
    from megatron_oreal.weights.sums import Checksums

_MIB = 1 << 20
_MOST_DEATHS = 3  # in a row, of one generation
# Of config.json: what makes two models of one family differ in any tensor.
_MODEL_KEYS = (
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
)


class VllmServer:
    """The backend whose engines are servers; `RolloutEngine` is its contract."""

    receivers = (0,)

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
    ) -> None:
        """Waits for the servers and checks what they serve; collective over the world.

        Args:
            model_path: Hugging Face folder of the model that they should serve.
            config: the `rollout` section.
            precision: of weights and KV cache.
            max_total_tokens: the longest prompt and response together that will be asked for.
            stop_token_id: the only token that ends a response.
            decode: response ids -> text, without special tokens.
            logprobs_mode: of which distribution log-probabilities are, as vLLM calls it.

        Raises:
            UserError: On every rank: a server does not answer, or serves something else.
        """
        self._servers = [Server(host) for host in config.server_hosts]
        self._concurrency = config.max_sequences
        self._max_total_tokens = max_total_tokens
        self._stop_token_id, self._decode = stop_token_id, decode
        family, dims = read_model(model_path)
        dtype = getattr(torch, DTYPES[precision])
        self._tensors = [TensorSpec(n, shape, dtype) for n, shape in family.tensors(dims).items()]
        self._config = config
        self._wanted = _wanted(model_path, precision, config, logprobs_mode)
        self._link: Link | None = None
        self._lives: list[list[str]] = []
        self._lost = ""
        self._renew: Renew | None = None
        self._join()

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
        hands = deal(lengths, len(self._servers))
        own = range(world_rank(), len(self._servers), world_size())
        progress = SharedProgress(sum(len(hands[host]) for host in own), len(requests), advance)
        rollouts: dict[int, Rollout] = {}
        left = [index for host in own for index in hands[host]]

        def done(index: int, sample: Sample) -> None:
            rollouts[index] = self._rollout(sample)
            progress.report(len(rollouts))
            finished(index, rollouts[index])

        def asked(index: int) -> Asked:
            parameters = self._parameters(requests[index], sampling, budgets[index])
            return Asked(index, requests[index].tokens, parameters)

        def sample() -> str:
            missing = {host: [i for i in hands[host] if i not in rollouts] for host in own}
            shares = [(self._servers[host], list(map(asked, missing[host]))) for host in own]
            with waiting(lambda: f"rollout servers, {unanswered(left, rollouts)}"):
                return sample_all(shares, self._concurrency, done)

        self._sample_all(sample)
        gathered = all_gather_rollouts(rollouts, len(requests))
        progress.finish()
        return gathered

    def renew_by(self, renew: Renew) -> None:
        """Takes what brings the present weights after a restart; see `RolloutEngine.renew_by`."""
        self._renew = renew

    def live_shard(self) -> None:
        """The parameters are in other processes; see `RolloutEngine.live_shard`."""
        return

    def load_weights(
        self, tensors: Iterator[tuple[str, torch.Tensor]], expected: Checksums | None = None
    ) -> list[str]:
        """Replaces all weights; see `RolloutEngine.load_weights`."""
        sent: set[str] = set()
        wrong: list[str] = []
        with agree():
            try:
                if self._link:
                    wrong = self._update(self._link, tensors, expected, sent)
            except ServerLost as error:
                if self._renew is None:
                    raise
                self._lost = str(error)  # the next `generate` sends them again
            finally:
                # Or the other ranks would wait for this one.
                deque(named(tensors, sent), maxlen=0)
        names = {spec.name for spec in self._tensors}
        missing, unknown = sorted(names - sent), sorted(sent - names)
        text = f"weights for vLLM: missing {missing[:3]}, unknown {unknown[:3]}"
        problem = broadcast_bytes(text.encode() if missing or unknown else b"").decode()
        if problem:
            raise ValueError(problem)
        return wrong

    def forget_prefixes(self) -> None:
        """Nothing is written in place; see `RolloutEngine.forget_prefixes`."""

    @property
    def needs_weights(self) -> bool:
        """Never: servers keep theirs while others train; see `RolloutEngine.needs_weights`."""
        return False

    def sleep(self) -> None:
        """Servers have GPUs of their own; see `RolloutEngine.sleep`."""

    def wake_weights(self) -> None:
        """They never sleep; see `RolloutEngine.wake_weights`."""

    def wake_cache(self) -> None:
        """They never sleep; see `RolloutEngine.wake_cache`."""

    def close(self) -> None:
        """Leaves the servers as they are, for another run; collective over the world."""
        self._link = None

    def _sample_all(self, sample: Callable[[], str]) -> None:
        """Samples until every request is answered; collective over the world.

        Raises:
            UserError: A server refuses, does not come back in time, or has died too often.
        """
        for _ in range(_MOST_DEATHS):
            self._revive()
            with agree():
                lost = sample()
            found = [text.decode() for text in all_gather_bytes(lost.encode()) if text]
            if not found:
                return
            self._lost = found[0]
        raise UserError(f"{self._lost}; servers died {_MOST_DEATHS} times in one generation")

    def _revive(self) -> None:
        """Has all servers hold the policy's weights, where one has died; collective, the world."""
        for _ in range(_MOST_DEATHS):
            lost = broadcast_bytes(self._find_lost().encode()).decode()
            if not lost:
                return
            if self._renew is None:
                raise UserError(lost)
            with self._renew(lost) as push:
                self._join()
                push()
        raise UserError(f"{self._lost}; servers died {_MOST_DEATHS} times while they came back")

    def _find_lost(self) -> str:
        """Why the servers do not hold what they were last sent, empty where they do; first rank."""
        if world_rank() > 0 or self._lost:
            return self._lost
        try:
            lives = self._ask_lives()
        except ServerLost as error:
            return str(error)
        return "" if lives == self._lives else "rollout.server_hosts: a server was started anew"

    def _ask_lives(self) -> list[list[str]]:
        return alongside([partial(server.ask_workers, "oreal_life") for server in self._servers])

    def _join(self) -> None:
        """Waits for all servers, checks them and has them join; collective over the world."""
        deadline = time.monotonic() + self._config.server_wait_s
        self._link = None
        with agree():
            while world_rank() == 0 and self._link is None:
                try:
                    for server in self._servers:
                        server.wait(max(0.0, deadline - time.monotonic()))
                        check_server(server, self._wanted, self._max_total_tokens)
                    link = self._open_link(Fleet(self._servers), self._config)
                    self._lives, self._link = self._ask_lives(), link
                except ServerLost:  # it answered, and died
                    if time.monotonic() > deadline:
                        raise
        self._lost = ""

    def _open_link(self, fleet: Fleet, config: RolloutConfig) -> Link:
        if config.server_transfer == "gloo":
            return GlooLink(fleet, config.sync_round_mib * _MIB)
        # Imported where it is asked for: a trainer need not have vLLM.
        from megatron_oreal.rollout.server_nccl import NcclLink

        return NcclLink(fleet, self._tensors)

    def _update(
        self,
        link: Link,
        tensors: Iterator[tuple[str, torch.Tensor]],
        expected: Checksums | None,
        sent: set[str],
    ) -> list[str]:
        """Sends weights while no server generates; returns the names of those that went wrong."""
        link.fleet.everywhere("/pause?mode=wait")
        link.carry(named(tensors, sent), check=expected is not None)
        if not all(answer["success"] for answer in link.fleet.everywhere("/reset_prefix_cache")):
            raise UserError("rollout.server_hosts: others ask a server as well; keep it to one run")
        link.fleet.everywhere("/resume")
        return [] if expected is None else link.differing(expected)

    def _parameters(
        self, request: Request, sampling: SamplingConfig, budget: int
    ) -> dict[str, Any]:
        return {
            "seed": request.seed,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": budget,
            "stop_token_ids": [self._stop_token_id],
            "ignore_eos": True,  # the stop token above is the only one
            "logprobs": 0,
            "detokenize": False,
        }

    def _rollout(self, sample: Sample) -> Rollout:
        return Rollout(sample.tokens, sample.logprobs, self._decode(sample.tokens), sample.stopped)


def check_server(server: Server, wanted: Mapping[str, Any], max_total_tokens: int) -> None:
    """Checks that a server samples from the model of the run, in the run's way.

    Args:
        server: One that is ready.
        wanted: What every worker must say of itself, by key; of the model, by `model.` and the key.
        max_total_tokens: The longest prompt and response together that will be asked for.

    Raises:
        UserError: It does not; names the first difference.
    """
    for worker in server.ask_workers("oreal_describe"):
        found = worker | {f"model.{key}": value for key, value in worker["model"].items()}
        for key, value in wanted.items():
            _require(server, key, found.get(key), value, found.get(key) == value)
        window = found["max_model_len"]
        _require(server, "max_model_len", window, max_total_tokens, window >= max_total_tokens)


def _require(server: Server, key: str, found: Any, wanted: Any, ok: bool) -> None:
    if not ok:
        raise UserError(
            f"rollout.server_hosts: {server.host} has {key}={found}, the run {wanted}: start it"
            " with `megatron-oreal serve` and the run's own config"
        )


def _wanted(
    model_path: str, precision: Precision, config: RolloutConfig, logprobs_mode: LogprobsMode
) -> dict[str, Any]:
    model = read_config_json(model_path)
    return {
        **{f"model.{key}": model[key] for key in _MODEL_KEYS if key in model},
        "dtype": DTYPES[precision],
        "quantization": None if config.quantization == "none" else config.quantization,
        "logprobs_mode": logprobs_mode,
        "chunked_prefill": False,
        "weight_transfer": TRANSFERS[config.server_transfer],
    }
