"""What trainer and verification worker say to each other: one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass

from megatron_oreal.types import Outcome

READY_LINE = b'{"ready": true}\n'
MAX_TEXT_CHARS = 2000
MAX_REPLY_BYTES = 1 << 16


class ProtocolError(ValueError):
    """A worker answered with something that is not a reply to the request it holds."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A gold answer and the answer that is compared with it, by the verifier of that name."""

    gold: str
    answer: str
    verifier: str = "math"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Whether a pair is equal, or UNVERIFIED where nobody could tell, and why."""

    outcome: Outcome
    reason: str
    seconds: float = 0.0


def encode_request(number: int, pair: Pair) -> bytes:
    """Returns one line; non-ASCII is escaped, so that lone surrogates travel too."""
    request = {
        "number": number,
        "gold": pair.gold,
        "answer": pair.answer,
        "verifier": pair.verifier,
    }
    return json.dumps(request).encode("ascii") + b"\n"


def decode_request(line: bytes) -> tuple[int, Pair]:
    """Returns the number and the pair of a line written by `encode_request`."""
    request = json.loads(line)
    return request["number"], Pair(
        gold=request["gold"], answer=request["answer"], verifier=request["verifier"]
    )


def encode_reply(number: int, comparison: Comparison) -> bytes:
    """Returns one line that answers the request of that number; the time is taken by the reader."""
    reply = {"number": number, "outcome": comparison.outcome.value, "reason": comparison.reason}
    return json.dumps(reply).encode("ascii") + b"\n"


def decode_reply(line: bytes, number: int, seconds: float) -> Comparison:
    """Returns the comparison in a line.

    Raises:
        ProtocolError: the line is not the reply to request `number`.
    """
    try:
        reply = json.loads(line)
        if reply["number"] != number:
            raise ProtocolError(f"reply to request {reply['number']}, expected {number}")
        return Comparison(Outcome(reply["outcome"]), str(reply["reason"]), seconds)
    except (ValueError, KeyError, TypeError) as error:
        raise ProtocolError(f"not a reply: {error}") from error
