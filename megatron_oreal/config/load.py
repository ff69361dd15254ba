"""YAML files and `key=value` overrides to one frozen `Config`, through OmegaConf, once.

Every file and override is cut into single settings (`oreal.kl=k3`), applied one by one in the order
given, so that an error can name the key, its value and the file or override it stands in.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf, TupleConfig, read_write
from omegaconf.errors import (
    GrammarParseError,
    OmegaConfBaseException,
    UnsupportedValueType,
    ValidationError,
)

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.schema import Config
from megatron_oreal.config.validate import check_sections

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

INHERIT = "inherit"
MANDATORY = "???"


@dataclass(frozen=True, slots=True)
class _Setting:
    key: str
    value: object
    source: str


def load_config(
    files: Sequence[Path], overrides: Sequence[str], *, optional: Collection[str] = ()
) -> Config:
    """Reads the files in order, then the overrides; what comes later wins.

    Args:
        files: YAML files; one may say `inherit: other.yaml` (relative to itself), read before it.
        overrides: `section.key=value`, the value as in YAML.
        optional: keys without a default that this command does not need; unset they stay `???`.

    Raises:
        UserError: on an unreadable or malformed file, an unknown key, a value of the wrong type or
            out of range, a key without a value, or sections that contradict each other.
    """
    known = config_keys()
    tree = OmegaConf.structured(Config)
    settings = [setting for file in files for setting in _read_file(Path(file), ())]
    settings += [setting for text in overrides for setting in _read_override(text)]
    for setting in settings:
        _apply(tree, setting, known)
    for key in known:
        missing = OmegaConf.is_missing(_section(tree, key), key.rpartition(".")[2])
        if missing and key not in optional:
            raise UserError(f"{key}={MANDATORY}: has no default; set {key}=... or put it in a file")
    config = _build(Config, tree)
    check_sections(config)
    for key in config.checkpoint.allow_changes:
        if key not in known:
            raise UserError(f"checkpoint.allow_changes=[{key}]: {_unknown(key, known)}")
    return config


def resolve_config_yaml(config: Config) -> str:
    """Returns the whole config as YAML that `load_config` reads back to an equal one."""
    # Not PyYAML's own writer, which leaves `0E0` bare, a number to the reader.
    return OmegaConf.to_yaml(OmegaConf.create(_plain(dataclasses.asdict(config))))


def config_keys(section: type = Config, prefix: str = "") -> dict[str, Any]:
    """Returns every dotted key of the schema with its type, in the schema's order."""
    keys: dict[str, Any] = {}
    for name, hint in get_type_hints(section).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            keys.update(config_keys(hint, f"{prefix}{name}."))
        else:
            keys[prefix + name] = hint
    return keys


def _read_file(path: Path, parents: tuple[Path, ...]) -> list[_Setting]:
    chain = (*parents, path.resolve())
    if path.resolve() in parents:
        loop = " -> ".join(str(p) for p in chain)
        raise UserError(f"{INHERIT}={path}: files inherit in a circle ({loop}); cut it")
    content = read_yaml(path)
    parent = content.pop(INHERIT, None)
    if parent is not None and not isinstance(parent, str):
        raise UserError(f"{INHERIT}={parent}: {path} must name one file as text")
    inherited = _read_file(path.parent / parent, chain) if parent else []
    return inherited + [_Setting(key, value, str(path)) for key, value in _leaves(content)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a file of sections as it stands, of whatever version; UserError where it is none."""
    try:
        loaded = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}:{line}: malformed YAML: {error.problem}; mend that line"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML text file; name one of UTF-8 text") from error
    except OSError as error:
        why = error.strerror or "does not hold sections of keys"
        raise UserError(f"{path}: {why}; name a readable YAML file of sections") from error
    content = OmegaConf.to_container(loaded, resolve=False)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a list; a config file holds sections of keys")
    return {str(key): value for key, value in content.items()}


def _read_override(text: str) -> list[_Setting]:
    key, equals, raw = text.partition("=")
    if not (key and equals):
        raise UserError(f"{text}: not an override; write section.key=value")
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([text]), resolve=False)
    except yaml.YAMLError as error:
        raise UserError(f"{key}={raw}: the value is not YAML; put it in quotes") from error
    return [_Setting(key, value, "override") for key, value in _leaves(content)]


def _leaves(content: Any, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(content, dict) or not content:
        yield prefix, content
        return
    for name, value in content.items():
        yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))


def _apply(tree: DictConfig, setting: _Setting, known: Mapping[str, Any]) -> None:
    key = setting.key
    if not key:
        return  # an empty file
    if key not in known:
        raise UserError(f"{_show(setting)}: {_unknown(key, known)}")
    try:
        with read_write(_section(tree, key)):
            OmegaConf.update(tree, key, setting.value)
    except (ValidationError, UnsupportedValueType, GrammarParseError) as error:
        raise UserError(f"{_show(setting)}: expected {_expected(known[key])}") from error


def _section(tree: DictConfig, key: str) -> DictConfig:
    return OmegaConf.select(tree, key.rpartition(".")[0])


def _show(setting: _Setting) -> str:
    value = "null" if setting.value is None else " ".join(str(setting.value).split())
    return f"{setting.key}={value} ({setting.source})"


def _unknown(key: str, known: Mapping[str, Any]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"a section; set its keys one by one, such as {inside[0]}"
    by_last = {name.rpartition(".")[2]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    near += [by_last[n] for n in difflib.get_close_matches(key.rpartition(".")[2], by_last, n=1)]
    best = max(near, key=lambda name: difflib.SequenceMatcher(None, key, name).ratio(), default="")
    return f"no such key; did you mean {best}?" if best else "no such key; see configs/base.yaml"


def _expected(hint: Any) -> str:
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if get_origin(hint) is tuple:
        return f"a list of {_expected(arguments[0])}"
    if arguments:
        return " or ".join(map(_expected, arguments))
    return "null" if hint is type(None) else hint.__name__


def _build(section: type, tree: DictConfig, prefix: str = "") -> Any:
    """Returns the frozen section; `to_object` would not name the section in an error."""
    values = {}
    for name, hint in get_type_hints(section).items():
        key = prefix + name
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            values[name] = _build(hint, tree[name], f"{key}.")
        else:
            values[name] = _value(tree, name, key)
    try:
        return section(**values)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def _value(tree: DictConfig, name: str, key: str) -> object:
    if OmegaConf.is_missing(tree, name):
        return MANDATORY
    try:
        value = tree[name]
        return tuple(value) if isinstance(value, TupleConfig) else value
    except OmegaConfBaseException as error:
        raw = OmegaConf.to_container(tree, resolve=False)
        assert isinstance(raw, dict)
        fix = "the key it refers to is missing or of another type; name one of this type"
        raise UserError(f"{key}={raw[name]}: {fix}") from error


def _plain(value: Any) -> Any:
    """Returns lists for tuples, and text in which `${` no longer refers to another key."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return value
