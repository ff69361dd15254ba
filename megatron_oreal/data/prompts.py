"""Questions with a gold answer each, read and tokenised once at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import msgspec

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.records import read_records, require_text
from megatron_oreal.data.tokenizer import render_prompt
from megatron_oreal.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


class QuestionRecord(msgspec.Struct, frozen=True):
    """One row of questions; `pass_rate` is the initial policy's share of correct samples."""

    question: str
    gold_answer: str | int
    id: str | int | None = None
    pass_rate: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] | None = None
    data_source: str = ""
    category: str = ""


def load_prompts(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str | None,
    *,
    max_total_tokens: int,
    key: str = "data.path",
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Reads questions, in their order; one without `id` is called `line-<number>` or `row-...`.

    Args:
        path: Where they lie, as `sources.find_files` takes it; `QuestionRecord` a row.
        tokenizer: Renders each question through its chat template.
        system_prompt: Put before each question; None for none.
        max_total_tokens: The window, prompt and response together.
        key: The config key that names the file, for errors.
        columns: The column of each field of `QuestionRecord`, where it has another name.

    Raises:
        UserError: A malformed line, a blank question or gold answer, an id seen before, or a prompt
            that leaves the window no room for a response; the text names file, line and field.
    """
    prompts: list[Prompt] = []
    first_seen: dict[str, str] = {}
    for where, name, record in read_records(path, key, QuestionRecord, columns):
        identity = name if record.id is None else str(record.id)
        if identity in first_seen:
            raise UserError(
                f"{where}: field `id` {identity!r:.80} stands on {first_seen[identity]}"
                " already: give each question its own"
            )
        first_seen[identity] = name.replace("-", " ")
        question = require_text(record.question, "question", where)
        gold_answer = require_text(str(record.gold_answer), "gold_answer", where)
        tokens = render_prompt(tokenizer, question, system_prompt)
        if len(tokens) >= max_total_tokens:
            raise UserError(
                f"{where}: field `question` makes a prompt of {len(tokens)} tokens, no room for"
                f" a response in sampling.max_total_tokens={max_total_tokens}: raise it or remove"
                " the line"
            )
        prompts.append(
            Prompt(
                identity,
                question,
                gold_answer,
                tokens,
                record.data_source,
                record.pass_rate,
                record.category,
            )
        )
    return prompts
