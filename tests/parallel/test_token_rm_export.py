"""A token_rm leaves as a `ForTokenClassification` that transformers loads and that scores alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForTokenClassification

from megatron_oreal.config.errors import UserError
from megatron_oreal.weights.token_rm import export_token_rm
from tests.ranks import RankPools
from tests.toy_models import (
    make_config,
    make_token_rm,
    make_trajectories,
    open_models,
    pack,
    write_toy,
)

pytestmark = pytest.mark.parallel

KIB = 1 << 10
ATOL = 2e-5


def score_and_export(folder: Path, out: Path) -> list[torch.Tensor]:
    source = open_models(make_config(folder, token_score="at"))
    token_rm = make_token_rm(source)
    scores = token_rm.scores(pack(make_trajectories()))
    export_token_rm(
        token_rm.model.parameters(),
        source.family,
        source.dims,
        source.place,
        out,
        source=folder,
        round_bytes=16 * KIB,
        shard_bytes=64 * KIB,
    )
    return scores


def refused_export(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        score_and_export(folder, folder)
    return str(caught.value)


@pytest.mark.parametrize("toy", ["qwen2_tied", "qwen3", "llama"])
@pytest.mark.parametrize("layout", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)], ids=str)
def test_transformers_scores_as_we_do(
    ranks: RankPools, tmp_path: Path, toy: str, layout: tuple[int, int, int]
) -> None:
    size, tp, pp = layout
    folder = write_toy(tmp_path / "hf", toy)
    ours = ranks(size).run(score_and_export, folder, tmp_path / "rm", tp=tp, pp=pp)[0]
    model, report = AutoModelForTokenClassification.from_pretrained(
        tmp_path / "rm", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(model).__name__.endswith("ForTokenClassification")
    model.train()  # the dropout is 0
    assert model.config.num_labels == 1
    assert torch.equal(model.score.bias.detach(), torch.zeros(1))
    for trajectory, got in zip(make_trajectories(), ours, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([trajectory.tokens])).logits[0, :, 0]
        torch.testing.assert_close(got, want[trajectory.prompt_length :], rtol=0, atol=ATOL)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]


def test_a_refused_export_ends_alike_on_every_rank(ranks: RankPools, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "hf", "qwen2")
    refusals = ranks(2).run(refused_export, folder, tp=2)
    assert refusals == [refusals[0]] * 2
    assert "exists already" in refusals[0]
