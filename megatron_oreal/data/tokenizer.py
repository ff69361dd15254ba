"""The model's own tokenizer: loading it, its stop token, and questions in its chat template."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from megatron_oreal.config.errors import UserError


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face folder, from its files alone, running none of its code.

    Raises:
        UserError: The folder is missing or holds no tokenizer that transformers knows.
    """
    if not Path(folder).is_dir():
        raise UserError(f"model.path={folder}: no such folder: name a Hugging Face model folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"model.path={folder}: no usable tokenizer ({reason:.200}): put the model's"
            " tokenizer.json and tokenizer_config.json there"
        ) from error


def stop_token_id(tokenizer: PreTrainedTokenizerBase, stop_token: str | None) -> int:
    """Returns the id of the token that ends a response; None asks for the tokenizer's eos_token.

    Raises:
        UserError: It is not one token of this vocabulary.
    """
    token = tokenizer.eos_token if stop_token is None else stop_token
    if token is None:
        raise UserError(
            "model.stop_token=null: the tokenizer declares no eos_token: name one of its tokens"
        )
    found = tokenizer.get_vocab().get(str(token))
    if found is None:
        raise UserError(
            f"model.stop_token={token}: not a token of the model's tokenizer: name one of its"
            f" tokens, such as {', '.join(tokenizer.all_special_tokens[:5]) or 'its end token'}"
        )
    return found


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a digest of every token and its id: token ids mean the same where it is the same."""
    entries = sorted(tokenizer.get_vocab().items())
    return hashlib.blake2b(repr(entries).encode(), digest_size=16).hexdigest()


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes]:
    """Returns the bytes of text that each id stands for, by id; none where there is no token.

    Byte-level vocabularies spell a byte as a letter, the others a blank as `▁` and a lone byte as
    `<0x0A>`. A token may hold a part of a character: joined bytes are UTF-8, single ones need not.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = "ByteLevel" in str(backend.decoder if backend else "")
    spelled = {letter: byte for byte, letter in bytes_to_unicode().items()} if byte_level else {}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return [_bytes_of(token or "", spelled if token not in added else None) for token in tokens]


def _bytes_of(token: str, spelled: dict[str, int] | None) -> bytes:
    """Returns a token's bytes; `spelled` is None of an added token, empty where not byte-level."""
    if spelled and all(letter in spelled for letter in token):
        return bytes(spelled[letter] for letter in token)
    if spelled is not None and re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    text = token if spelled is None else token.replace("▁", " ")
    return text.encode("utf-8", errors="replace")


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, system_prompt: str | None
) -> tuple[int, ...]:
    """Returns the ids of a question in the chat template, up to where the answer begins.

    Raises:
        UserError: The tokenizer has no chat template, or its template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            f"model.path={tokenizer.name_or_path}: its tokenizer has no chat template: add"
            " `chat_template` to tokenizer_config.json"
        )
    messages = [{"role": "user", "content": question}]
    if system_prompt is not None:
        messages.insert(0, {"role": "system", "content": system_prompt})
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except TemplateError as error:
        raise UserError(
            f"model.path={tokenizer.name_or_path}: its chat template fails"
            f" ({' '.join(str(error).split()):.200}): mend it, or set data.system_prompt=null if it"
            " takes no system role"
        ) from error
    return tuple(tokenizer.encode(str(text), add_special_tokens=False))
