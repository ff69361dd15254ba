"""Makes the quickstart's model: a Qwen2 of two and a half million parameters with random weights.

Its tokenizer knows the characters of arithmetic and four marks; a conversation is
`<user>12 + 34<assistant>`, and a response ends in `<end>`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

MARKS = ("<pad>", "<end>", "<user>", "<assistant>")
CHARACTERS = "0123456789+-*=;{}\\boxed "
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Builds a tokenizer of single characters that turns any text of the task into ids and back."""
    vocabulary = {token: number for number, token in enumerate((*MARKS, *CHARACTERS))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=MARKS[0],
        eos_token=MARKS[1],
        additional_special_tokens=list(MARKS[2:]),
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """Draws the weights from the seed."""
    torch.manual_seed(seed)
    ids = tokenizer.get_vocab()
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=ids[MARKS[0]],
            eos_token_id=ids[MARKS[1]],
            bos_token_id=None,
        )
    )


def main() -> None:
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    options = parser.parse_args()
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(options.out)
    model = make_model(tokenizer, options.seed)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(options.out)


if __name__ == "__main__":
    main()
