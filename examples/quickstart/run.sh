#!/usr/bin/env bash
# Trains a small policy with OREAL on two CPU cores: data, fine-tuning, OREAL, a table. `run.sh [seed]`
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
folder=runs/quickstart/seed_$seed
source examples/quickstart/launch.sh
rm -rf "$folder"
mkdir -p "$folder"

echo "1/4 problems from reasoning-gym, worked out step by step"
python examples/quickstart/problems.py --out "$folder/data" --seed "$seed"
echo "2/4 a Qwen2 with random weights"
python examples/quickstart/make_model.py --out "$folder/model" --seed "$seed"
echo "3/4 supervised fine-tuning: Megatron on two ranks, TP=2"
launch sft model.path="$folder/model" run.folder="$folder/sft"
echo "4/4 OREAL: Megatron and a vLLM engine in each of the two ranks"
bash examples/quickstart/train.sh "$seed"
