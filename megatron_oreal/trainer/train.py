"""`megatron-oreal train`: iterations, evaluations between them, and what is left at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_oreal.config.schema import Config
from megatron_oreal.parallel.collectives import world_size
from megatron_oreal.trainer.evaluation import EvaluationResult
from megatron_oreal.trainer.probe import probe_engine
from megatron_oreal.trainer.resume import stop_on_signal
from megatron_oreal.trainer.setup import TrainingRun, training_run


def train(config: Config) -> bool:
    """Trains to the last iteration, from the newest checkpoint if there is one.

    Collective over the world. Returns false where a signal stopped it before, after a checkpoint.

    Raises:
        UserError: Bad input, on every rank alike.
    """
    asked = stop_on_signal(config.checkpoint.stop_within_s)
    with asked as stop, training_run(config) as run, run.saver:
        stop.watched(run.journal.watchdog)
        settings, iterations = config.evaluation, config.schedule.iterations
        run.journal.say(f"{world_size()} ranks, {iterations} iterations, {config.run.folder}")
        _hand_over(run)
        before = _start(run)
        if stop.agreed():  # while it started: there is nothing to save
            run.journal.say("stopped by a signal before the first iteration; start it again")
            return False
        for iteration in range(run.first_iteration, iterations):
            with run.journal.profiled(iteration):
                run.loop.iterate(iteration)
            done = iteration + 1
            if settings.every and done % settings.every == 0 and done < iterations:
                _evaluate(run, done)
            run.exporter.write_if_due(done, iterations)
            stopped = stop.agreed()
            run.saver.advance()
            if stopped or run.saver.is_due(done, iterations):
                run.save(done, before)
            if stopped:
                run.saver.settle()
                run.journal.say(f"stopped by a signal after {done} iterations; start it again")
                return False
        after = _evaluate(run, iterations) if settings.at_end else None
        exported = run.exporter.write("final") if config.export.at_end else None
        run.saver.settle()
        run.loop.source.forget(iterations)
        _report(run, before, after, exported)
    return True


def _hand_over(run: TrainingRun) -> None:
    """Brings the policy's weights into the engines and sees that these hold the same model."""
    loop, journal = run.loop, run.journal
    if loop.weight_sync is None or run.engine is None:
        return
    loop.push_weights()
    with journal.phase("check"):
        mean = probe_engine(loop.policy, run.engine, run.probe, loop.packer, run.config)
    loop.wake_engines()
    journal.say(f"weights reach the engines {loop.weight_sync.description}")
    journal.say(f"policy and engines differ by {mean:.1e} a token on question {run.probe.id}")


def _start(run: TrainingRun) -> EvaluationResult | None:
    """Returns the evaluation before the first iteration, from then where the run is resumed.

    The checkpoint around it holds no tensors: a run killed before its next one starts anew.
    """
    if run.first_iteration:
        return run.before
    save = run.config.checkpoint.every > 0
    if save and not run.before:
        run.save(0, None)
    if run.before or not run.config.evaluation.at_start:
        return run.before
    before = _evaluate(run, 0)
    if save:
        run.save(0, before)
    return before


def _evaluate(run: TrainingRun, iteration: int) -> EvaluationResult:
    """Evaluates the engines' weights after `iteration` iterations."""
    assert run.evaluator is not None, "validation asks for evaluation.path"
    with run.journal.phase("evaluate", run.evaluator.responses, "responses") as advance:
        result = run.evaluator.evaluate(advance).result
    run.journal.add(result.metrics())
    run.journal.write(iteration, kind="eval")
    return result


def _report(
    run: TrainingRun,
    before: EvaluationResult | None,
    after: EvaluationResult | None,
    exported: Path | None,
) -> None:
    results = {"before": before, "after": after}
    known = {when: result for when, result in results.items() if result is not None}
    ks = run.config.evaluation.pass_at
    summary: dict[str, Any] = {
        f"pass_at_{k}": {when: result.pass_at[k] for when, result in known.items()} for k in ks
    }
    summary["greedy"] = {when: result.greedy for when, result in known.items()}
    summary["hf"] = str(exported) if exported else None
    run.journal.summarise(summary)
    if known:
        run.journal.show(_table(known, ks))
    if exported:
        run.journal.say(f"Hugging Face checkpoint: {exported}")


def _table(results: dict[str, EvaluationResult], ks: tuple[int, ...]) -> Table:
    """Draws the rates of each evaluation in percent, and the gain where there are two."""
    first = next(iter(results.values()))
    title = f"{first.questions} held-out questions x {first.samples_per_question} samples"
    table = Table(title=title)
    for column in ("percent", *results, *(["gain"] if len(results) > 1 else [])):
        table.add_column(column, justify="right")
    rows = {f"pass@{k}": [result.pass_at[k] for result in results.values()] for k in ks}
    if first.greedy is not None:
        rows["greedy"] = [result.greedy or 0.0 for result in results.values()]
    for name, values in rows.items():
        cells = [f"{100 * value:.1f}" for value in values]
        gain = [f"{100 * (values[-1] - values[0]):+.1f}"] if len(values) > 1 else []
        table.add_row(name, *cells, *gain)
    return table
