from __future__ import annotations

from megatron_oreal.data.cleaning import Cleaning, Reason, Removal, find_removals
from megatron_oreal.data.overlap import HeldOut

LONG = "how many ways are there to seat eight guests at a round table"
NONE = HeldOut([], n=8)


def removals(
    *pairs: tuple[str, str], held_out: HeldOut = NONE, **settings: float
) -> dict[int, Removal]:
    questions = [(f"q{i}", question, answer) for i, (question, answer) in enumerate(pairs)]
    return find_removals(questions, held_out, Cleaning(**settings))  # pyright: ignore


def test_the_first_of_the_same_words_stays() -> None:
    found = removals(("What is $1+1$?", "2"), ("what is 1 + 1", "$2$"), ("What is 1+2?", "3"))
    assert found == {1: Removal(Reason.DUPLICATE, "q0", 1.0)}


def test_of_a_contradiction_nothing_stays() -> None:
    found = removals(("1+1", "2"), ("1+1", "3"), ("1+1", "2"))
    assert {i: removal.other for i, removal in found.items()} == {0: "q2", 1: "q0", 2: "q0"}
    assert {removal.reason for removal in found.values()} == {Reason.CONTRADICTION}


def test_near_duplicates_have_the_same_answer() -> None:
    # 13 words, 11 runs of three; "please" before them adds one: 11 / 12.
    found = removals((LONG, "5040"), (f"Please {LONG}", "5040"), (f"please, {LONG}", "7"))
    assert found == {1: Removal(Reason.NEAR_DUPLICATE, "q0", 11 / 12)}
    assert not removals((LONG, "5040"), (f"Please {LONG}", "5040"), near_threshold=2.0)


def test_what_is_held_out_goes_first() -> None:
    held_out = HeldOut([("suite 7", f"Tell us {LONG}.")], n=8)
    found = removals((LONG, "5040"), (LONG, "5040"), ("1+1", "2"), held_out=held_out)
    assert found == dict.fromkeys((0, 1), Removal(Reason.HELD_OUT, "suite 7", 1.0))
