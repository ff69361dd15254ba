"""The token reward model as a Hugging Face checkpoint: the family's `ForTokenClassification`.

Its only label is the score. `transformers` gives the head a bias and drops a tenth of what it reads
while it trains; ours does neither: the bias is written as zero and the dropout set to 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron_oreal.models.hf_config import read_config_json
from megatron_oreal.weights.bridge import export_hf, open_stream

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from megatron_oreal.models.family import Family, ModelDims
    from megatron_oreal.weights.layout import MegatronPlace


def export_token_rm(
    params: Mapping[str, torch.Tensor],
    family: Family,
    dims: ModelDims,
    place: MegatronPlace,
    folder: str | Path,
    *,
    source: str | Path,
    round_bytes: int,
    shard_bytes: int,
) -> None:
    """Writes a token_rm as a Hugging Face folder on rank 0; collective over the world.

    Args:
        params: This rank's parameters, the scalar head among those of the last stage.
        family: The family of the model that it started from.
        dims: That model's dimensions.
        place: This rank's coordinates.
        folder: The folder to make; it must not exist.
        source: The folder whose tokenizer and `config.json` go along.
        round_bytes: Bound on what travels at a time.
        shard_bytes: Bound on the size of a shard, one of which is held in memory.

    Raises:
        UserError: On every rank: the folder exists, the source is no model, the disk refuses.
    """
    family, dims = family.token_classifier(dims)
    stream = open_stream(params, family, dims, place, round_bytes=round_bytes, receivers=(0,))
    dtype = next(iter(params.values())).dtype
    export_hf(
        stream,
        folder,
        source=source,
        shard_bytes=shard_bytes,
        constants={"score.bias": torch.zeros(1, dtype=dtype)},
        config_changes=_config_changes(source),
    )


def _config_changes(source: str | Path) -> dict[str, Any]:
    architectures = read_config_json(source).get("architectures") or [""]
    base = str(architectures[0]).partition("For")[0]
    return {
        "architectures": [f"{base}ForTokenClassification"],
        "id2label": {"0": "score"},  # one label: transformers counts these
        "label2id": {"score": 0},
        "classifier_dropout": 0.0,
        "tie_word_embeddings": False,
    }
