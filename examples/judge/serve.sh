#!/usr/bin/env bash
# One server of OpenAI's protocol on this node; run.sbatch starts it on each.
set -euo pipefail
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
[[ -n ${VLLM_API_KEY:-} ]] || unset VLLM_API_KEY

# Eight heads of keys and values: one a GPU. A question with its answer is below 8,000 tokens. All questions begin
# alike, so that the prefix cache, on by default, spares their instructions. Sampling is what the judge asks for, not
# what the checkpoint's generation_config.json says.
serve=(vllm serve "$MODEL" --served-model-name judge --host 0.0.0.0 --port "$PORT"
  --tensor-parallel-size "${SLURM_GPUS_ON_NODE:-8}" --max-model-len 8192 --generation-config vllm "$@")
if [[ -n ${SIF:-} ]]; then
  exec apptainer exec --nv --pwd "$PWD" --bind "$PWD,$MODEL${MOUNTS:+,$MOUNTS}" "$SIF" "${serve[@]}"
fi
if [[ -n ${VENV:-} ]]; then
  # shellcheck disable=SC1091
  source "$VENV/bin/activate"
fi
exec "${serve[@]}"
