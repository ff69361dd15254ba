"""A real pretrained model: Megatron's logits against transformers' on real text, and round trips.

SmolLM2-135M-Instruct has 30 layers, 9 heads, 3 key-value heads and tied embeddings.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oreal.engine.megatron_model import HeadResult
from megatron_oreal.engine.micro_batch import MicroBatch, ScorePosition
from megatron_oreal.models.build import PackedGPT
from megatron_oreal.types import Trajectory
from tests.ranks import RankPool
from tests.toy_models import make_config, make_policy, open_models, pack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parents[2]
ATOL = 1e-3  # of a logit, fp32 after thirty layers
TEXTS = (
    "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is "
    "named after the engineer Gustave Eiffel, whose company built it from 1887 to 1889.",
    "<|im_start|>user\nNatalia sold clips to 48 of her friends in April, and then she sold half as "
    "many clips in May. How many did she sell altogether?<|im_end|>\n<|im_start|>assistant\nShe "
    "sold 48 / 2 = 24 clips in May, so 48 + 24 = 72 in all.<|im_end|>",
    "def fibonacci(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n"
    "    return a  # fibonacci(10) == 55\n",
)


class Expected(NamedTuple):
    """A model's folder, the texts' tokens, and transformers' logits `[tokens, vocabulary]`."""

    folder: Path
    tokens: list[tuple[int, ...]]
    logits: list[torch.Tensor]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    subprocess.run(
        [sys.executable, "examples/smollm2/prepare.py", folder], cwd=ROOT, check=True, timeout=1200
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = [tuple(tokenizer(text).input_ids) for text in TEXTS]
    with torch.no_grad():
        logits = [model(torch.tensor([text])).logits[0] for text in tokens]
    return Expected(folder, tokens, logits)


class KeepLogits:
    """A head that keeps this rank's columns of the logits of every position but the last ones."""

    names: tuple[str, ...] = ()
    score_position: ScorePosition = "before"

    def __init__(self, module: PackedGPT) -> None:
        self.module = module
        self.logits: list[torch.Tensor] = []

    def __call__(self, hidden: torch.Tensor, micro_batch: MicroBatch) -> HeadResult:
        rows = self.module.gathered_hidden(hidden)[micro_batch.positions]
        self.logits.append(rows @ self.module.output_weight().T)
        return HeadResult(rows.new_zeros(()), {})


def logits_and_export(
    folder: Path, texts: list[tuple[int, ...]], out: Path | None
) -> list[torch.Tensor]:
    """This rank's columns of the logits by text, none off the last stage; writes `out` if given."""
    source = open_models(make_config(folder))
    policy = make_policy(source)
    batch = pack([Trajectory(str(i), text, 1, 1.0, 1.0) for i, text in enumerate(texts)])
    head = KeepLogits(policy.model.stages[-1])
    policy.model.infer(batch, head)
    if out:
        source.export(policy, out, replace=False)
    order = [i for indices in batch.micro_batches[0] for i in indices]
    if not head.logits:
        return []
    parts = torch.cat(head.logits).split([len(texts[i]) - 1 for i in order])
    return [parts[order.index(i)] for i in range(len(texts))]


def assert_same(one: Path, other: Path) -> None:
    want, got = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("pp", [1, 2, 3])
@pytest.mark.parametrize("tp", [1, 3])
def test_logits_are_those_of_transformers(
    smollm2: Expected, tmp_path: Path, tp: int, pp: int
) -> None:
    out = tmp_path / "out" if (tp, pp) in {(1, 2), (3, 3)} else None
    with closing(RankPool(tp * pp)) as pool:
        found = pool.run(logits_and_export, smollm2.folder, smollm2.tokens, out, tp=tp, pp=pp)
    columns = [logits for logits in found if logits]
    assert len(columns) == tp
    for number, want in enumerate(smollm2.logits):
        got = torch.cat([logits[number] for logits in columns], dim=1)
        torch.testing.assert_close(got, want[:-1], rtol=0, atol=ATOL)
        first, second = want[:-1].topk(2).values.unbind(dim=1)
        clear = first - second > ATOL
        assert clear.any()
        assert torch.equal(got.argmax(dim=1)[clear], want[:-1].argmax(dim=1)[clear])
    if out:
        assert_same(smollm2.folder, out)


def test_there_and_back_again_is_bitwise(smollm2: Expected, tmp_path: Path) -> None:
    to_megatron, to_hf = "tools/convert_hf_to_megatron.py", "tools/convert_megatron_to_hf.py"
    uneven = ("--pipeline", "3", "--last-stage-layers", "8")
    for command in (
        (to_megatron, smollm2.folder, tmp_path / "cut", "--tensor", "3", "--pipeline", "3"),
        (to_megatron, tmp_path / "cut", tmp_path / "other", *uneven),
        (to_hf, tmp_path / "other", tmp_path / "back"),
    ):
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, timeout=1200)
    assert_same(smollm2.folder, tmp_path / "back")
