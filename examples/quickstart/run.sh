#!/usr/bin/env bash
# Trains a small policy with OREAL on two CPU cores: data, fine-tuning, OREAL, a table. `run.sh [seed] [key=value ...]`
# Started again after an interruption, it goes on where it was. RUNS names another folder than runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
folder=${RUNS:-runs/quickstart}/seed_$seed
source examples/quickstart/launch.sh
trap 'echo "interrupted: the same command goes on from here" >&2; exit 130' INT

make_once() {
  local made=$1
  shift
  [[ -e $made ]] && return
  rm -rf "$made.part"
  python "$@" --out "$made.part" --seed "$seed"
  mv "$made.part" "$made"
}

mkdir -p "$folder"
echo "1/4 problems from reasoning-gym, worked out step by step"
make_once "$folder/data" examples/quickstart/problems.py
echo "2/4 a Qwen2 with random weights"
make_once "$folder/model" examples/quickstart/make_model.py
echo "3/4 supervised fine-tuning: Megatron on two ranks, TP=2"
[[ -e $folder/sft/summary.json ]] || launch sft model.path="$folder/model" run.folder="$folder/sft" "${@:2}"
echo "4/4 OREAL: Megatron and a vLLM engine in each of the two ranks"
bash examples/quickstart/train.sh "$seed" "${@:2}"
