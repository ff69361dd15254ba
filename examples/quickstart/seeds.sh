#!/usr/bin/env bash
# The quickstart on three seeds, each with a control that starts from the same policy. `seeds.sh [seed ...]`
set -euo pipefail
cd "$(dirname "$0")/../.."
here=examples/quickstart
seeds=("$@")
((${#seeds[@]})) || seeds=(0 1 2)

for seed in "${seeds[@]}"; do
  echo "== seed $seed: OREAL"
  bash $here/run.sh "$seed"
  echo "== seed $seed: the control, plain cloning of the correct samples"
  CONFIG=$here/cloning.yaml NAME=cloning bash $here/train.sh "$seed"
done
python $here/table.py runs/quickstart/seed_*
