"""Rules of the house that no linter knows."""

from __future__ import annotations

import ast
from itertools import chain
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PRODUCT = sorted(
    path
    for folder in ("megatron_oreal", "tools", "examples")
    for path in (ROOT / folder).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
MAX_LINES = 400


def named(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def test_product_files_are_short() -> None:
    assert PRODUCT
    assert not named([p for p in PRODUCT if len(p.read_text().splitlines()) > MAX_LINES])


def test_scripts_of_the_report_are_short() -> None:
    scripts = list((ROOT / "megatron_oreal").rglob("static/*.js"))
    assert scripts
    assert not named([p for p in scripts if len(p.read_text().splitlines()) > MAX_LINES])


def test_package_initialisers_are_empty() -> None:
    assert not named([p for p in PRODUCT if p.name == "__init__.py" and p.read_text()])


def test_every_folder_of_the_package_is_one() -> None:
    folders = {path.parent for path in PRODUCT if path.is_relative_to(ROOT / "megatron_oreal")}
    assert not named(
        [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    )


def test_nothing_is_imitated() -> None:
    word = "mo" + "ck"
    assert not named([path for path in TESTS if word in path.read_text().lower()])


def imported_modules(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    direct = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return direct | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}


def test_the_product_does_not_import_its_tests() -> None:
    guilty = [p for p in PRODUCT if any(m.split(".")[0] == "tests" for m in imported_modules(p))]
    assert not named(guilty)


def literal(path: Path, name: str) -> Any:
    """Returns the literal that a module assigns to `name`, without running the module."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def test_the_lock_satisfies_setup() -> None:
    extras = literal(ROOT / "setup.py", "EXTRAS")
    on_a_cpu = [extras[name] for name in ("cpu", "quickstart", "dev")]
    always = literal(ROOT / "setup.py", "REQUIRED")
    wanted = [Requirement(text) for text in chain(always, *on_a_cpu)]
    lines = (ROOT / "cpu-lock.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    locked = {canonicalize_name(name): version for name, version in pins}
    assert len(locked) == len(pins)
    for requirement in wanted:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), (requirement, version)
