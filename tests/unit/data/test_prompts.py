from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.prompts import load_prompts
from megatron_oreal.data.tokenizer import render_prompt
from tests.unit.data.conftest import write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from megatron_oreal.types import Prompt

GOOD = {"question": "1+1", "gold_answer": "2"}


def load(path: Path, tokenizer: PreTrainedTokenizerBase, window: int = 64) -> list[Prompt]:
    return load_prompts(path, tokenizer, None, max_total_tokens=window)


def test_every_field(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    full = {"id": "b", "pass_rate": 0.25, "data_source": "made", "difficulty": 3}
    prompts = load(write_jsonl(tmp_path / "q.jsonl", GOOD, GOOD | full), tokenizer)
    first, second = prompts
    assert (first.id, first.pass_rate, first.data_source) == ("line-1", None, "")
    assert (second.id, second.pass_rate, second.data_source) == ("b", 0.25, "made")
    assert (first.question, first.gold_answer) == ("1+1", "2")
    assert first.tokens == render_prompt(tokenizer, "1+1", None)


@pytest.mark.parametrize("pass_rate", [0, 1, 0.0, 1.0])
def test_pass_rate_bounds_belong(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, pass_rate: float
) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", GOOD | {"pass_rate": pass_rate})
    assert load(path, tokenizer)[0].pass_rate == pass_rate


def test_blank_lines_are_passed_over_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('\n{"question": "a", "gold_answer": "1"}\r\n\n \n')
    assert [prompt.id for prompt in load(path, tokenizer)] == ["line-2"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"question": "q"}', "required field `gold_answer`"),
        (b'{"gold_answer": "2"}', "required field `question`"),
        (b'{"question": "q", "gold_answer": null}', "got `null`.*gold_answer"),
        (b'{"question": "q", "gold_answer": 2.0}', "got `float`.*gold_answer"),
        (b'{"question": "q", "gold_answer": " "}', "`gold_answer` is blank"),
        (b'{"question": "", "gold_answer": "2"}', "`question` is blank"),
        (b'{"question": "q", "gold_answer": "2", "pass_rate": 1.5}', "<= 1.0.*pass_rate"),
        (b'{"question": "q", "gold_answer": "2", "pass_rate": -0.1}', ">= 0.0.*pass_rate"),
        (b'{"question": "q", "gold_answer": "2", "pass_rate": NaN}', "malformed"),
        (b'{"question": "q", "gold_answer": "2", "pass_rate": "0.5"}', "got `str`.*pass_rate"),
        (b'{"question": "q", "gold_answer": "2", "id": [7]}', "got `array`.*id"),
        (b'{"question": "q", "gold_answer": "2"', "truncated"),
        (b'{"question": "q", "gold_answer": "2"} {}', "trailing"),
        (b'["q", "2"]', "Expected `object`, got `array`"),
        (b"question,gold_answer", "malformed"),
        (b'{"question": "\xff\xfe", "gold_answer": "2"}', "utf-8"),
        (b'{"question": "\\ud800", "gold_answer": "2"}', "surrogate"),
        (b'{"x": ' + b"[" * 100_000, "recursion|truncated"),
    ],
)
def test_bad_line_is_named(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, line: bytes, says: str
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'{"question": "q", "gold_answer": "2"}\n' + line + b"\n")
    with pytest.raises(UserError, match=rf"data\.path=.*q\.jsonl, line 2: .*{says}") as caught:
        load(path, tokenizer)
    assert "\n" not in str(caught.value)


def test_duplicate_id(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", GOOD | {"id": "x"}, GOOD, GOOD | {"id": "x"})
    with pytest.raises(UserError, match=r"line 3: field `id` 'x' stands on line 1 already"):
        load(path, tokenizer)


def test_prompt_must_leave_room(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write_jsonl(tmp_path / "q.jsonl", GOOD | {"question": "x" * 20})
    length = len(render_prompt(tokenizer, "x" * 20, None))
    assert load(path, tokenizer, window=length + 1)
    with pytest.raises(
        UserError, match=rf"line 1: .*{length} tokens.*sampling\.max_total_tokens={length}"
    ):
        load(path, tokenizer, window=length)


@pytest.mark.parametrize("content", [b"", b"\n  \n"])
def test_empty_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, content: bytes) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"data\.path=.*q\.jsonl: the file is empty"):
        load(path, tokenizer)


def test_unreadable(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"No such file"):
        load(tmp_path / "nowhere.jsonl", tokenizer)
    with pytest.raises(UserError, match=r"evaluation\.path=.*holds no \*\.parquet or \*\.jsonl"):
        load_prompts(tmp_path, tokenizer, None, max_total_tokens=64, key="evaluation.path")
