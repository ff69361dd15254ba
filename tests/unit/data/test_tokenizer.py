from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from megatron_oreal.config.errors import UserError
from megatron_oreal.data.tokenizer import (
    load_tokenizer,
    render_prompt,
    stop_token_id,
    token_bytes,
)

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase


def test_prompt_ends_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = render_prompt(tokenizer, "1+1", None)
    # ids: 4 special tokens, then the printable characters from the blank (32) on.
    letters = [4 + ord(c) - 32 for c in "u:1+1"]
    assert tokens == (2, *letters, 3, 2, *(4 + ord(c) - 32 for c in "a:"))


def test_system_prompt_comes_first(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(render_prompt(tokenizer, "q", "S")))
    assert "".join(tokens) == "<|im_start|>s:S<|im_end|><|im_start|>u:q<|im_end|><|im_start|>a:"


def test_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    assert stop_token_id(tokenizer, "<|im_end|>") == 3
    assert stop_token_id(tokenizer, None) == 3  # its eos_token


@pytest.mark.parametrize("missing", ["</s>", "ab", ""])
def test_stop_token_must_be_one_token(tokenizer: PreTrainedTokenizerBase, missing: str) -> None:
    with pytest.raises(UserError, match=r"model\.stop_token=.*not a token.*<\|im_end\|>"):
        stop_token_id(tokenizer, missing)


def test_no_end_token_at_all(tokenizer_folder: Path) -> None:
    endless = load_tokenizer(tokenizer_folder)
    endless.eos_token = None
    with pytest.raises(UserError, match=r"model\.stop_token=null.*name one"):
        stop_token_id(endless, None)


def test_no_chat_template(tokenizer_folder: Path) -> None:
    bare = load_tokenizer(tokenizer_folder)
    bare.chat_template = None
    with pytest.raises(UserError, match=r"model\.path=.*chat template.*tokenizer_config"):
        render_prompt(bare, "q", None)


def test_template_that_refuses_system_prompts(tokenizer_folder: Path) -> None:
    strict = load_tokenizer(tokenizer_folder)
    strict.chat_template = "{{ raise_exception('no system\nrole') }}"
    with pytest.raises(UserError, match=r"model\.path=.*no system role.*=null") as caught:
        render_prompt(strict, "q", "S")
    assert "\n" not in str(caught.value)


def test_template_may_not_reach_python(tokenizer_folder: Path) -> None:
    hostile = load_tokenizer(tokenizer_folder)
    hostile.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(UserError, match="unsafe"):
        render_prompt(hostile, "q", None)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path=.*no such folder"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"tokenizer.json": "{"},
        {"tokenizer.json": "[]", "tokenizer_config.json": "{}"},
        {"tokenizer.json": '{"model": 3}', "tokenizer_config.json": "not json"},
        {"tokenizer_config.json": '{"tokenizer_class": "NoSuchTokenizer"}'},
    ],
)
def test_unusable_folder(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"model\.path=.*no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_in_the_folder_is_not_run(tokenizer_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tokenizer_folder, tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = folder / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace("{", '{"auto_map": {"AutoTokenizer": ["evil.T", null]},', 1)
    )
    assert load_tokenizer(folder).eos_token == "<|im_end|>"


def words(*tokens: str, decoder: object) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}))
    raw.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|e▁nd|>")


def test_bytes_of_byte_level_tokens() -> None:
    found = token_bytes(words("Ġa", "Ã", "©Ċ", decoder=decoders.ByteLevel()))
    assert found == [b" a", b"\xc3", b"\xa9\n", "<|e▁nd|>".encode()]


def test_bytes_of_sentencepiece_tokens() -> None:
    found = token_bytes(words("▁a", "<0xC3>", "é", decoder=decoders.ByteFallback()))
    assert found == [b" a", b"\xc3", "é".encode(), "<|e▁nd|>".encode()]


def test_bytes_of_whole_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert token_bytes(tokenizer)[:6] == [
        *(b"<pad>", b"<unk>", b"<|im_start|>", b"<|im_end|>"),
        *(b" ", b"!"),
    ]
