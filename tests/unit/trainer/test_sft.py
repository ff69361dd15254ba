from __future__ import annotations

import hashlib

from megatron_oreal.data.demonstrations import Demonstration
from megatron_oreal.trainer.sft import Epochs, _digest

FIVE = [Demonstration((1, 2), (10 + i, 0)) for i in range(5)]


def ids(steps):
    return [[trajectory.prompt_id for trajectory in step] for step in steps]


def test_every_epoch_has_each_demonstration_once():
    steps = list(Epochs(FIVE, count=2, per_step=2, seed=0))
    assert [len(step) for step in steps] == [2, 2, 1, 2, 2, 1]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(name for step in ids(epoch) for name in step) == [
            f"line-{i}" for i in range(1, 6)
        ]


def test_a_demonstration_is_prompt_then_response():
    (step,) = Epochs(FIVE[:1], count=1, per_step=4, seed=0)
    (only,) = step
    assert only.tokens == (1, 2, 10, 0)
    assert (only.prompt_length, only.response_length) == (2, 2)
    assert (only.reward, only.advantage) == (1.0, 1.0)


def test_order_follows_the_seed_and_changes_from_epoch_to_epoch():
    many = [Demonstration((1,), (i,)) for i in range(40)]
    first, second = ids(Epochs(many, count=2, per_step=40, seed=3))
    assert first != second
    assert ids(Epochs(many, count=2, per_step=40, seed=3)) == [first, second]
    assert ids(Epochs(many, count=1, per_step=40, seed=4)) != [first]


def test_a_longer_run_begins_like_a_shorter_one():
    short, long = (list(Epochs(FIVE, count=n, per_step=2, seed=0)) for n in (1, 3))
    assert ids(long[:3]) == ids(short)


def test_steps_are_made_as_they_are_asked_for():
    steps = Epochs(FIVE, count=2, per_step=2, seed=0)
    assert len(steps) == 6
    assert ids([steps[4], steps[0], steps[4]]) == ids([list(steps)[i] for i in (4, 0, 4)])


def test_the_digest_of_demonstrations_is_that_of_their_text():
    assert _digest(FIVE) == hashlib.sha256(repr(FIVE).encode()).hexdigest()
