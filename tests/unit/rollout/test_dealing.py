from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from megatron_oreal.rollout.dealing import deal


def test_the_longest_go_first_to_the_least_loaded():
    # 5 -> engine 0, 4 -> engine 1, 3 -> engine 1 (7), 3 -> engine 0 (8), 1 -> engine 1 (8)
    assert deal([3, 5, 3, 1, 4], 2) == [[1, 2], [0, 3, 4]]


def test_equal_requests_are_dealt_in_turn():
    assert deal([7] * 5, 2) == [[0, 2, 4], [1, 3]]


def test_fewer_requests_than_engines_leave_some_empty():
    assert deal([2, 9], 4) == [[1], [0], [], []]
    assert deal([], 2) == [[], []]


@given(st.lists(st.integers(1, 20_000), max_size=60), st.integers(1, 9))
def test_each_request_is_dealt_once_and_loads_differ_by_one_request_at_most(lengths, n_engines):
    hands = deal(lengths, n_engines)
    assert sorted(index for hand in hands for index in hand) == list(range(len(lengths)))
    assert all(hand == sorted(hand) for hand in hands)
    loads = [sum(lengths[index] for index in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(lengths, default=0)
