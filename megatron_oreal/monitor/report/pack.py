"""A run's data as the page wants it: plain JSON, and tokens in compressed columns."""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_oreal.monitor.report import answers
from megatron_oreal.monitor.report.read import Place, RunData, read_texts
from megatron_oreal.monitor.transcripts import TOKEN_DTYPE, read_tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from megatron_oreal.monitor.run_folder import RunFolder

CHUNK_TOKENS = 1 << 15  # inflated at once, when one of its transcripts is opened
COLUMNS = tuple(name for name in TOKEN_DTYPE.names or () if name != "token")
_BLAMED = 3
_LATE = 3  # the blamed come from the last third of the run


@dataclass
class Packed:
    """The transcripts of all runs of a page.

    `chunks` are deflated; one holds transcripts one after the other, each first as `n` indices
    into `vocabulary` (int32), then as `n` half-precision numbers of each of `COLUMNS`.
    """

    items: list[dict[str, Any]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    vocabulary: dict[tuple[int, int], int] = field(default_factory=dict)
    pieces: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    _open: list[bytes] = field(default_factory=list)
    _open_tokens: int = 0

    def add(self, item: dict[str, Any], tokens: np.ndarray, run: int, texts: list[bytes]) -> None:
        """Adds a transcript, `tokens` `[n]` of `TOKEN_DTYPE`."""
        columns = [self._indices(tokens["token"], run, texts).tobytes()]
        columns += [np.ascontiguousarray(tokens[name]).tobytes() for name in COLUMNS]
        place = {"chunk": len(self.chunks), "start": self._open_tokens, "n": len(tokens)}
        self.items.append({**item, "run": run, **place})
        self._open += columns
        self._open_tokens += len(tokens)
        if self._open_tokens >= CHUNK_TOKENS:
            self.close()

    def close(self) -> None:
        """Compresses what is pending."""
        if self._open:
            self.chunks.append(zlib.compress(b"".join(self._open), 6))
        self._open, self._open_tokens = [], 0

    def _indices(self, tokens: np.ndarray, run: int, texts: list[bytes]) -> np.ndarray:
        """Returns where in the page's vocabulary each token is; runs have their own tokenizers."""
        unique, inverse = np.unique(tokens, return_inverse=True)
        places = np.empty(len(unique), np.int32)
        for i, token in enumerate(unique.tolist()):
            place = self.vocabulary.setdefault((run, token), len(self.pieces))
            if place == len(self.pieces):
                self.pieces.append(piece(texts, token).decode("latin-1"))
                self.ids.append(token)
            places[i] = place
        return places[inverse]


def piece(texts: Sequence[bytes], token: int) -> bytes:
    """Returns the bytes of a token; its id in brackets where the run left no vocabulary."""
    return texts[token] if 0 <= token < len(texts) else f"⟨{token}⟩".encode()


def pack(runs: Sequence[RunData], chosen: Sequence[list[Place]]) -> Packed:
    """Packs the chosen transcripts of each run."""
    packed = Packed()
    for number, (run, places) in enumerate(zip(runs, chosen, strict=True)):
        vocabulary = run.folder.read_vocabulary()
        for path, lines in _by_file(places).items():
            texts, tokens = read_texts(path, lines), read_tokens(path, lines)
            for line in lines:
                of_line = tokens.get(line, np.empty(0, TOKEN_DTYPE))
                item = texts[line] | _blame(run, texts[line], of_line, vocabulary)
                packed.add(item, of_line, number, vocabulary)
    packed.close()
    return packed


def run_record(run: RunData, number: int, packed: Packed) -> dict[str, Any]:
    """Returns what the page says of one run, but for its transcripts."""
    shown = [item for item in packed.items if item["run"] == number]
    tokens = sum(place.head.response_length for place in run.places)
    judged = [place.head for place in run.places if place.head.score is not None]
    late = [head for head in judged if head.iteration >= _late(run)]
    pairs = [(head.score or 0.0, (head.reward or 0) > 0) for head in late]
    return {
        "name": run.name,
        "folder": str(run.folder.root),
        "finished": run.finished,
        "iterations_planned": run.iterations_planned,
        "score_is_before": run.score_is_before,
        "train": _columns(run.train),
        "eval": _columns(run.evaluations),
        "alarms": run.alarms,
        "phases": run.phases,
        "learned": {"verdict": answers.verdict(run), "said": answers.learned(run)},
        "time": answers.time_spent(run),
        "reward_model": answers.reward_model(run),
        "calibration": answers.calibration(pairs),
        "left": left_behind(run.folder),
        "blamed": _most_blamed(run, number, packed),
        "transcripts": {
            "written": len(run.places),
            "written_tokens": tokens,
            "shown": len(shown),
            "shown_tokens": sum(item["n"] for item in shown),
        },
    }


def left_behind(folder: RunFolder) -> dict[str, list[str]]:
    """Returns what else lies in the run's folder, by what it is: paths relative to the folder."""
    kinds = {
        "checkpoints": folder.checkpoints.glob("iteration_*"),
        "Hugging Face checkpoints": folder.hf.glob("*"),
        "traces": folder.profile.rglob("*.json*"),
    }
    found = {kind: sorted(paths) for kind, paths in kinds.items()}
    root = folder.root
    return {kind: [str(p.relative_to(root)) for p in paths] for kind, paths in found.items()}


def _late(run: RunData) -> int:
    """Returns the first iteration of the last third of what the run has done."""
    done = max((line["iteration"] for line in run.train), default=-1) + 1
    return done - -(-done // _LATE)


def _most_blamed(run: RunData, number: int, packed: Packed) -> list[int]:
    """Returns the wrong answers in which q falls the most, late in the run, a question once."""
    wrong = [
        (item["blamed"]["before"] - item["blamed"]["after"], i)
        for i, item in enumerate(packed.items)
        if item["run"] == number and item.get("blamed") and (item.get("reward") or 0) < 0
    ]
    late = [(fall, i) for fall, i in wrong if packed.items[i]["iteration"] >= _late(run)]
    first_of: dict[str, int] = {}
    for _, i in sorted(late or wrong, reverse=True):
        first_of.setdefault(packed.items[i]["prompt_id"], i)
    return list(first_of.values())[:_BLAMED]


def _blame(
    run: RunData, item: dict[str, Any], tokens: np.ndarray, vocabulary: list[bytes]
) -> dict[str, Any]:
    found = answers.blamed_token(tokens["token_score"], score_is_before=run.score_is_before)
    if not item.get("trained") or found is None:
        return {}
    index, before, after = found
    pieces = [piece(vocabulary, token) for token in tokens["token"].tolist()]
    heaviest = int(np.argmax(tokens["token_weight"]))
    return {
        "blamed": {
            "index": index,
            "before": before,
            "after": after,
            "context": answers.context(pieces, index),
            "heaviest": heaviest,
            "heaviest_text": pieces[heaviest].decode("utf-8", "replace"),
            "heaviest_weight": float(tokens["token_weight"][heaviest]),
        }
    }


def _columns(lines: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turns lines into columns by iteration; None where a line has no number of that name."""
    names = dict.fromkeys(name for line in lines for name in line if name != "kind")
    ordered = sorted(lines, key=lambda line: line["iteration"])
    return {name: [_number(line.get(name)) for line in ordered] for name in names}


def _number(value: Any) -> float | None:
    finite = isinstance(value, float | int) and np.isfinite(value)
    return float(f"{value:.6g}") if finite else None


def _by_file(places: Iterable[Place]) -> dict[Path, list[int]]:
    lines: dict[Path, list[int]] = defaultdict(list)
    for place in places:
        lines[place.path].append(place.line)
    return lines
