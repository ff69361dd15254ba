from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_oreal.config.errors import UserError
from megatron_oreal.config.load import load_config, resolve_config_yaml
from megatron_oreal.config.schema import Config, DataConfig, OptimizerConfig

PATHS = ["model.path=m", "data.path=d"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_files_in_order_then_overrides_win(tmp_path: Path) -> None:
    first = write(tmp_path / "a.yaml", "run: {seed: 1, name: a}\nsampling: {top_p: 0.5}\n")
    second = write(tmp_path / "b.yaml", "run:\n  seed: 2\n")
    config = load_config([first, second], [*PATHS, "run.name=c", "evaluation.pass_at=[1, 4]"])
    assert (config.run.seed, config.run.name, config.sampling.top_p) == (2, "c", 0.5)
    assert config.evaluation.pass_at == (1, 4)
    assert config.schedule.iterations == 90


def test_inherited_file_is_relative_to_the_file_and_read_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "parent.yaml", "run: {seed: 7, name: parent}\n")
    child = write(tmp_path / "sub" / "a.yaml", "run: {name: child}\ninherit: ../parent.yaml\n")
    config = load_config([child], PATHS)
    assert (config.run.seed, config.run.name) == (7, "child")


def test_a_value_may_refer_to_another_key() -> None:
    config = load_config([], [*PATHS, "run.name=x", "run.folder=out/${run.name}"])
    assert config.run.folder == "out/x"


def test_exponents_without_a_dot_are_numbers() -> None:
    assert load_config([], [*PATHS, "policy_optimizer.lr=5e-6"]).policy_optimizer.lr == 5e-6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("oreal.kl=k9", "oreal.kl=k9 (override): expected one of k1, k2, k3"),
        (
            "sampling.top_q=1",
            "sampling.top_q=1 (override): no such key; did you mean sampling.top_p?",
        ),
        (
            "kl_coefficient=1",
            "kl_coefficient=1 (override): no such key; did you mean oreal.kl_coefficient?",
        ),
        ("qqqqqq=1", "qqqqqq=1 (override): no such key; see configs/base.yaml"),
        (
            "oreal=3",
            "oreal=3 (override): a section; set its keys one by one, such as oreal.shaping",
        ),
        ("run.seed=abc", "run.seed=abc (override): expected int"),
        ("run.seed=true", "run.seed=True (override): expected int"),
        ("run.seed=1.5", "run.seed=1.5 (override): expected int"),
        ("run.seed=", "run.seed=null (override): expected int"),
        (
            "evaluation.max_questions=x",
            "evaluation.max_questions=x (override): expected int or null",
        ),
        ("evaluation.pass_at=[x]", "evaluation.pass_at=['x'] (override): expected a list of int"),
        ("run", "run: not an override; write section.key=value"),
        ("run.seed=[1,", "run.seed=[1,: the value is not YAML; put it in quotes"),
        ("policy_optimizer.lr=-1", "policy_optimizer.lr=-1.0: set a number above 0"),
        ("sft.optimizer.lr=.nan", "sft.optimizer.lr=nan: set a number above 0"),
        ("parallel.tensor=0", "parallel.tensor=0: set 1 or more"),
        ("sampling.top_p=1.5", "sampling.top_p=1.5: set a number above 0 and up to 1"),
        (
            "model.path=???",
            "model.path=???: has no default; set model.path=... or put it in a file",
        ),
        (
            "run.seed=${nope}",
            "run.seed=${nope}: the key it refers to is missing or of another type; "
            "name one of this type",
        ),
    ],
)
def test_bad_override_is_named_exactly(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([], [*PATHS, override])
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "end"),
    [
        (
            "run:\n  seed: [\n",
            ":3: malformed YAML: did not find expected node content; mend that line",
        ),
        (
            "run:\n  seed: 1\n  seed: 2\n",
            ":3: malformed YAML: found duplicate key seed; mend that line",
        ),
        ("- 1\n", ": holds a list; a config file holds sections of keys"),
        ("3\n", ": does not hold sections of keys; name a readable YAML file of sections"),
        ("a: \x00\n", ": not a YAML text file; name one of UTF-8 text"),
    ],
)
def test_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, end: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config([path], PATHS)
    assert str(caught.value) == f"{path}{end}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "oreal:\n",
            "oreal=null ({path}): a section; set its keys one by one, such as oreal.shaping",
        ),
        ("oreal: {klx: k1}\n", "oreal.klx=k1 ({path}): no such key; did you mean oreal.kl?"),
        ("inherit: 3\n", "inherit=3: {path} must name one file as text"),
        (
            "inherit: a.yaml\n",
            "inherit={path}: files inherit in a circle ({path} -> {path}); cut it",
        ),
    ],
)
def test_bad_key_in_a_file_is_named_with_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config([path], PATHS)
    assert str(caught.value) == message.format(path=path)


def test_a_file_cannot_make_python_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "run: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(UserError, match=r"a\.yaml:1: malformed YAML: could not determine a constr"):
        load_config([path], PATHS)


def test_missing_file_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yaml: No such file"):
        load_config([tmp_path / "no.yaml"], PATHS)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match=r"b\.yaml: not a YAML text file"):
        load_config([tmp_path / "b.yaml"], PATHS)


def test_keys_without_default_are_demanded_unless_optional() -> None:
    with pytest.raises(UserError, match=r"^data\.path=\?\?\?: has no default"):
        load_config([], ["model.path=m"])
    assert load_config([], ["model.path=m"], optional=["data.path"]).data.path == "???"


@settings(max_examples=30, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=30), st.floats(1e-12, 1.0))
def test_the_resolved_config_reads_back_equal(prompt: str, rate: float) -> None:
    config = replace(
        load_config([], PATHS),
        data=DataConfig(path="d", system_prompt=prompt),
        policy_optimizer=OptimizerConfig(lr=rate, min_lr=0.0),
    )
    assert reload(config) == config


@pytest.mark.parametrize(
    "prompt", ["${run.name}", r"\${a}", r"\\${a}", "$${", "${", "a: b", "0E0", "1e3", "null", "yes"]
)
def test_text_that_looks_like_something_else_reads_back_equal(prompt: str) -> None:
    config = replace(load_config([], PATHS), data=DataConfig(path="d", system_prompt=prompt))
    assert reload(config) == config


def reload(config: Config) -> Config:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "config.yaml", resolve_config_yaml(config))
        return load_config([path], [])
