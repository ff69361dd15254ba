# Sourced: `launch COMMAND key=value ...` starts two ranks of it on this machine's CPU for $seed in $folder.
# One thread a rank: the two ranks share the cores. Nothing calls home or looks for a hub.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1

launch() {
  local command=$1
  shift
  torchrun --standalone --nproc-per-node 2 --no-python megatron-oreal "$command" \
    --config "${CONFIG:-examples/quickstart/oreal.yaml}" run.seed="$seed" sft.path="$folder/data/sft.jsonl" \
    data.path="$folder/data/train.jsonl" evaluation.path="$folder/data/eval.jsonl" "$@"
}
