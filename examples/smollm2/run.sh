#!/usr/bin/env bash
# Trains SmolLM2-135M-Instruct with OREAL: model, questions, training, a table and a plot. `run.sh [seed] [key=value ...]`
# Started again after an interruption, it goes on where it was. PIECE_S=500 ends it after so many seconds, saved, with status 75.
# CONFIG names another file than oreal.yaml, RUNS another folder than runs/smollm2, MODEL another checkpoint than RUNS/model; POOL and
# HELD_OUT are how many questions are rated and held out.
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/smollm2
seed=${1:-0}
runs=${RUNS:-runs/smollm2}
model=${MODEL:-$runs/model}
folder=$runs/seed_$seed
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
trap 'echo "interrupted: the same command goes on from here" >&2; exit 130' INT
settings=(--config "${CONFIG:-$here/oreal.yaml}" "model.path=$model" "run.seed=$seed" "${@:2}")

piece() { # what is left of PIECE_S, all that it takes without; a start alone, which no signal can end well, is not begun
  local left=0
  if ((${PIECE_S:-0})); then
    left=$((PIECE_S - SECONDS))
    ((left > 30)) || { echo "nothing is left of this piece: call it again"; return 75; }
  fi
  timeout --foreground --preserve-status --signal USR1 "$left" "$@"
}

mkdir -p "$folder"
[[ -e $model ]] || python $here/prepare.py "$model"
if [[ ! -e $folder/data ]]; then
  [[ -e $folder/pool.jsonl ]] || python $here/problems.py pool --out "$folder/pool.jsonl" --seed "$seed" --size "${POOL:-12000}"
  piece python tools/estimate_pass_rates.py "${settings[@]}" data.path="$folder/pool.jsonl" run.folder="$folder/rates" \
    data.questions_per_iteration=256 evaluation.at_start=false evaluation.at_end=false --output "$folder/rated.jsonl"
  python $here/problems.py choose --rated "$folder/rated.jsonl" --out "$folder/data.part" --seed "$seed" --held-out "${HELD_OUT:-500}"
  mv "$folder/data.part" "$folder/data"
fi
status=0
if [[ ! -e $folder/oreal/summary.json ]]; then
  piece megatron-oreal train "${settings[@]}" run.folder="$folder/oreal" \
    data.path="$folder/data/train.jsonl" evaluation.path="$folder/data/eval.jsonl" || status=$?
fi
[[ ! -e $folder/oreal/metrics.jsonl ]] || python $here/plot.py "$folder/oreal"
exit $status
