"""How far a layout's numbers are from those of one rank, and how far they may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import torch

from megatron_oreal.algorithm import objectives
from megatron_oreal.engine.roles import PolicyStep, TokenRewardStep
from megatron_oreal.models.registry import read_model
from tests.parallel.invariance.batch import drawn_weights, replay, sum_of_terms
from tests.parallel.invariance.layouts import Layout
from tests.parallel.invariance.run import LEARNING_RATE, STEPS, Piece, Seen, Trained

MODELS = ("policy", "token_rm")
FP32_BOUNDS = {
    "logprobs": 1e-5,
    "loss": 1e-6,
    "gradient norm": 1e-5,
    "gradients": 1e-4,
    "weights": 0.02,
    "movement": 0.01,
}
"""The largest difference allowed of each quantity:

- logprobs: of any token in any step, absolute; entropies and token scores likewise;
- loss: of any step, relative to the sum of the absolute terms it is made of;
- gradient norm: of any step, relative;
- gradients: of any tensor, the norm of the difference relative to the norm of the tensor;
- weights: of any weight after the last step, relative to learning rate x steps;
- movement: of all weights, the norm of the difference relative to that of their way.
"""
BF16_BOUNDS = {
    "logprobs": 0.1,
    "loss": 0.005,
    "gradient norm": 0.02,
    "gradients": 0.15,
    "weights": 2.0,
    "movement": 0.2,
}
"""The same with bf16 parameters: a rounding is 2^-9, 0.002, and a pass has dozens one upon another.

Where a gradient is no larger than its own rounding AdamW may go the other way: single weights may
end up on opposite ends.
"""
LEAST_MOVE = 0.5
"""What some weight must have moved by, relative to learning rate x steps."""

Shapes = Mapping[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]
Differences = dict[str, float]


def bounds_of(layout: Layout) -> Differences:
    """The bounds of the layout's precision."""
    return BF16_BOUNDS if layout.bf16 else FP32_BOUNDS


def compare(folder: Path, ranks: Sequence[Seen], plain: Seen) -> dict[str, Differences]:
    """Returns by model the largest differences to the plain run, and `moved`: see `LEAST_MOVE`.

    Raises:
        AssertionError: Ranks hold different numbers for the same thing, a model has other weights
            than its optimizer wrote, or it started from others than the plain one.
    """
    found = {}
    for model in MODELS:
        trained: list[Trained] = [getattr(rank, model) for rank in ranks]
        expected: Trained = getattr(plain, model)
        shapes = shapes_of(folder, model)
        steps = [pair for rank in trained for pair in zip(rank.steps, expected.steps, strict=True)]
        scales = _loss_scales(folder, plain, model) * len(trained)
        found[model] = {
            "logprobs": max(_farthest(_values(a), _values(b)) for a, b in steps),
            "loss": max(abs(a.loss - b.loss) / s for (a, b), s in zip(steps, scales, strict=True)),
            "gradient norm": max(abs(a.grad_norm / b.grad_norm - 1) for a, b in steps),
            "gradients": _worst_norm(
                join(shapes, (rank.gradients for rank in trained)),
                join(shapes, [expected.gradients]),
            ),
            **_compare_weights(shapes, trained, expected),
        }
    anchors = max(_farthest(rank.reference, plain.reference) for rank in ranks)
    found["policy"]["logprobs"] = max(found["policy"]["logprobs"], anchors)
    return found


def join(shapes: Shapes, ranks: Iterable[Sequence[Piece]]) -> Tensors:
    """Puts whole fp32 tensors together; what several ranks hold must be the same on each.

    Raises:
        AssertionError: Ranks differ, or some element is a number on none.
    """
    whole = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
    for piece in chain.from_iterable(ranks):
        held, values = whole[piece.tensor][piece.box.slices], piece.values.float()
        known = ~held.isnan()
        assert torch.equal(held[known], values[known]), f"{piece.tensor}: ranks differ"
        held.copy_(values)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), f"{name}: no rank holds all of it"
    return whole


def _compare_weights(shapes: Shapes, trained: Sequence[Trained], expected: Trained) -> Differences:
    start = join(shapes, (rank.start for rank in trained))
    kept = join(shapes, (rank.kept for rank in trained))
    weights = join(shapes, (rank.weights for rank in trained))
    dtype = trained[0].weights[0].values.dtype
    for name, values in kept.items():
        written = torch.equal(weights[name], values.to(dtype).float())
        assert written, f"{name}: the model has not what its optimizer wrote"
    for name, values in join(shapes, [expected.start]).items():
        assert torch.equal(start[name], values), f"{name}: it starts from other weights"
    got, begun, want = (
        torch.cat([tensors[name].flatten() for name in shapes])
        for tensors in (kept, start, join(shapes, [expected.kept]))
    )
    furthest = LEARNING_RATE * STEPS
    return {
        "weights": float((got - want).abs().max()) / furthest,
        "movement": float((got - want).norm() / (want - begun).norm()),
        "moved": float((got - begun).abs().max()) / furthest,
    }


def shapes_of(folder: Path, model: str) -> Shapes:
    """The Hugging Face tensors of the policy or of the token_rm."""
    family, dims = read_model(folder / "policy")
    if model == "token_rm":
        family, dims = family.token_classifier(dims)
    return family.tensors(dims)


def _values(step: PolicyStep | TokenRewardStep) -> list[torch.Tensor]:
    return step.scores if isinstance(step, TokenRewardStep) else [*step.logprobs, *step.entropy]


def _loss_scales(folder: Path, plain: Seen, model: str) -> list[float]:
    """The sum of the absolute terms of the plain run's loss, step by step."""
    if model == "token_rm":  # no term of Eq. 12 is negative
        return [step.loss for step in plain.token_rm.steps]
    trajectories = replay(folder / "recorded")
    fields = objectives.policy_fields(trajectories, drawn_weights(trajectories), plain.reference)
    steps = [step for step in plain.policy.steps if isinstance(step, PolicyStep)]
    return [sum_of_terms(trajectories, fields, step.logprobs) for step in steps]


def _farthest(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> float:
    return float((torch.cat(list(got)) - torch.cat(list(want))).abs().max())


def _worst_norm(got: Tensors, want: Tensors) -> float:
    """Beyond every bound where a tensor should be zero and is not."""
    least = 1e-30
    return max(
        float((got[name] - want[name]).norm() / (want[name].norm() + least)) for name in want
    )
