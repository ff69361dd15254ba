"""How much of one question's wording stands in another: n-grams of words, compared exactly.

Nothing here is hashed or drawn: the pairs found are all that there are, whatever the order of
sets in memory.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator, Sequence

Ngram = tuple[str, ...]

# What is typeset otherwise and asks the same.
_TYPESETTING = re.compile(r"\\(?:left|right|displaystyle|[,;:! ()\[\]])|[$~{}]")
_FRACTION = re.compile(r"\\[dt]frac")
_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")


def words_of(text: str) -> tuple[str, ...]:
    """Returns words, numbers and single signs, in lower case, without dollars, braces, spacing."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    plain = _TYPESETTING.sub(" ", _FRACTION.sub(r"\\frac", plain))
    words = _WORD.findall(plain)
    while words and words[-1] in ".?!":
        words.pop()
    return tuple(words)


def ngrams_of(words: Sequence[str], n: int) -> frozenset[Ngram]:
    """Returns the runs of `n` words; of a shorter text the whole text is the only one."""
    starts = range(max(len(words) - n, 0) + 1)
    return frozenset(tuple(words[start : start + n]) for start in starts)


def jaccard(a: frozenset[Ngram], b: frozenset[Ngram]) -> float:
    """Returns the share of all n-grams of two texts that stand in both."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


def near_duplicates(
    texts: Sequence[frozenset[Ngram]], kinds: Sequence[Hashable], threshold: float
) -> dict[int, tuple[int, float]]:
    """Finds texts that are nearly one that was kept before; the first of its like is kept.

    Exact all-pairs search by prefixes (Bayardo et al., WWW 2007): where two sets of sizes x and y
    have a Jaccard index of t, they share t x elements at least, so that each one's rarest
    x - ceil(t x) + 1 elements hold one of the other's. Only texts with such a one are compared.

    Args:
        texts: The n-grams of each text.
        kinds: Texts of different kinds are never duplicates, such as those of different answers.
        threshold: The least Jaccard index of duplicates; above 0.

    Returns:
        For each duplicate the text it repeats and their index, by place in `texts`.
    """
    frequency = Counter(ngram for text in texts for ngram in text)
    holders: defaultdict[tuple[Hashable, Ngram], list[int]] = defaultdict(list)
    found: dict[int, tuple[int, float]] = {}
    for i, text in enumerate(texts):
        rarest = sorted(text, key=lambda ngram: (frequency[ngram], ngram))
        # Products such as 0.7 * 10 must not be rounded up to 8.
        prefix = rarest[: len(text) - math.ceil(threshold * len(text) - 1e-9) + 1]
        candidates = sorted({j for ngram in prefix for j in holders[kinds[i], ngram]})
        near = [(j, jaccard(text, texts[j])) for j in candidates]
        repeated = next(((j, index) for j, index in near if index >= threshold - 1e-9), None)
        if repeated:
            found[i] = repeated
            continue
        for ngram in prefix:
            holders[kinds[i], ngram].append(i)
    return found


class HeldOut:
    """Questions that must not be trained on, by their n-grams."""

    def __init__(self, questions: Iterable[tuple[str, str]], n: int) -> None:
        """Takes `(name, question)` of each."""
        self._n = n
        self._names: list[str] = []
        self._sizes: list[int] = []
        self._holders: defaultdict[Ngram, list[int]] = defaultdict(list)
        for name, question in questions:
            ngrams = ngrams_of(words_of(question), n)
            for ngram in ngrams:
                self._holders[ngram].append(len(self._names))
            self._names.append(name)
            self._sizes.append(len(ngrams))

    def __len__(self) -> int:
        """How many questions."""
        return len(self._names)

    def closest(self, question: str) -> tuple[str, float]:
        """Returns which held-out question shares most with this one, and how much.

        The share is of the n-grams of the shorter of the two; where none is shared, the name is
        empty.
        """
        ngrams = ngrams_of(words_of(question), self._n)
        shared = Counter(i for ngram in ngrams for i in self._holders.get(ngram, ()))
        overlaps = self._overlaps(shared, len(ngrams))
        share, first = max(overlaps, default=(0.0, 0))
        return (self._names[-first] if share else "", share)

    def _overlaps(self, shared: Counter[int], size: int) -> Iterator[tuple[float, int]]:
        for i, count in shared.items():
            yield count / min(size, self._sizes[i]), -i  # of equals the first
