r"""Makes demonstrations out of a model's own correct responses: what `megatron-oreal sft` learns.

    torchrun --nproc-per-node 8 tools/rejection_sample.py --config configs/oreal_7b.yaml \
      model.path=a-teacher data.path=clean.jsonl run.folder=runs/teacher --output d.jsonl

`sampling.samples_per_question` responses a question are sampled and judged; correct ones are kept,
repeated ones dropped, of each question up to --per-question from short to long, and lengths that
there are too many of are thinned out. Started again it goes on where it stopped (status 75 after
SIGTERM); its answers stay in run.folder/survey, so that other choices cost no new ones.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.data.rejection import Chosen, balance_lengths, choose
from megatron_oreal.monitor.metrics import to_json
from megatron_oreal.monitor.run_folder import atomic_write
from megatron_oreal.parallel.collectives import world_rank
from megatron_oreal.trainer.survey import Survey, survey_of
from megatron_oreal.types import Outcome

STOPPED = 75


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 2 and one line where a user can mend it; 75 where a signal stopped it."""
    options = _parser().parse_args(arguments)
    try:
        config = load_config(options.config, options.settings)
        with survey_of(config) as survey:
            if not survey.take():
                return STOPPED
            if world_rank() == 0:
                found, counts = _choose(survey, options.per_question)
                kept = balance_lengths(found, options.length_share, config.run.seed)
                counts |= {"chosen": len(found), "written": len(kept)}
                _write(options.output, kept, counts)
                print(json.dumps(counts) if options.json else _words(counts, options.output))
    except (UserError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"rejection_sample: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value")
    add("--config", type=Path, action="append", default=[], metavar="FILE")
    add("--output", type=Path, required=True, metavar="FILE")
    add("--per-question", type=int, default=4, metavar="N", help="responses at most (4)")
    add(
        "--length-share",
        type=float,
        default=2.0,
        metavar="X",
        help="most responses of one power of two of tokens, times the median of them (2)",
    )
    add("--json", action="store_true", help="print one JSON object")
    return parser


def _choose(survey: Survey, per_question: int) -> tuple[list[Chosen], dict[str, int]]:
    if per_question < 1:
        raise UserError(f"--per-question={per_question}: set 1 or more")
    found: list[Chosen] = []
    counts = {"questions": 0, "solved": 0, "responses": 0, "correct": 0}
    for group in survey.groups():
        chosen = choose(group, per_question)
        found += chosen
        counts["questions"] += 1
        counts["solved"] += bool(chosen)
        counts["responses"] += len(group.rollouts)
        counts["correct"] += sum(v.outcome is Outcome.CORRECT for v in group.verdicts)
    return found, counts


def _write(output: Path, kept: list[Chosen], counts: dict[str, int]) -> None:
    if not kept:
        raise UserError(
            f"--output={output}: none of {counts['responses']} responses is correct; ask easier"
            " questions or a better model"
        )
    lines = (
        {"id": one.id, "question": one.question, "response": one.response, "tokens": one.tokens}
        for one in kept
    )
    atomic_write(output, (f"{to_json(line)}\n".encode() for line in lines))


def _words(counts: dict[str, int], output: Path) -> str:
    return (
        f"{counts['written']} demonstrations in {output}: {counts['correct']} of"
        f" {counts['responses']} responses are correct, {counts['chosen']} were chosen, of"
        f" {counts['solved']} of {counts['questions']} questions"
    )


if __name__ == "__main__":
    sys.exit(main())
