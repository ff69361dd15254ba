#!/usr/bin/env bash
# One rank: Slurm's variables become those that torch knows, then `megatron-oreal` runs, its lines into the rank's own
# log in the folder given first, and on to srun, which labels and merges them.
set -uo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
log=$1/rank_$SLURM_PROCID.log
shift

command=(megatron-oreal "$@")
if [[ -n ${SIF:-} ]]; then
  command=(apptainer exec --nv --pwd "$PWD" --bind "$PWD${MOUNTS:+,$MOUNTS}" "$SIF" "${command[@]}")
elif [[ -n ${VENV:-} ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
# Slurm signals every process of a rank: this one waits for `megatron-oreal`, which saves the run, and for its last line.
trap : USR1 TERM
"${command[@]}" 2>&1 | (
  trap '' USR1 TERM
  exec tee --append "$log"
)
exit "${PIPESTATUS[0]}"
