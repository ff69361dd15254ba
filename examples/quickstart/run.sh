#!/usr/bin/env bash
# Trains a small policy with OREAL on two CPU cores: data, fine-tuning, OREAL, a table. `run.sh [seed]`
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
folder=runs/quickstart/seed_$seed
rm -rf "$folder"
mkdir -p "$folder"
# One thread a rank: the two ranks share the cores. Nothing calls home or looks for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

launch() {
  local command=$1
  shift
  torchrun --standalone --nproc-per-node 2 --no-python megatron-oreal "$command" \
    --config examples/quickstart/oreal.yaml run.seed="$seed" sft.path="$folder/data/sft.jsonl" \
    data.path="$folder/data/train.jsonl" evaluation.path="$folder/data/eval.jsonl" "$@"
}

echo "1/4 problems from reasoning-gym, worked out step by step"
python examples/quickstart/problems.py --out "$folder/data" --seed "$seed"
echo "2/4 a Qwen2 with random weights"
python examples/quickstart/make_model.py --out "$folder/model" --seed "$seed"
echo "3/4 supervised fine-tuning: Megatron on two ranks, TP=2"
launch sft model.path="$folder/model" run.folder="$folder/sft"
echo "4/4 OREAL: Megatron and a vLLM engine in each of the two ranks"
launch train model.path="$folder/sft/hf/final" run.folder="$folder/oreal"
