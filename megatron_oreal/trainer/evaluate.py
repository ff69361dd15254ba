"""`megatron-oreal evaluate`: a Hugging Face checkpoint on suites of questions, without Megatron."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import resolve_config_yaml
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_engines
from megatron_oreal.data.suites import SuiteChoice, choose_suites
from megatron_oreal.monitor.progress import Progress
from megatron_oreal.monitor.run_folder import RunFolder
from megatron_oreal.parallel.collectives import agree, world_rank, world_size
from megatron_oreal.trainer.evaluation import Evaluator
from megatron_oreal.trainer.evaluation_files import FORMAT, EvaluationFolder, EvaluationRecord
from megatron_oreal.trainer.evaluation_tables import category_table, suite_table
from megatron_oreal.trainer.scores import SuiteScore, score
from megatron_oreal.trainer.setup import Texts, read_texts, start_engine
from megatron_oreal.verify.cascade import Verifier


def evaluate(config: Config, *, suites: str | None, output: Path | None, as_json: bool) -> None:
    """Prints avg@n, pass@k and greedy accuracy and keeps every response; collective over the world.

    Args:
        config: Of the evaluation.
        suites: Names, with commas between them; None for `evaluation.path` alone.
        output: Folder of the results; None for `evaluation/` in the run's folder.
        as_json: Prints one JSON object, no tables.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    folder = EvaluationFolder(output or RunFolder.of(config).root / "evaluation")
    with agree():
        choices = _choices(config, suites)
    by_suite = {choice.name: _config_of(config, choice) for choice in choices}
    texts = {name: read_texts(chosen, training=False) for name, chosen in by_suite.items()}
    with agree():
        if world_rank() == 0:
            folder.create(resolve_config_yaml(config))
    scores = _scores(by_suite, texts, folder)
    if world_rank() == 0:
        record = _record(config, scores)
        folder.write_results(record)
        _print(record, folder, as_json=as_json)


def _choices(config: Config, suites: str | None) -> list[SuiteChoice]:
    if config.rollout.backend == "vllm_server":
        # Nobody knows whose weights a server holds: a run may have been there before.
        raise UserError("rollout.backend=vllm_server: evaluate loads model.path; set vllm")
    check_engines(config, world_size())
    settings = config.evaluation
    if suites is not None:
        return choose_suites(suites, settings.suites_folder, settings.samples_per_question)
    if settings.path is None:
        raise UserError(
            "evaluation.path=null: name the JSONL file of held-out questions, or suites by --suite"
        )
    return [SuiteChoice(Path(settings.path).stem, settings.path, settings.samples_per_question)]


def _config_of(config: Config, choice: SuiteChoice) -> Config:
    """Returns the config of one suite; of pass@k those stay that its n responses allow, 1 and n."""
    pass_at = {1, choice.samples, *(k for k in config.evaluation.pass_at if k <= choice.samples)}
    settings = replace(
        config.evaluation,
        path=choice.path,
        samples_per_question=choice.samples,
        pass_at=tuple(sorted(pass_at)),
    )
    return replace(config, evaluation=settings)


def _scores(
    by_suite: dict[str, Config], texts: dict[str, Texts], folder: EvaluationFolder
) -> dict[str, SuiteScore]:
    """Evaluates suite after suite with one engine; collective over the world."""
    first = world_rank() == 0
    config = next(iter(by_suite.values()))
    scores = {}
    with (
        Verifier(config.verifier, config.judge) as verifier,
        contextlib.closing(start_engine(config, next(iter(texts.values())))) as engine,
    ):
        progress = Progress(first, Console(stderr=True))
        for name, chosen in by_suite.items():
            evaluator = Evaluator(chosen, texts[name].held_out, engine, verifier)
            with progress.task(name, evaluator.responses, "responses") as advance:
                evaluation = evaluator.evaluate(advance)
            if first:
                scores[name] = score(evaluation, config.run.seed)
                folder.write_generations(name, evaluation)
    return scores


def _record(config: Config, scores: dict[str, SuiteScore]) -> EvaluationRecord:
    settings = {
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "max_new_tokens": config.sampling.max_new_tokens,
        "seed": config.run.seed,
    }
    return EvaluationRecord(FORMAT, config.model.path, settings, scores)


def _print(record: EvaluationRecord, folder: EvaluationFolder, *, as_json: bool) -> None:
    console = Console()
    if as_json:
        text = msgspec.json.encode(record).decode()
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        return
    console.print(suite_table(record))
    if any(len(suite.categories) > 1 for suite in record.suites.values()):
        console.print(category_table(record))
    console.print(f"every response and a table in markdown: {folder.root}", highlight=False)
