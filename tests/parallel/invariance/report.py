"""What was measured, as a table for a terminal and as a document."""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import megatron.core
from rich.table import Table

from tests.machine import processor
from tests.parallel.invariance.compare import (
    BF16_BOUNDS,
    FP32_BOUNDS,
    LEAST_MOVE,
    MODELS,
    Differences,
    bounds_of,
)
from tests.parallel.invariance.layouts import Layout, full_product

Measured = dict[str, Any]
"""`machine` with its load, `versions`, `seconds`, and one of `rows` a layout: its choices and its
differences."""

HEAD = """# What a layout changes

Nothing but rounding. `make invariance` sends one recorded batch through a toy policy and a toy
token reward model (Qwen2, 4 layers, 4 heads, 2 key-value heads) under every layout of up to four
ranks, and compares with one rank and one micro-batch: a reference's log-probabilities, three steps
down Eq. 11 and Eq. 12, the first step's gradients as whole Hugging Face tensors, the weights after
AdamW's three steps at a rate of 1e-3. Layouts are all that can be made of tensor (tp), pipeline
(pp), virtual pipeline (vpp), context (cp) and data (dp) parallelism, sequence parallelism (sp), one
or several micro-batches, recomputation of layers and the distributed optimizer; each shape once
more with tied embeddings, recomputed MLPs and micro-batches filled up, and once in bf16. A row is
the largest difference of policy and token reward model over all `n` layouts of that shape. A
covering set, in which each two choices meet, runs in `make test`.

| quantity | difference | at most, fp32 | at most, bf16 |
| --- | --- | --- | --- |
"""
MEANINGS = {
    "logprobs": "of any token in any step; entropies and token scores likewise",
    "loss": "of any step, relative to the sum of the absolute terms it is made of",
    "gradient norm": "of any step, relative",
    "gradients": "of any tensor, the norm of the difference relative to the norm",
    "weights": "of any weight after the last step, relative to rate x steps",
    "movement": "of all weights, the norm of the difference relative to that of their way",
}
BF16 = """
Some weight must have moved by {move} of rate x steps at least. bf16 has bf16 parameters, fp32
weights in the distributed optimizer and fp32 gradient reduction, and is compared with bf16 on one
rank; the model's weights are checked to be what the optimizer wrote, rounded, in every layout.
"""


CUT_OFF = """The run was cut off. What is missing are further combinations of micro-batches,
recomputation and optimizer: a shape has nine layouts in fp32, one of them tied, and one in bf16.

"""


def measured(rows: Iterable[tuple[Layout, dict[str, Differences]]], seconds: float) -> Measured:
    """Adds what it was measured on."""
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, load {os.getloadavg()[2]:.0f}",
        "versions": {
            # Megatron adds the commit of whatever repository it lies in.
            "megatron-core": megatron.core.__version__.partition("+")[0],
            "torch": version("torch"),
            "python": platform.python_version(),
        },
        "seconds": round(seconds),
        "rows": [{"layout": asdict(layout), "found": found} for layout, found in rows],
    }


def failures(found: Measured) -> list[str]:
    """One line for each number beyond its bound."""
    lines = []
    for layout, model, differences in _each(found):
        bounds = bounds_of(layout)
        lines += [
            f"{layout}: {model}, {name} {value:.1e}, at most {bounds[name]:.0e} allowed"
            for name, value in differences.items()
            if name in bounds and not value <= bounds[name]
        ]
        if not differences["moved"] >= LEAST_MOVE:
            lines.append(f"{layout}: {model} moved by {differences['moved']:.2f} of rate x steps")
    return lines


def table(found: Measured) -> Table:
    """The largest differences of each shape, for a terminal."""
    shown = Table(title=_title(found))
    for number, name in enumerate(_columns()):
        shown.add_column(name, justify="right" if number else "left")
    for cells in _cells(found):
        shown.add_row(*cells)
    return shown


def document(all_found: Sequence[Measured]) -> str:
    """The same of several versions, in Markdown."""
    lines = [
        f"| {name} | {MEANINGS[name]} | {bound:.0e} | {BF16_BOUNDS[name]} |"
        for name, bound in FP32_BOUNDS.items()
    ]
    text = HEAD + "\n".join(lines) + "\n" + BF16.format(move=LEAST_MOVE)
    for found in all_found:
        columns = _columns()
        rows = [columns, ["---"] * len(columns), *_cells(found)]
        text += f"\n## {_title(found)}\n\n"
        if len(found["rows"]) < len(full_product()):
            text += CUT_OFF
        text += "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    return text


def _columns() -> list[str]:
    return ["layout", "n", *FP32_BOUNDS]


def _cells(found: Measured) -> list[list[str]]:
    """One row a shape and precision: how many layouts, the largest of each quantity."""
    worst: defaultdict[str, Differences] = defaultdict(lambda: dict.fromkeys(FP32_BOUNDS, 0.0))
    count: defaultdict[str, int] = defaultdict(int)
    for layout, _, differences in _each(found):
        row = layout.shape + ", bf16" * layout.bf16
        count[row] += 1
        for name in FP32_BOUNDS:
            worst[row][name] = max(worst[row][name], differences[name])
    fp32_first = sorted(worst, key=lambda row: row.endswith("bf16"))
    return [
        [row, str(count[row] // len(MODELS)), *(f"{value:.1e}" for value in worst[row].values())]
        for row in fp32_first
    ]


def _each(found: Measured) -> Iterable[tuple[Layout, str, Differences]]:
    for row in found["rows"]:
        for model, differences in row["found"].items():
            yield Layout(**row["layout"]), model, differences


def _title(found: Measured) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    count = f"{len(found['rows'])} of {len(full_product())} layouts"
    return f"{versions}: {count}, {found['seconds']} s, {found['machine']}"
