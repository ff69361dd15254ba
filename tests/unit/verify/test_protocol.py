"""The lines between trainer and worker: any text passes, and only a reply is taken for one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import (
    Comparison,
    Pair,
    ProtocolError,
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)

ANY_TEXT = st.text(alphabet=st.characters(exclude_categories=()))  # surrogates too


@given(ANY_TEXT, ANY_TEXT)
def test_a_request_is_one_line_and_keeps_every_character(gold: str, answer: str) -> None:
    line = encode_request(7, Pair(gold, answer))
    assert line.count(b"\n") == 1
    assert decode_request(line) == (7, Pair(gold, answer))


@given(st.sampled_from(Outcome), ANY_TEXT)
def test_a_reply_keeps_outcome_and_reason(outcome: Outcome, reason: str) -> None:
    line = encode_reply(7, Comparison(outcome, reason))
    assert decode_reply(line, 7, 0.5) == Comparison(outcome, reason, 0.5)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"\n",
        b"\xff\n",
        b"null\n",
        b"[]\n",
        b'"correct"\n',
        b"{}\n",
        b'{"number": 8, "outcome": "correct", "reason": ""}\n',
        b'{"number": 7, "outcome": "right", "reason": ""}\n',
        b'{"number": 7, "reason": ""}\n',
        b'{"number": 7, "outcome": "correct"}\n',
        b'{"number": 7, "outcome": "correct", "reason": ""}\n{}\n',
    ],
)
def test_what_is_not_the_reply_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(line, 7, 0.0)
