"""`megatron-oreal evaluate`: a Hugging Face checkpoint on a file of questions, without Megatron."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_engines
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.progress import Progress
from megatron_oreal.parallel.collectives import world_rank, world_size
from megatron_oreal.trainer.evaluation import EvaluationResult, Evaluator
from megatron_oreal.trainer.setup import read_texts, start_engine
from megatron_oreal.verify.cascade import Verifier


def evaluate(config: Config, *, as_json: bool) -> None:
    """Prints pass@1, pass@k and greedy accuracy; collective over the world.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    if config.evaluation.path is None:
        raise UserError("evaluation.path=null: name the JSONL file of held-out questions")
    if config.rollout.backend == "vllm_server":
        # Nobody knows whose weights a server holds: a run may have been there before.
        raise UserError("rollout.backend=vllm_server: evaluate loads model.path; set vllm")
    check_engines(config, world_size())
    texts = read_texts(config, training=False)
    engine = start_engine(config, texts)
    first = world_rank() == 0
    with Verifier(config.verifier, config.judge) as verifier:
        evaluator = Evaluator(config, texts.held_out, engine, verifier)
        progress = Progress(first, Console(stderr=True))
        with progress.task("evaluate", evaluator.responses, "responses") as advance:
            result, _ = evaluator.evaluate(advance)
    if first:
        _print(config, result, as_json=as_json)
    engine.close()


def _print(config: Config, result: EvaluationResult, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        record = {"model": config.model.path, **dataclasses.asdict(result)}
        console.print(to_json(record), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title=config.model.path)
    table.add_column("measure")
    table.add_column("value", justify="right")
    for k, value in result.pass_at.items():
        table.add_row(f"pass@{k}, percent", f"{100 * value:.1f}")
    if result.greedy is not None:
        table.add_row("greedy, percent", f"{100 * result.greedy:.1f}")
    table.add_row("questions", str(result.questions))
    table.add_row("samples per question", str(result.samples_per_question))
    table.add_row("truncated, percent", f"{100 * result.truncated_share:.1f}")
    table.add_row("unverified, percent", f"{100 * result.unverified_share:.1f}")
    table.add_row("response length, tokens", f"{result.response_length_mean:.1f}")
    table.add_row("tokens per second", f"{result.tokens_per_s:.0f}")
    console.print(table)
