"""bf16 parameters under fp32 weights of the optimizer: what is written, sent and loaded agrees.

That each layout's model has what its optimizer wrote, and how far layouts may differ, is checked
with the others in `test_invariance.py`; here is what happens to the weights before and after.

Tried by hand, each fails here: `MegatronModel.load` without `reload_model_params`, and
`StoredModel.read` without filling the shard's `weight` (the first step after a load throws weights
back to what the optimizer was built on, 0.08 away); a stream that copies the parameters when it is
opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from megatron_oreal.algorithm import objectives
from megatron_oreal.engine.roles import Policy
from megatron_oreal.parallel.collectives import barrier, world_rank
from megatron_oreal.types import PackedBatch
from megatron_oreal.weights.checksum import tensor_checksum
from megatron_oreal.weights.geometry import Box
from tests.parallel.invariance.batch import TIGHT, replay
from tests.parallel.invariance.compare import join, shapes_of
from tests.parallel.invariance.inputs import write_inputs
from tests.parallel.invariance.layouts import Layout
from tests.parallel.invariance.run import (
    LEARNING_RATE,
    STEPS,
    Piece,
    config_of,
    degrees_of,
    kept_weights,
)
from tests.ranks import RankPools
from tests.toy_models import make_policy, open_models, pack

pytestmark = pytest.mark.parallel

LAYOUTS = [
    Layout(dp=2, distributed_optimizer=True, bf16=True),
    Layout(tp=2, sequence_parallel=True, distributed_optimizer=True, bf16=True),
    Layout(pp=2, vpp=2, distributed_optimizer=True, bf16=True, tied=True),
]


class Life(NamedTuple):
    """What a rank saw of a policy's weights from import to sync and back.

    `excess` is by how much a weight moved further than two rates and an ulp in the first step after
    weights came into a model that had others before: from Hugging Face, from a checkpoint.
    """

    kept: list[Piece]
    synced: dict[str, torch.Tensor]
    checksums: dict[str, int]
    logprobs: list[torch.Tensor]
    logprobs_of_export: list[torch.Tensor]
    excess_after_import: float
    excess_after_restore: float


def live(folder: Path, out: Path, layout: Layout) -> Life:
    """Import, steps, sync, export, restore and import again; collective over the world."""
    batch = pack(replay(folder / "recorded"), TIGHT)
    source = open_models(config_of(folder / "policy", layout))
    policy = make_policy(source)
    stored = source.stored(policy.model)
    stream = source.stream(policy)  # planned once, before the steps, as a run does
    take_steps(policy, batch, STEPS)
    source.export(policy, out / "exported", replace=False)
    stored.prepare()
    stored.snapshot().write(out / f"rank_{world_rank()}.safetensors", "a checkpoint")
    barrier()
    kept = kept_weights(stored)
    synced, checksums = dict(stream.full_tensors()), stream.checksums()
    exported = make_policy(open_models(config_of(out / "exported", layout)))

    another = open_models(config_of(folder / "reference", layout))
    restored, imported = make_policy(another), make_policy(another)
    another.stored(restored.model).read(sorted(out.glob("rank_*")), STEPS)
    take_steps(imported, batch, 1)  # its optimizer remembers a step on weights that it loses
    imported.model.load(source.load)
    fresh = make_policy(source).model.parameters()
    for now, expected in ((restored, policy.model.parameters()), (imported, fresh)):
        assert all(torch.equal(w, expected[n]) for n, w in now.model.parameters().items())
    return Life(
        kept,
        synced,
        checksums,
        policy.logprobs(batch).logprobs,
        exported.logprobs(batch).logprobs,
        excess_of_a_step(imported, batch),
        excess_of_a_step(restored, batch),
    )


def take_steps(policy: Policy, batch: PackedBatch, count: int) -> None:
    """Steps towards every response alike."""
    tokens = sum(trajectory.response_length for trajectory in batch.trajectories)
    for _ in range(count):
        policy.step(batch, objectives.sft_objective(tokens), LEARNING_RATE)


def excess_of_a_step(policy: Policy, batch: PackedBatch) -> float:
    """How much further than two rates and one bf16 ulp some weight goes; negative if none does."""
    before = {name: value.clone() for name, value in policy.model.parameters().items()}
    take_steps(policy, batch, 1)
    moves = []
    for name, now in policy.model.parameters().items():
        assert now.dtype == torch.bfloat16
        larger = torch.maximum(now.abs(), before[name].abs()).float()
        ulp = torch.exp2(larger.frexp().exponent.float() - 8)  # 8 bits from the leading one on
        way = (now.float() - before[name].float()).abs()
        moves.append(float((way - 2 * LEARNING_RATE - ulp).max()))
    return max(moves)


class Lived(NamedTuple):
    folder: Path
    out: Path
    ranks: list[Life]


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def lived(
    request: pytest.FixtureRequest, ranks: RankPools, tmp_path_factory: pytest.TempPathFactory
) -> Lived:
    layout, out = request.param, tmp_path_factory.mktemp("bf16")
    folder = write_inputs(out / "inputs", tied=layout.tied)
    seen = ranks(layout.ranks).run(live, folder, out, layout, **degrees_of(layout))
    return Lived(folder, out, seen)


def test_sync_and_export_read_what_the_optimizer_wrote(lived: Lived) -> None:
    kept = join(shapes_of(lived.folder, "policy"), [rank.kept for rank in lived.ranks])
    written = {name: values.bfloat16() for name, values in kept.items()}
    exported = load_file(lived.out / "exported" / "model.safetensors")
    sums = {
        name: int(tensor_checksum(value, Box.whole(tuple(value.shape)), tuple(value.shape)))
        for name, value in written.items()
    }
    assert any(not torch.equal(values, kept[name]) for name, values in written.items())
    for got in (exported, *(rank.synced for rank in lived.ranks)):
        assert got.keys() == written.keys()
        assert all(value.dtype == torch.bfloat16 for value in got.values())
        assert all(torch.equal(value, written[name]) for name, value in got.items())
    assert all(rank.checksums == sums for rank in lived.ranks)


def test_what_was_exported_scores_bitwise_alike(lived: Lived) -> None:
    for rank in lived.ranks:
        for ours, theirs in zip(rank.logprobs, rank.logprobs_of_export, strict=True):
            assert torch.equal(ours, theirs)


def test_the_first_step_after_a_load_starts_from_what_was_loaded(lived: Lived) -> None:
    for rank in lived.ranks:
        assert rank.excess_after_import <= 0
        assert rank.excess_after_restore <= 0
