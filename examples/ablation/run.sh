#!/usr/bin/env bash
# The ladder of ablations from one fine-tuned policy, over several seeds. `run.sh [start] [seed ...]`
# start: the sft/hf/final of a quickstart folder, whose data is used too. What has ended is not run again.
set -euo pipefail
cd "$(dirname "$0")/../.."
start=$(realpath "${1:-runs/quickstart/seed_0/sft/hf/final}")
seeds=("${@:2}")
((${#seeds[@]})) || seeds=(0 1 2 3 4)
here=examples/ablation
runs=${RUNS:-runs/ablation}
folder=${start%/sft/hf/final} # launch.sh finds the data there
[[ -e $start/config.json && -e $folder/data/train.jsonl ]] || {
  echo "run.sh: $start is no sft/hf/final of a quickstart folder; run examples/quickstart/run.sh first" >&2
  exit 1
}
source examples/quickstart/launch.sh

for seed in "${seeds[@]}"; do
  for CONFIG in $here/[1-9]_*.yaml; do
    run=$runs/$(basename "$CONFIG" .yaml)/seed_$seed
    [[ -e $run/summary.json ]] && continue
    echo "== $run"
    rm -rf "$run"
    launch train model.path="$start" run.folder="$run"
  done
  # What is there so far: a seed more with every turn.
  python $here/plot.py "$runs"
done
