"""From a config to a run: every part built once, in the order that start-up errors need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial

from transformers import PreTrainedTokenizerBase

from megatron_oreal.checkpoint.checkpointer import Checkpointer, Resumed
from megatron_oreal.checkpoint.tensors import StoredModel
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.sampler import PromptSampler
from megatron_oreal.data.tokenizer import (
    load_tokenizer,
    stop_token_id,
    token_bytes,
    vocabulary_digest,
)
from megatron_oreal.engine.roles import Policy, Reference, TokenRewardModel
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import agree
from megatron_oreal.rollout.engine import RolloutEngine
from megatron_oreal.rollout.vllm_arguments import logprobs_mode
from megatron_oreal.rollout.vllm_inprocess import VllmInProcess
from megatron_oreal.rollout.vllm_server import VllmServer
from megatron_oreal.trainer.engine_memory import agree_on_cache, watch_memory
from megatron_oreal.trainer.evaluation import EvaluationResult, Evaluator
from megatron_oreal.trainer.exporter import Exporter
from megatron_oreal.trainer.group_source import GroupSource, RecordedGroups, SampledGroups
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.loop import OrealLoop
from megatron_oreal.trainer.models import ModelSource, open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.rates import Rates
from megatron_oreal.trainer.renewal import renewal
from megatron_oreal.trainer.resume import LoopProgress, find_checkpoint, read_progress
from megatron_oreal.trainer.run_alarms import RunAlarms
from megatron_oreal.trainer.saver import Saver
from megatron_oreal.trainer.skipped_steps import SkippedSteps
from megatron_oreal.types import Prompt
from megatron_oreal.verify.cascade import Verifier


@dataclass(frozen=True)
class Texts:
    """What of a run is text: the tokenizer, the token that ends a response, the questions."""

    tokenizer: PreTrainedTokenizerBase
    stop_id: int
    training: list[Prompt]
    held_out: list[Prompt]

    @cached_property
    def vocabulary(self) -> str:
        """Digest of the tokenizer's vocabulary."""
        return vocabulary_digest(self.tokenizer)

    def decode(self, tokens: Sequence[int]) -> str:
        """Turns response ids into text, without special tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))


@dataclass(frozen=True)
class TrainingRun:
    """A run ready to start."""

    config: Config
    loop: OrealLoop
    evaluator: Evaluator | None
    journal: Journal
    saver: Saver
    exporter: Exporter
    first_iteration: int
    before: EvaluationResult | None
    engine: RolloutEngine | None
    probe: Prompt

    def save(self, iteration: int, before: EvaluationResult | None) -> None:
        """Begins to save the run after so many iterations; collective over the world."""
        progress = LoopProgress(
            prompts=self.loop.prompts.state(),
            policy_updates=self.loop.rates.policy_updates,
            token_rm_updates=self.loop.rates.token_rm_updates,
            engine_checked=self.loop.engine_checked,
            skipped_in_a_row=self.loop.skipped.in_a_row,
            alarms_in_a_row=self.loop.alarms.in_a_row,
            before=before,
        )
        self.saver.save(iteration, progress)


def read_texts(config: Config, *, training: bool) -> Texts:
    """Reads tokenizer and question files; the same on every rank, collective over the world.

    Raises:
        UserError: What is missing or malformed, by file, line and field.
    """
    with agree():
        # First: transformers has a traceback of its own for each kind of family it half knows.
        _, dims = read_model(config.model.path)
        tokenizer = load_tokenizer(config.model.path)
        stop_id = stop_token_id(tokenizer, config.model.stop_token)
        read = partial(
            load_prompts,
            tokenizer=tokenizer,
            system_prompt=config.data.system_prompt,
            max_total_tokens=config.sampling.max_total_tokens,
        )
        texts = Texts(
            tokenizer,
            stop_id,
            read(config.data.path, columns=asdict(config.data.columns)) if training else [],
            read(config.evaluation.path, key="evaluation.path") if config.evaluation.path else [],
        )
        prompts = (prompt.tokens for prompt in (*texts.training, *texts.held_out))
        check_vocabulary(tokenizer, dims.vocab, ((stop_id,), *prompts))
    return texts


def check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab: int, texts: Iterable[Sequence[int]]
) -> None:
    """Checks that the model has a row for every token of these texts; not collective.

    Raises:
        UserError: It has not; names the token.
    """
    largest = max(max(tokens) for tokens in texts)
    if largest >= vocab:
        raise UserError(
            f"model.path={tokenizer.name_or_path}: the tokenizer gives"
            f" {tokenizer.convert_ids_to_tokens(largest)} the id {largest}, beyond the"
            f" vocab_size={vocab} of config.json: bring the model's own tokenizer, or name another"
            " model.stop_token if it is that"
        )


def start_engine(config: Config, texts: Texts, *, trains: bool = False) -> RolloutEngine:
    """Starts the rollout engines on the checkpoint's own weights, or finds servers.

    Collective over the world. Where a policy `trains` beside them, they wait for its weights.
    """
    share = partial(agree_on_cache, config, trains=trains)
    backend = (
        VllmServer
        if config.rollout.backend == "vllm_server"
        else partial(VllmInProcess, weights=not trains, kv_cache_bytes=share())
    )
    return backend(
        config.model.path,
        config.rollout,
        precision=config.model.precision,
        max_total_tokens=config.sampling.max_total_tokens,
        stop_token_id=texts.stop_id,
        decode=texts.decode,
        logprobs_mode=logprobs_mode(config),
    )


@contextlib.contextmanager
def training_run(config: Config) -> Iterator[TrainingRun]:
    """Builds a run and takes it down again; collective over the world.

    What can be wrong in files and layout is found before the first model is built.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    texts = read_texts(config, training=True)
    source = open_source(config)
    start = _find_start(config, texts)
    with contextlib.ExitStack() as stack:
        opened = Journal(config, config.schedule.iterations, start.resumed)
        journal = stack.enter_context(contextlib.closing(opened))
        journal.vocabulary(token_bytes(texts.tokenizer))
        recorded = RecordedGroups(config, journal, texts.vocabulary)
        if config.rollout.replay:
            recorded.check(start.iteration)
        with journal.watchdog.first_error_only(), journal.phase("start"):
            models = _build_models(source, start.resumed)
            weights = source.weights_digest(models.policy)
            watch_memory(config, journal)
            opening = open_engines(config, texts, journal, weights)
            engines = None if config.rollout.replay else stack.enter_context(opening)
            answers = engines.source if engines else recorded
            saver = Saver(start.checkpointer, journal, models.stored(), saved=answers.forget)
            saver.prepare()
        # Last, to see an error before the engines do: they would wait for ranks that have failed.
        stack.enter_context(journal.watchdog.first_error_only())
        yield TrainingRun(
            config=config,
            loop=_build_loop(models, start, answers, engines, journal),
            evaluator=engines.evaluator if engines else None,
            journal=journal,
            saver=saver,
            exporter=Exporter(source, models.policy, journal, start.resumed is not None),
            first_iteration=start.iteration,
            before=start.progress.before,
            engine=engines.engine if engines else None,
            probe=texts.training[0],
        )


@dataclass(frozen=True)
class Engines:
    """What a run has that samples for itself: engines, and what asks and judges with them."""

    engine: RolloutEngine
    source: SampledGroups
    evaluator: Evaluator | None


@contextlib.contextmanager
def open_engines(
    config: Config, texts: Texts, journal: Journal, weights: Callable[[], str] | None = None
) -> Iterator[Engines]:
    """Starts engines and verifier and ends them again; collective over the world.

    `weights` tells those of a policy that trains beside them; without, they are the checkpoint's.
    """
    with (
        Verifier(config.verifier, config.judge) as verifier,
        contextlib.closing(start_engine(config, texts, trains=weights is not None)) as engine,
    ):
        source = SampledGroups(config, engine, verifier, journal, texts.vocabulary, weights or str)
        evaluator = Evaluator(config, texts.held_out, engine, verifier) if texts.held_out else None
        yield Engines(engine, source, evaluator)


@dataclass(frozen=True)
class Start:
    """Where a run begins: anew, or where its newest checkpoint ends."""

    prompts: PromptSampler
    checkpointer: Checkpointer
    resumed: Resumed | None
    progress: LoopProgress

    @property
    def iteration(self) -> int:
        """The first that is not done yet."""
        return self.resumed.state.iteration if self.resumed else 0


def _find_start(config: Config, texts: Texts) -> Start:
    with agree():
        prompts = PromptSampler(texts.training, config.run.seed, config.data.balance_by_pass_rate)
    checkpointer, resumed = find_checkpoint(config, "train")
    progress = read_progress(resumed, LoopProgress) or LoopProgress(prompts.state())
    prompts.load_state(progress.prompts)
    return Start(prompts, checkpointer, resumed, progress)


@dataclass(frozen=True)
class Models:
    """The models of a run; without token weights there is no token reward model."""

    source: ModelSource
    policy: Policy
    reference: Reference
    token_rm: TokenRewardModel | None

    def stored(self) -> dict[str, StoredModel]:
        """Returns what is trained, by role; the reference is in `model.path`."""
        models = {"policy": self.source.stored(self.policy.model)}
        if self.token_rm:
            models["token_rm"] = self.source.stored(self.token_rm.model)
        return models


def _build_models(source: ModelSource, resumed: Resumed | None) -> Models:
    config, parts = source.config, (source.dims, source.config, source.topology, source.load)
    with_token_rm = config.oreal.token_weights.kind != "none"
    models = Models(
        source,
        Policy(*parts, config.policy_optimizer),
        Reference(*parts),
        TokenRewardModel(*parts) if with_token_rm else None,
    )
    if resumed:
        resumed.restore(models.stored())
    return models


def _build_loop(
    models: Models,
    start: Start,
    answers: GroupSource,
    engines: Engines | None,
    journal: Journal,
) -> OrealLoop:
    """Builds the loop, and lets engines that lost the policy's weights ask for them."""
    source, done = models.source, start.progress
    config = source.config
    loop = OrealLoop(
        config=config,
        prompts=start.prompts,
        source=answers,
        packer=Packer.for_layout(source.topology, config.engine.tokens_per_micro_batch),
        policy=models.policy,
        reference=models.reference,
        token_rm=models.token_rm,
        weight_sync=source.weight_sync(models.policy, engines.engine) if engines else None,
        rates=Rates(config, done.policy_updates, done.token_rm_updates),
        journal=journal,
        skipped=SkippedSteps(config.engine.max_skipped_steps, done.skipped_in_a_row),
        alarms=RunAlarms(journal, start.iteration, done.alarms_in_a_row),
        engine_checked=done.engine_checked,
    )
    if engines and loop.weight_sync:
        engines.engine.renew_by(renewal(journal, loop.weight_sync))
    return loop
