r"""Measures the share of correct samples of a model on every question: `pass_rate`, for balancing.

    torchrun --nproc-per-node 8 tools/estimate_pass_rates.py --config configs/oreal_7b.yaml \
      model.path=my-sft data.path=prompts.parquet run.folder=runs/rates --output with_rates.jsonl

`sampling.samples_per_question` responses each, by the run's own engines and verifier. Started again
it goes on where it stopped (status 75 after SIGTERM); its answers stay in run.folder/survey.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_oreal.algorithm.shaping import drop_unverified, shape_rewards
from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.schema import Config
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write
from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.trainer.survey import Survey, survey_of

STOPPED = 75


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 and one line where a user can mend it; 75 where a signal stopped it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--config", type=Path, action="append", default=[], metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.settings)
        with survey_of(config) as survey:
            if not survey.take():
                return STOPPED
            if world_rank() == 0:
                counts = _write(options.output, survey, config)
                shown = json.dumps(counts) if options.json else _words(counts, options.output)
                print(shown)
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"estimate_pass_rates: {error}", file=sys.stderr)
        return 2
    return 0


def _write(output: Path, survey: Survey, config: Config) -> dict[str, int]:
    counts = {"questions": 0, "without_pass_rate": 0, "never_solved": 0, "always_solved": 0}

    def lines() -> Iterator[bytes]:
        for line in _lines(survey, config):
            counts["questions"] += 1
            counts["without_pass_rate"] += "pass_rate" not in line
            counts["never_solved"] += line.get("pass_rate") == 0
            counts["always_solved"] += line.get("pass_rate") == 1
            yield f"{to_json(line)}\n".encode()

    atomic_write(output, lines())
    return counts


def _lines(survey: Survey, config: Config) -> Iterator[dict[str, Any]]:
    """Yields the questions; one that the verifier could mostly not decide gets no pass rate."""
    verifier = config.verifier
    for group in survey.groups():
        prompt = group.prompt
        line: dict[str, Any] = {
            "id": prompt.id,
            "question": prompt.question,
            "gold_answer": prompt.gold_answer,
        }
        fields = {"data_source": prompt.data_source, "category": prompt.category}
        line |= {name: value for name, value in fields.items() if value}
        decided, _ = drop_unverified(
            [group], verifier.max_unverified_share, verifier.unverified_is_incorrect
        )
        for shaped in shape_rewards(decided, config.oreal):
            if shaped.pass_rate is not None:
                line["pass_rate"] = shaped.pass_rate
        yield {**line, "pass_rate_samples": len(group.rollouts)}


def _words(counts: dict[str, int], output: Path) -> str:
    return (
        f"{counts['questions']} questions in {output}: {counts['never_solved']} never solved,"
        f" {counts['always_solved']} always, {counts['without_pass_rate']} that could not be judged"
    )


if __name__ == "__main__":
    sys.exit(main())
