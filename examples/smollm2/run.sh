#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct with OREAL: model, questions, training, a table and a plot. `run.sh [seed] [key=value ...]`
# Started again after an interruption, it goes on where it was. PIECE_S=500 ends it after so many seconds, saved, with status 75.
# CONFIG names another file than oreal.yaml, RUNS another folder than runs/smollm2, MODEL another checkpoint than RUNS/model.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/smollm2
seed=${1:-0}
runs=${RUNS:-runs/smollm2}
model=${MODEL:-$runs/model}
folder=$runs/seed_$seed
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap 'echo "interrupted: the same command goes on from here" >&2; exit 130' INT

mkdir -p "$folder"
[[ -e $model ]] || python $here/prepare.py "$model"
if [[ ! -e $folder/data ]]; then
  rm -rf "$folder/data.part"
  python $here/problems.py --out "$folder/data.part" --seed "$seed"
  mv "$folder/data.part" "$folder/data"
fi
status=0
if [[ ! -e $folder/oreal/summary.json ]]; then
  timeout --foreground --preserve-status --signal USR1 "${PIECE_S:-0}" \
    megatron-oreal train --config "${CONFIG:-$here/oreal.yaml}" model.path="$model" run.folder="$folder/oreal" run.seed="$seed" \
    data.path="$folder/data/train.jsonl" evaluation.path="$folder/data/eval.jsonl" "${@:2}" || status=$?
fi
[[ ! -e $folder/oreal/metrics.jsonl ]] || python $here/plot.py "$folder/oreal"
exit $status
