"""A language model whose replies are known: each token names the next, by hand-set weights.

Its chat template looks at what is asked and ends the prompt in `<right>`, `<wrong>` or `<ramble>`;
the model then says one verdict, the other, or a word without end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

WINDOW = 1024
END = "<end>"
SAID = {"<right>": "VERDICT: CORRECT", "<wrong>": "VERDICT: INCORRECT", "<ramble>": "well"}
TOKENS = ["<unknown>", END, *SAID, *SAID.values()]
TEMPLATE = (
    "{{ messages[-1]['content'] }}"
    "{% if 'RIGHT' in messages[-1]['content'] %}<right>"
    "{% elif 'WRONG' in messages[-1]['content'] %}<wrong>"
    "{% else %}<ramble>{% endif %}"
)


def write_judge(folder: Path) -> None:
    """Writes weights, tokenizer and chat template as vLLM reads them."""
    vocabulary = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END, *SAID)])
    tokenizer.add_tokens([AddedToken(said) for said in SAID.values()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=TOKENS[0], eos_token=END, chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    _model(vocabulary).save_pretrained(folder)


def _model(vocabulary: dict[str, int]) -> Qwen2ForCausalLM:
    """Attention and MLP add nothing, so that a token's own embedding meets the head."""
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
    )
    model = Qwen2ForCausalLM(config)
    after = dict(SAID) | dict.fromkeys(SAID.values(), END) | {"well": "well"}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.ndim == 1 else 0.0)
        for token, number in vocabulary.items():
            model.model.embed_tokens.weight[number, number] = 1.0
            model.lm_head.weight[vocabulary[after.get(token, END)], number] = 10.0
    return model
