from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.sampler import PromptSampler, copies
from megatron_oreal.types import Prompt


def prompts_of(*pass_rates: float | None) -> list[Prompt]:
    return [
        Prompt(str(index), f"q{index}", "1", (index,), pass_rate=rate)
        for index, rate in enumerate(pass_rates)
    ]


def ids(batch: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in batch]


@pytest.mark.parametrize(
    ("pass_rate", "expected"),
    [
        (0.0, 6),
        (0.19, 6),
        (0.2, 4),
        (0.4, 4),
        (0.59, 4),
        (0.6, 2),
        (0.79, 2),
        (0.8, 0),
        (1.0, 0),
        (None, 1),
    ],
)
def test_copies(pass_rate: float | None, expected: int) -> None:
    assert copies(pass_rate) == expected


def test_an_epoch_asks_each_copy_once() -> None:
    sampler = PromptSampler(prompts_of(0.1, 0.3, 0.5, 0.7, 0.9, None), 0, True)
    epoch = Counter(ids([sampler.next_batch(1)[0] for _ in range(17)]))
    assert epoch == {"0": 6, "1": 4, "2": 4, "3": 2, "5": 1}


def test_without_balance_each_question_once() -> None:
    sampler = PromptSampler(prompts_of(0.1, 0.9, 1.0, None), 0, False)
    assert sorted(ids(sampler.next_batch(4))) == ["0", "1", "2", "3"]


def test_epochs_and_seeds_differ() -> None:
    questions = prompts_of(*[None] * 20)
    sampler = PromptSampler(questions, 0, True)
    first, second = ids(sampler.next_batch(20)), ids(sampler.next_batch(20))
    assert first != second
    assert ids(PromptSampler(questions, 0, True).next_batch(20)) == first
    assert ids(PromptSampler(questions, 1, True).next_batch(20)) != first


def test_no_copy_is_lost_to_batches() -> None:
    # 40 x 6 + 40 x 2 copies, batches of 8: 3 epochs are 120 batches, up to what waits at the end.
    sampler = PromptSampler(prompts_of(*[0.1] * 40, *[0.7] * 40), 3, True)
    asked = Counter(identity for _ in range(120) for identity in ids(sampler.next_batch(8)))
    hard = sum(asked[str(index)] for index in range(40))
    assert 720 - 8 <= hard <= 720 + 8
    assert max(asked.values()) <= 19


def test_more_asked_than_there_are() -> None:
    sampler = PromptSampler(prompts_of(None, None, None), 0, True)
    assert Counter(ids(sampler.next_batch(7))).most_common()[0][1] == 3
    assert sorted(Counter(ids(sampler.next_batch(6))).values()) == [2, 2, 2]


def test_waiting_copies_stay_few() -> None:
    # Every batch holds both questions, so the hard one's copies are never used up.
    sampler = PromptSampler(prompts_of(0.1, 0.7), 0, True)
    for _ in range(200):
        assert sorted(ids(sampler.next_batch(2))) == ["0", "1"]
    assert len(sampler.state()["deferred"]) <= 8


def test_all_dropped() -> None:
    with pytest.raises(UserError, match=r"data\.balance_by_pass_rate=true drops every question"):
        PromptSampler(prompts_of(0.8, 1.0), 0, True)


def test_state_of_other_questions_is_refused() -> None:
    state = PromptSampler(prompts_of(0.1, 0.3), 0, True).state()
    for other in (
        PromptSampler(prompts_of(0.1, 0.7), 0, True),
        PromptSampler(prompts_of(0.1, 0.3), 1, True),
        PromptSampler(prompts_of(0.1, 0.3), 0, False),
    ):
        with pytest.raises(UserError, match=r"data\.path.*checkpoint.*resume"):
            other.load_state(state)


@given(
    rates=st.lists(st.sampled_from([None, 0.1, 0.3, 0.7, 0.9]), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 15), min_size=1, max_size=12),
    cut=st.integers(0, 12),
    seed=st.integers(0, 5),
)
def test_resumes_to_the_question_and_repeats_none(
    rates: list[float | None], sizes: list[int], cut: int, seed: int
) -> None:
    questions = [*prompts_of(*rates, None)]
    distinct = sum(rate != 0.9 for rate in rates) + 1
    whole = PromptSampler(questions, seed, True)
    batches = [ids(whole.next_batch(size)) for size in sizes]
    for size, batch in zip(sizes, batches, strict=True):
        assert len(batch) == size
        assert len(set(batch)) == min(size, distinct)

    before = PromptSampler(questions, seed, True)
    for size in sizes[:cut]:
        before.next_batch(size)
    after = PromptSampler(questions, seed, True)
    after.load_state(json.loads(json.dumps(before.state())))
    assert [ids(after.next_batch(size)) for size in sizes[cut:]] == batches[cut:]
