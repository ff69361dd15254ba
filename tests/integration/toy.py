"""A model folder of a few hundred kilobytes and questions it can half answer, made from a seed.

A question is a sum of two digits, its answer 1 if the sum is odd and 0 if it is even. A few steps
of fine-tuning teach the form of an answer long before the rule, so about half of all samples are
right: the questions are neither solved nor failed throughout, which is what training needs.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.integration.commands import alone

PAD, STOP, USER, ASSISTANT = "<pad>", "<end>", "<user>", "<assistant>"
CHARACTERS = "0123456789+\\boxed{}"
VOCABULARY = {
    token: i for i, token in enumerate(dict.fromkeys([PAD, STOP, USER, ASSISTANT, *CHARACTERS]))
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
  {{- '<user>' if message['role'] == 'user' else '<assistant>' -}}
  {{- message['content'] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<assistant>' -}}
{%- endif -%}
"""
WINDOW = 32
# Four heads and two key-value heads: tensor parallelism 4 has to hold copies of the latter.
SHAPE = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "eos_token_id": VOCABULARY[STOP],
    "pad_token_id": VOCABULARY[PAD],
    "bos_token_id": None,
}


def make(root: Path) -> None:
    """`model/`, `questions.jsonl`, `held_out.jsonl` and `demonstrations.jsonl` in `root`."""
    save_model(root / "model")
    save_data(root)


def fine_tune(root: Path) -> Path:
    """Teaches the toy of `root` the form of an answer, and returns the model's folder."""
    chosen = settings(root, "sft", monitor__wandb="disabled", engine__tokens_per_micro_batch=1024)
    finished = alone("sft", *chosen)
    if finished.status != 0:
        raise RuntimeError(finished.stderr)
    return root / "sft" / "hf" / "final"


def save_model(folder: Path, **shape: Any) -> None:
    """An untrained Qwen2 and its tokenizer; `shape` differs from `SHAPE`."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=STOP,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPE | shape)).save_pretrained(folder)


def save_data(folder: Path) -> None:
    """`questions.jsonl`, `held_out.jsonl` and `demonstrations.jsonl`."""
    rng = random.Random(0)
    sums = [(a, b) for a in range(10) for b in range(10)]
    rng.shuffle(sums)
    questions = [{"question": f"{a}+{b}", "gold_answer": str((a + b) % 2)} for a, b in sums]
    write_lines(folder / "held_out.jsonl", questions[:16])
    write_lines(folder / "questions.jsonl", questions[16:])
    # Answers at random: the form is learnt, the rule cannot be.
    write_lines(
        folder / "demonstrations.jsonl",
        [
            {"question": question["question"], "response": f"\\boxed{{{rng.randrange(2)}}}"}
            for question in questions[16:]
            for _ in range(16)
        ],
    )


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def settings(root: Path, run: str, model: Path | None = None, **more: Any) -> list[str]:
    """The command line's `key=value` of a run of this toy in `root/run`; `more` wins.

    In `more` a double underscore stands for the dot: `schedule__iterations=3`.
    """
    chosen = {
        "run.folder": root / run,
        "model.path": model or root / "model",
        "model.precision": "fp32",
        "data.path": root / "questions.jsonl",
        "data.questions_per_iteration": 8,
        "sampling.samples_per_question": 8,
        "sampling.max_new_tokens": 16,
        "sampling.max_total_tokens": WINDOW,
        "engine.tokens_per_micro_batch": 128,
        "engine.head_chunk_tokens": 16,
        "rollout.enforce_eager": "true",
        "rollout.max_sequences": 64,
        "evaluation.path": root / "held_out.jsonl",
        "schedule.warmup_iterations": 1,
        "policy_optimizer.lr": 1e-3,
        "policy_optimizer.min_lr": 1e-4,
        "token_rm_optimizer.lr": 1e-3,
        "token_rm_optimizer.min_lr": 1e-4,
        "sft.path": root / "demonstrations.jsonl",
        "sft.sequences_per_step": 32,
        "sft.warmup_steps": 2,
        "sft.optimizer.lr": 3e-3,
        "sft.optimizer.min_lr": 3e-4,
    } | {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in chosen.items()]
