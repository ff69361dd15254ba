#!/usr/bin/env bash
# Trains from the fine-tuned policy of a seed: `[CONFIG=file] [NAME=folder] train.sh [seed] [key=value ...]`
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=${1:-0}
folder=${RUNS:-runs/quickstart}/seed_$seed
source examples/quickstart/launch.sh
launch train model.path="$folder/sft/hf/final" run.folder="$folder/${NAME:-oreal}" "${@:2}"
