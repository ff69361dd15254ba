"""Which verifier compares an answer: by the `data_source` of its question.

A verifier is a module here with `compare(pair, tolerance) -> Comparison`, named in `BUILT_IN`, or a
user's `path/to/file.py:function`, `function(gold: str, answer: str) -> bool | None` (None: cannot
say). Either runs in a worker, under its deadlines and limits.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_oreal.config.errors import UserError
from megatron_oreal.types import Outcome
from megatron_oreal.verify.protocol import Comparison, Pair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Compare = Callable[[Pair, float], Comparison]

BUILT_IN = {
    "math": "megatron_oreal.verify.equivalence",
    "exact": "megatron_oreal.verify.exact",
}
_SAID = {True: Outcome.CORRECT, False: Outcome.INCORRECT, None: Outcome.UNVERIFIED}


class Routes:
    """From `data_source` to the name of a verifier."""

    def __init__(self, default: str, routes: Sequence[str]) -> None:
        """Reads `source=verifier` entries; user files become absolute.

        Raises:
            UserError: an entry without `=`, an unknown name, or a file that is not there.
        """
        self._default = _checked(default, "verifier.default")
        self._by_source: dict[str, str] = {}
        for entry in routes:
            source, equals, name = entry.partition("=")
            if not equals:
                raise UserError(f"verifier.routes=[{entry}]: write data_source=verifier")
            self._by_source[source.strip()] = _checked(name.strip(), "verifier.routes")

    def verifier_of(self, data_source: str) -> str:
        """Returns the verifier of a question of this source."""
        return self._by_source.get(data_source, self._default)

    @property
    def names(self) -> list[str]:
        """All verifiers that a worker has to know."""
        return sorted({self._default, *self._by_source.values()})


def load(name: str) -> Compare:
    """Returns the comparison of a verifier; runs a user's file, in a worker only."""
    if name in BUILT_IN:
        return importlib.import_module(BUILT_IN[name]).compare
    path, _, function = name.rpartition(":")
    spec = importlib.util.spec_from_file_location(f"verifier_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return _guarded(getattr(module, function))


def _guarded(function: Callable[[str, str], bool | None]) -> Compare:
    """Wraps a user's function: what it raises, or returns beside bool and None, decides nothing."""

    def compare(pair: Pair, tolerance: float) -> Comparison:  # noqa: ARG001 - one signature
        try:
            said = function(pair.gold, pair.answer)
        except Exception as error:  # noqa: BLE001 - a user's function may raise anything
            return Comparison(Outcome.UNVERIFIED, f"the verifier raised {type(error).__name__}")
        if said is not None and not isinstance(said, bool):
            return Comparison(Outcome.UNVERIFIED, "the verifier returned neither bool nor None")
        return Comparison(_SAID[said], "by a user's function")

    return compare


def _checked(name: str, key: str) -> str:
    if name in BUILT_IN:
        return name
    path, colon, function = name.rpartition(":")
    if not (colon and path.endswith(".py") and function.isidentifier()):
        known = ", ".join(BUILT_IN)
        raise UserError(f"{key}={name}: no such verifier; name {known} or path/to/file.py:function")
    if not Path(path).is_file():
        raise UserError(f"{key}={name}: there is no such file; give a path from here or from /")
    return f"{Path(path).resolve()}:{function}"
