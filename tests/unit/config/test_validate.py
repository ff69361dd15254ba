from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config
from megatron_oreal.config.stages import layers_of_stages
from megatron_oreal.config.validate import check_layout, check_model

if TYPE_CHECKING:
    from megatron_oreal.config.schema import Config


@dataclass
class Sizes:
    """Of a model that few layouts can cut."""

    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 4
    ffn: int = 60
    layers: int = 3
    vocab: int = 100


def config(*overrides: str) -> Config:
    return load_config([], ["model.path=m", "data.path=d", *overrides])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["sampling.max_new_tokens=64", "sampling.max_total_tokens=64"],
            "sampling.max_new_tokens=64: leaves no room for a prompt; "
            "set it below sampling.max_total_tokens (64)",
        ),
        (
            ["engine.tokens_per_micro_batch=16383"],
            "engine.tokens_per_micro_batch=16383: cannot hold one full sequence; "
            "set sampling.max_total_tokens (16384) or more",
        ),
        (
            ["sampling.samples_per_question=1"],
            "sampling.samples_per_question=1: oreal.shaping=rloo compares the samples of a "
            "question; set 2 or more",
        ),
        (
            ["sampling.temperature=0"],
            "sampling.temperature=0.0: draws the same response each time; set a number above 0",
        ),
        (
            ["oreal.importance.level=token"],
            "sampling.top_p=0.9: oreal.importance.level=token weighs samples of the policy itself; "
            "set 1, or level=none",
        ),
        (
            ["oreal.importance.level=sequence", "sampling.top_p=1", "sampling.temperature=0.6"],
            "sampling.temperature=0.6: oreal.importance.level=sequence weighs samples of the "
            "policy itself; set 1, or level=none",
        ),
        (
            ["schedule.iterations=9"],
            "schedule.freeze_iterations=10: longer than the run; "
            "set schedule.iterations (9) or less",
        ),
        (
            ["evaluation.every=1"],
            "evaluation.path=null: evaluation.every, at_start or at_end ask for held-out "
            "questions; name their file",
        ),
        (
            ["evaluation.samples_per_question=4"],
            "evaluation.pass_at=[1, 8]: pass@k needs k samples; set k to "
            "evaluation.samples_per_question (4) or below",
        ),
        (
            ["verifier.cpu_deadline_s=20"],
            "verifier.wall_deadline_s=10.0: set it to verifier.cpu_deadline_s (20.0) or above",
        ),
    ],
)
def test_sections_that_contradict_each_other(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        config(*overrides)
    assert str(caught.value) == message


def test_layout_that_fills_the_world_is_good() -> None:
    layout = ["parallel.tensor=2", "parallel.pipeline=2", "rollout.tensor_parallel=4"]
    check_layout(config(*layout), world_size=8)


def test_layout_that_does_not_divide_the_world() -> None:
    with pytest.raises(UserError) as caught:
        check_layout(config("parallel.tensor=2"), world_size=3)
    assert str(caught.value) == (
        "Invalid parallel dims: tensor(2) * pipeline(1) * context(1) does not divide "
        "WORLD_SIZE(3): change parallel.* or start a multiple of 2 ranks"
    )


def test_interleaving_needs_a_pipeline() -> None:
    with pytest.raises(UserError, match=r"^parallel\.virtual_pipeline=2: there is no pipeline to"):
        config("parallel.virtual_pipeline=2")


def test_engine_that_does_not_divide_the_world() -> None:
    with pytest.raises(UserError, match=r"^rollout\.tensor_parallel=4: does not divide WORLD_SIZE"):
        check_layout(config("rollout.tensor_parallel=4"), world_size=2)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["parallel.tensor=4"], "parallel.tensor=4: does not divide the model's 6 attention heads"),
        (
            ["rollout.tensor_parallel=4"],
            "rollout.tensor_parallel=4: does not divide the model's 6 attention heads",
        ),
        (
            ["parallel.tensor=3"],
            "parallel.tensor=3: neither divides the model's 2 key-value heads nor is a multiple",
        ),
        (["parallel.tensor=6"], "parallel.tensor=6: does not divide the 40 rows of query, keys"),
        (["parallel.pipeline=2"], "parallel.pipeline=2: does not divide the model's 3 layers"),
        (
            ["parallel.pipeline=3", "parallel.virtual_pipeline=2"],
            "parallel.virtual_pipeline=2: does not divide the 1 layers of a pipeline rank",
        ),
        (
            ["parallel.pipeline=3", "parallel.last_stage_layers=2"],
            "parallel.pipeline=3: stages with parallel.last_stage_layers=2 cannot share out the "
            "model's 3 layers; change one of these",
        ),
        (
            [
                *("parallel.pipeline=2", "parallel.first_stage_layers=1"),
                "parallel.last_stage_layers=1",
            ],
            "parallel.pipeline=2: stages with parallel.first_stage_layers=1 and "
            "parallel.last_stage_layers=1 cannot",
        ),
        (["parallel.first_stage_layers=3"], "parallel.pipeline=1: stages with"),
    ],
)
def test_model_that_the_layout_cannot_cut(overrides: list[str], start: str) -> None:
    with pytest.raises(UserError) as caught:
        check_model(config(*overrides), Sizes())
    assert str(caught.value).startswith(start)


@pytest.mark.parametrize(
    ("first", "last", "stages"),
    [(1, None, (1, 3, 3, 3)), (None, 1, (3, 3, 3, 1)), (2, 2, (2, 3, 3, 2)), (4, 4, (4, 1, 1, 4))],
)
def test_the_ends_of_a_pipeline_may_hold_other_numbers_of_layers(
    first: int | None, last: int | None, stages: tuple[int, ...]
) -> None:
    ends = [f"parallel.first_stage_layers={first or 'null'}"]
    ends.append(f"parallel.last_stage_layers={last or 'null'}")
    layout = config("parallel.pipeline=4", *ends)
    assert layers_of_stages(layout.parallel, 10) == stages
    check_model(layout, Sizes(layers=10))


def test_key_value_heads_may_be_copied() -> None:
    check_model(config("parallel.tensor=6"), Sizes(head_dim=6))
