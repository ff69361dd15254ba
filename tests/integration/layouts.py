"""Two whole iterations on four ranks under each parallel layout; run by `make layouts`.

Each layout starts from the same fine-tuned toy. The digest is one of the checksums of all tensors
that the policy's ranks hold, which a push compares with those of what each rank's engine was
handed. At the start it must be the same in every layout: it is that of one checkpoint.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from tests.integration import toy
from tests.integration.commands import under_torchrun

RANKS = 4
PROGRAM = ("-m", "tests.integration.layout_program")


@dataclass(frozen=True)
class Layout:
    """Data parallelism fills what the training side leaves of the four ranks.

    `late` also overlaps communication with the passes and has all wait in host memory that may.
    """

    tensor: int
    pipeline: int
    engine_tensor: int
    questions: int
    context: int = 1
    late: bool = False

    @property
    def name(self) -> str:
        data = RANKS // (self.tensor * self.pipeline * self.context)
        sides = {"tp": self.tensor, "pp": self.pipeline, "cp": self.context, "dp": data}
        train = " ".join(f"{side}{size}" for side, size in sides.items() if size > 1)
        late = ", late" if self.late else ""
        return f"{train}{late}, engine tp{self.engine_tensor}"

    @property
    def engines(self) -> int:
        return RANKS // self.engine_tensor


LAYOUTS = (
    Layout(tensor=2, pipeline=1, engine_tensor=2, questions=8, late=True),
    Layout(tensor=1, pipeline=2, engine_tensor=1, questions=3),  # fewer than engines
    Layout(tensor=2, pipeline=2, engine_tensor=4, questions=8),
    Layout(tensor=2, pipeline=1, engine_tensor=2, questions=8, context=2),
)


def run_layout(root: Path, model: Path, layout: Layout) -> dict[str, Any]:
    """What rank 0 found; `root` holds the toy's data."""
    run = layout.name.replace(", ", "_").replace(" ", "_")
    settings = toy.settings(
        root,
        run,
        model,
        parallel__tensor=layout.tensor,
        parallel__pipeline=layout.pipeline,
        parallel__context=layout.context,
        parallel__overlap_grad_reduce=layout.late,
        parallel__overlap_param_gather=layout.late,
        offload__optimizer=layout.late,
        offload__gradients=layout.late,
        offload__reference=layout.late,
        offload__token_rm=layout.late,
        rollout__tensor_parallel=layout.engine_tensor,
        data__questions_per_iteration=layout.questions,
        schedule__iterations=2,
        schedule__freeze_iterations=0,
        evaluation__max_questions=min(layout.questions, layout.engines),
        monitor__wandb="disabled",
    )
    out = root / f"{run}.json"
    finished = under_torchrun(RANKS, out, *settings, program=PROGRAM)
    if finished.status != 0:
        raise RuntimeError(f"{layout.name}: {finished.stderr}")
    return json.loads(out.read_text())


def problems(found: dict[str, Any], start: str) -> list[str]:
    """What is wrong with a layout; `start` is the digest that its first push should have had."""
    iterations = found["iterations"]
    return [
        problem
        for problem, is_so in {
            f"starts from {found['start']}, not {start}": found["start"] != start,
            "ends with the weights it began with": found["end"] == found["start"],
            "did not train in both iterations": len(iterations) != 2
            or not all(i["oreal/trajectories"] >= 2 for i in iterations),
            "policy differs from the reference before its first step": (
                iterations[0]["oreal/reference_difference_max"] != 0
            ),
            "policy did not move": iterations[-1]["oreal/reference_difference_max"] == 0,
            "engine and policy disagree": any(
                not i["rollout/mismatch_mean"] < 2e-5 or not i["rollout/mismatch_max"] < 1e-3
                for i in iterations
            ),
        }.items()
        if is_so
    ]


def show(console: Console, results: dict[Layout, dict[str, Any]]) -> None:
    table = Table(title=f"two iterations on {RANKS} ranks")
    for column in ("training", "engines", "questions", "start", "end"):
        table.add_column(column)
    for column in ("trained on", "mismatch", "largest", "seconds"):
        table.add_column(column, justify="right")
    for layout, found in results.items():
        iterations = found["iterations"]
        train, _, _ = layout.name.partition(", engine")
        table.add_row(
            train,
            f"{layout.engines} x tp{layout.engine_tensor}",
            str(layout.questions),
            found["start"],
            found["end"],
            " + ".join(f"{i['oreal/trajectories']:.0f}" for i in iterations),
            f"{max(i['rollout/mismatch_mean'] for i in iterations):.1e}",
            f"{max(i['rollout/mismatch_max'] for i in iterations):.1e}",
            f"{found['seconds']:.0f}",
        )
    console.print(table)


def main() -> int:
    console = Console(width=120)
    disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
        root = Path(folder)
        toy.make(root)
        model = toy.fine_tune(root)
        results = {
            layout: run_layout(root, model, layout)
            for layout in track(LAYOUTS, "layouts", console=console, transient=True)
        }
    show(console, results)
    start = results[LAYOUTS[0]]["start"]
    wrong = [
        f"{layout.name}: {problem}"
        for layout, found in results.items()
        for problem in problems(found, start)
    ]
    for line in wrong:
        console.print(line, style="red", highlight=False)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
