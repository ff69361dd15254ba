"""Where rows lie: a file, a pattern, a folder, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from urllib.parse import unquote

import msgspec

from megatron_oreal.config.errors import UserError

HUB = "hf://datasets/"
COLUMNAR = (".parquet", ".arrow")
_DATA = ("*.parquet", "*.jsonl")
_SAVED = "state.json"  # `save_to_disk` of one split of the `datasets` library
_SAVED_SPLITS = "dataset_dict.json"  # and of several
_SPLIT = re.compile(r"train|test|validation|valid|val|dev|eval")


class _File(msgspec.Struct, frozen=True):
    filename: str


class _Saved(msgspec.Struct, frozen=True, rename={"data_files": "_data_files"}):
    data_files: list[_File]


def find_files(source: str | Path, key: str) -> list[Path]:
    """Returns the files that a source stands for, in their order; they may not exist.

    Args:
        source: A file; a pattern with `*`; a folder of Parquet or JSONL files of one split, or one
            that `save_to_disk` of the `datasets` library wrote; or
            `hf://datasets/OWNER/NAME[@REVISION][/PATTERN]`, which is downloaded into the cache of
            huggingface_hub; a slash in REVISION is written %2F.
        key: The config key that names it, for errors.

    Raises:
        UserError: Nothing is there, or more than one split.
    """
    text = str(source)
    if text.startswith(HUB):
        return find_files(_download(text, key), key)
    path = Path(text)
    if path.is_dir():
        return _files_of_folder(path, key)
    if path.exists() or not glob.has_magic(text):
        return [path]
    found = [Path(name) for name in sorted(glob.glob(text, recursive=True))]  # noqa: PTH207
    if not found:
        raise UserError(f"{key}={text}: no file has such a name: mend the pattern")
    return found


def _files_of_folder(folder: Path, key: str) -> list[Path]:
    where = f"{key}={folder}"
    if (folder / _SAVED_SPLITS).exists():
        splits = sorted(path.parent.name for path in folder.glob(f"*/{_SAVED}"))
        raise UserError(f"{where}: holds the splits {', '.join(splits)}: name the folder of one")
    if (folder / _SAVED).exists():
        return [folder / file.filename for file in _saved(folder / _SAVED, where).data_files]
    found = next((files for kind in _DATA if (files := sorted(folder.rglob(kind)))), [])
    if not found:
        raise UserError(f"{where}: holds no *.parquet or *.jsonl: name a folder that does")
    splits = sorted({_split(path) for path in found})
    if len(splits) > 1:
        kind = found[0].suffix
        raise UserError(
            f"{where}: holds the splits {', '.join(name or 'without a name' for name in splits)}:"
            f" name the files of one, such as {folder}/**/{splits[-1]}*{kind}"
        )
    return found


def _saved(path: Path, where: str) -> _Saved:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError) as error:
        raise UserError(
            f"{where}: its {_SAVED} cannot be read ({error}): save the data set again"
        ) from error


def _split(path: Path) -> str:
    """Returns the split that the name of a file, or of its folder, begins with."""
    found = _SPLIT.match(path.name) or _SPLIT.match(path.parent.name)
    return found.group() if found else ""


def _download(url: str, key: str) -> Path:
    """Returns the local copy of what a URL of the hub names; only new files are fetched."""
    # Imported here: it reads its cache folder and the offline switch from the environment then.
    from huggingface_hub import snapshot_download

    owner, _, rest = url.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    name, _, revision = name.partition("@")
    wanted = [inside] if inside else [*_DATA, "*.arrow", _SAVED, _SAVED_SPLITS]
    try:
        folder = snapshot_download(
            f"{owner}/{name}",
            repo_type="dataset",
            revision=unquote(revision) or None,
            allow_patterns=wanted,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}={url}: the hub does not give it ({reason:.200}): mend the name, or download it"
            " where there is network and name the folder"
        ) from error
    return Path(folder, inside)
