"""`megatron-oreal sft`: supervised fine-tuning of an initial policy on the same engine."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

from megatron_oreal.algorithm.objectives import sft_objective
from megatron_oreal.algorithm.schedule import learning_rate
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config, ScheduleConfig
from megatron_oreal.data.demonstrations import Demonstration, load_demonstrations
from megatron_oreal.data.tokenizer import load_tokenizer, stop_token_id
from megatron_oreal.engine.roles import Policy
from megatron_oreal.models.registry import read_model
from megatron_oreal.parallel.collectives import agree
from megatron_oreal.trainer.journal import Journal
from megatron_oreal.trainer.models import open_source
from megatron_oreal.trainer.packer import Packer
from megatron_oreal.trainer.setup import check_vocabulary
from megatron_oreal.types import Trajectory


def fine_tune(config: Config) -> None:
    """Trains on demonstrations and exports the result; collective over the world.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    settings = config.sft
    with agree():
        demonstrations = _read(config)
    source = open_source(config)
    batches = list(
        epochs(demonstrations, settings.epochs, settings.sequences_per_step, config.run.seed)
    )
    schedule = ScheduleConfig(
        iterations=len(batches),
        warmup_iterations=min(settings.warmup_steps, len(batches)),
        freeze_iterations=0,
    )
    packer = Packer(source.topology.dp_size, config.engine.tokens_per_micro_batch)
    with contextlib.ExitStack() as stack:
        journal = Journal(config, len(batches))
        stack.callback(journal.close)
        with journal.phase("start"):
            policy = Policy(source.dims, config, source.topology, source.load, settings.optimizer)
        for number, trajectories in enumerate(batches):
            rate = learning_rate(number, settings.optimizer.lr, settings.optimizer.min_lr, schedule)
            batch = packer.pack(trajectories)
            tokens = sum(trajectory.response_length for trajectory in trajectories)
            with journal.phase("sft"):
                step = policy.step(batch, sft_objective(tokens), rate)
            journal.add(
                {
                    "sft/loss": step.loss,
                    "sft/grad_norm": step.grad_norm,
                    "sft/learning_rate": rate,
                    "sft/response_tokens": tokens,
                }
            )
            journal.write(number)
        folder = journal.folder.hf / "final"
        source.export(policy, folder)
        journal.summarise({"steps": len(batches), "hf": str(folder)})
        journal.say(f"Hugging Face checkpoint: {folder}")


def epochs(
    demonstrations: Sequence[Demonstration], count: int, per_step: int, seed: int
) -> Iterator[list[Trajectory]]:
    """Yields the steps of `count` seeded shuffles; the last step of an epoch may be smaller."""
    for epoch in range(count):
        order = list(range(len(demonstrations)))
        random.Random(f"sft {seed} {epoch}").shuffle(order)
        for start in range(0, len(order), per_step):
            yield [_trajectory(demonstrations[i], i) for i in order[start : start + per_step]]


def _trajectory(demonstration: Demonstration, index: int) -> Trajectory:
    prompt = demonstration.prompt_tokens
    return Trajectory(
        prompt_id=f"line-{index + 1}",
        tokens=prompt + demonstration.response_tokens,
        prompt_length=len(prompt),
        reward=1.0,
        advantage=1.0,
    )


def _read(config: Config) -> list[Demonstration]:
    if config.sft.path is None:
        raise UserError("sft.path=null: name the JSONL file of demonstrations")
    _, dims = read_model(config.model.path)
    tokenizer = load_tokenizer(config.model.path)
    demonstrations = load_demonstrations(
        config.sft.path,
        tokenizer,
        config.data.system_prompt,
        stop_token_id(tokenizer, config.model.stop_token),
        max_total_tokens=config.sampling.max_total_tokens,
    )
    texts = (demo.prompt_tokens + demo.response_tokens for demo in demonstrations)
    check_vocabulary(tokenizer, dims.vocab, texts)
    return demonstrations
