"""Cases of the parity suite: every pair of switches meets in one of them, on answers of its own."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from megatron_oreal.config.schema import OrealConfig, TokenWeightsConfig, VerifierConfig
from megatron_oreal.config.schema_importance import ImportanceConfig
from megatron_oreal.types import Outcome, Prompt, Rollout, RolloutGroup, Verdict

LEVELS: dict[str, Sequence[Any]] = {
    "samples": (2, 3, 5, 8, 16),
    "token_weights": (
        TokenWeightsConfig(kind="threshold"),
        TokenWeightsConfig(kind="threshold", c_pos=0.3, c_neg=0.7),
        TokenWeightsConfig(kind="threshold", c_pos=0.0, c_neg=0.0),
        TokenWeightsConfig(kind="topk"),
        TokenWeightsConfig(kind="topk", ratio_pos=0.5, ratio_neg=0.8),
        TokenWeightsConfig(kind="none"),
    ),
    "token_score": ("before", "at"),
    "shaping": ("rloo", "grpo", "none"),
    "selection": ("pairs", "all_nontrivial", "all"),
    "kl": ("k1", "k2", "k3"),
    "kl_coefficient": (0.01, 0.5, 0.0),
    "positive_times_advantage": (True, False),
    "importance": (
        ImportanceConfig(),
        ImportanceConfig(level="token"),
        ImportanceConfig(level="token", cap=5.0, above_cap="mask"),
        ImportanceConfig(level="sequence", cap=5.0),
        ImportanceConfig(level="sequence", above_cap="mask"),
    ),
    "factors": ((1.0, 0.5), (0.7, 0.0), (0.0, 2.0)),
    "unverified_is_incorrect": (False, True),
    "max_unverified_share": (0.1, 0.7),
    "tight": (False, True),
}
Pair = tuple[tuple[str, int], tuple[str, int]]

LETTERS = {"+": Outcome.CORRECT, "-": Outcome.INCORRECT, "?": Outcome.UNVERIFIED}


@dataclass(frozen=True)
class Case:
    """One choice of each switch; `tight` asks for many micro-batches, `index` seeds the answers."""

    index: int
    chosen: Mapping[str, Any]

    @property
    def oreal(self) -> OrealConfig:
        """The objective's section."""
        names = set(OrealConfig.__dataclass_fields__) & self.chosen.keys()
        positive, negative = self.chosen["factors"]
        switches = {name: self.chosen[name] for name in names}
        return OrealConfig(**switches, positive_factor=positive, negative_factor=negative)

    @property
    def verifier(self) -> VerifierConfig:
        """The verifier's section."""
        return VerifierConfig(
            unverified_is_incorrect=self.chosen["unverified_is_incorrect"],
            max_unverified_share=self.chosen["max_unverified_share"],
        )

    def __str__(self) -> str:
        weights = self.oreal.token_weights
        return f"{self.index}-{self.oreal.shaping}-{self.oreal.selection}-{weights.kind}"


def pairs_of(levels: Mapping[str, int]) -> set[Pair]:
    """Every two switches with the numbers of their levels."""
    return set(combinations(sorted(levels.items()), 2))


def every_pair() -> set[Pair]:
    """All that a covering set covers."""
    return {
        ((a, i), (b, j))
        for a, b in combinations(sorted(LEVELS), 2)
        for i, j in product(range(len(LEVELS[a])), range(len(LEVELS[b])))
    }


def covering_levels(tries: int = 40) -> list[dict[str, int]]:
    """Returns few rows of levels that together hold every pair: greedily, the best of some tries.

    Each try holds a pair that is still missing, so that the last ones are found too.
    """
    rng, missing, rows = random.Random(3), every_pair(), []
    while missing:
        seeds = rng.sample(sorted(missing), min(tries, len(missing)))
        drawn = [
            {name: rng.randrange(len(levels)) for name, levels in LEVELS.items()} | dict(pair)
            for pair in seeds
        ]
        best = max(drawn, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows


def covering_cases() -> list[Case]:
    """The covering set as cases."""
    return [
        Case(index, {name: LEVELS[name][level] for name, level in row.items()})
        for index, row in enumerate(covering_levels())
    ]


def make_groups(case: Case, vocab: int) -> list[RolloutGroup]:
    """Four judged questions: mixed, mixed with unverified answers, solved, and as it comes."""
    rng, samples = random.Random(case.index), case.chosen["samples"]
    draws = ["+" + "-" * (samples - 1), "+-" + "?+-" * samples, "+" * samples]
    draws.append("".join(rng.choice("+--?") for _ in range(samples)))
    spellings = [rng.sample(draw[:samples], samples) for draw in draws]
    return [_group(f"q{i}", letters, rng, vocab) for i, letters in enumerate(spellings)]


def _group(name: str, letters: Sequence[str], rng: random.Random, vocab: int) -> RolloutGroup:
    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(rng.randint(1, longest)))

    answers = [tokens(9) for _ in letters]
    return RolloutGroup(
        prompt=Prompt(name, "?", "!", tokens(5)),
        rollouts=tuple(
            Rollout(a, tuple(-4 - 2 * rng.random() for _ in a), "", stopped=rng.random() < 0.8)
            for a in answers
        ),
        verdicts=tuple(Verdict(LETTERS[letter], "rule", "", None, 0.0) for letter in letters),
    )
