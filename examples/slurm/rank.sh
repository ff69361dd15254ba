#!/usr/bin/env bash
# One rank: Slurm's variables become those that torch knows, then `megatron-oreal` takes this process over, so that
# signals reach it.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID

if [[ -n ${SIF:-} ]]; then
  exec apptainer exec --nv --pwd "$PWD" --bind "$PWD${MOUNTS:+,$MOUNTS}" "$SIF" megatron-oreal "$@"
fi
if [[ -n ${VENV:-} ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
exec megatron-oreal "$@"
