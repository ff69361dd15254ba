from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.demonstrations import Demonstration, load_demonstrations
from megatron_oreal.data.tokenizer import render_prompt
from tests.unit.data.conftest import write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

STOP = 3


def load(path: Path, tokenizer: PreTrainedTokenizerBase, window: int = 64) -> list[Demonstration]:
    return load_demonstrations(path, tokenizer, None, STOP, max_total_tokens=window)


def test_response_ends_in_the_stop_token(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", {"question": "1+1", "response": "=2"})
    (demonstration,) = load(path, tokenizer)
    assert demonstration.prompt_tokens == render_prompt(tokenizer, "1+1", None)
    assert demonstration.response_tokens == (4 + ord("=") - 32, 4 + ord("2") - 32, STOP)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"question": "q"}, "required field `response`"),
        ({"question": "q", "response": ""}, "`response` is blank"),
        ({"question": "q", "response": "2<|im_end|>"}, r"`response` holds the stop token"),
        ({"question": "q", "response": ["2"]}, "got `array`.*response"),
        ({"question": "q", "response": "x" * 64}, r"sampling\.max_total_tokens=64"),
    ],
)
def test_bad_line_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, record: dict[str, object], says: str
) -> None:
    good = {"question": "q", "response": "2"}
    path = write_jsonl(tmp_path / "d.jsonl", good, record)
    with pytest.raises(UserError, match=rf"sft\.path=.*d\.jsonl, line 2: .*{says}"):
        load(path, tokenizer)


def test_the_whole_window_may_be_used(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", {"question": "q", "response": "22"})
    total = len(render_prompt(tokenizer, "q", None)) + 3
    assert len(load(path, tokenizer, window=total)) == 1
    with pytest.raises(UserError, match=f"{total} tokens"):
        load(path, tokenizer, window=total - 1)
