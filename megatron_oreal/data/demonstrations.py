"""Demonstrations for supervised fine-tuning: questions with the response to learn, tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.records import read_records, require_text
from megatron_oreal.data.tokenizer import render_prompt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


class DemonstrationRecord(msgspec.Struct, frozen=True):
    """One row of demonstrations."""

    question: str
    response: str


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One question and the response to learn.

    `response_tokens` end in the stop token and hold it nowhere else.
    """

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]


def load_demonstrations(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    stop_id: int,
    *,
    max_total_tokens: int,
    key: str = "sft.path",
    columns: Mapping[str, str] | None = None,
) -> list[Demonstration]:
    """Reads demonstrations, in their order; prompts are rendered as those of rollouts are.

    Args:
        path: Where they lie, as `sources.find_files` takes it; `DemonstrationRecord` a row.
        tokenizer: The model's tokenizer.
        system_prompt: Put before each question; None for none.
        stop_id: The stop token's id, appended to each response.
        max_total_tokens: The window, prompt and response together.
        key: The config key that names the file, for errors.
        columns: The column of each field of `DemonstrationRecord`, where it has another name.

    Raises:
        UserError: A malformed line, a blank field, a response that holds the stop token, or a
            demonstration longer than the window; the text names file, line and field.
    """
    demonstrations: list[Demonstration] = []
    for where, _, record in read_records(path, key, DemonstrationRecord, columns):
        question = require_text(record.question, "question", where)
        response = require_text(record.response, "response", where)
        prompt_tokens = render_prompt(tokenizer, question, system_prompt)
        written = tokenizer.encode(response, add_special_tokens=False)
        if stop_id in written:
            raise UserError(
                f"{where}: field `response` holds the stop token"
                f" {tokenizer.convert_ids_to_tokens(stop_id)}: remove it, it is appended here"
            )
        total = len(prompt_tokens) + len(written) + 1
        if total > max_total_tokens:
            raise UserError(
                f"{where}: question and field `response` are {total} tokens, more than"
                f" sampling.max_total_tokens={max_total_tokens}: raise it or remove the line"
            )
        demonstrations.append(Demonstration(prompt_tokens, (*written, stop_id)))
    return demonstrations
