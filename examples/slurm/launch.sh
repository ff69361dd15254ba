# shellcheck shell=bash
# Sourced by the run.sbatch files, from the repository's root: `launch COMMAND [arguments ...]` starts one rank of
# `megatron-oreal COMMAND` a task, hands the batch script's signals on, and requeues the job where it was stopped.
# In logs/<job>: rank_<n>.log of each rank, and all.log, the lines of all of them, labelled, in the order they came.
#
# Where the software is, one of (docs/containers.md):
#   VENV=/path/to/venv                 a virtual environment on a file system that all nodes see
#   CONTAINER_IMAGE=/path/to/img.sqsh  an image for pyxis and enroot
#   SIF=/path/to/img.sif               an image for Apptainer or Singularity
# MOUNTS names folders outside the repository that a container has to see, separated by commas.

REQUEUE_STATUS=75 # of a run that a signal stopped, after a checkpoint

# What every rank is told. Each line may be overridden by what `sbatch --export` hands over.
set_variables() {
  # Launches stay in order, so that Megatron's communication overlaps with what it was meant to.
  export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
  # Packed micro-batches differ in length: segments that grow leave fewer holes between them.
  export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
  # Errors are written, the hundreds of lines that each communicator says of itself are not; INFO shows which network
  # was taken (look for "via NET/IB").
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # NVLink SHARP takes memory for each communicator, and Megatron has many; engine and trainer share the GPU.
  export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
  # If ranks wait for each other for ever at the start, name the interface of the cluster's own network here: both
  # libraries may have chosen one that other nodes cannot reach.
  #   export NCCL_SOCKET_IFNAME=bond0 GLOO_SOCKET_IFNAME=bond0
  # If NCCL_DEBUG=INFO shows a card that carries storage, name those that carry GPUs.
  #   export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

  # One thread a rank: the verifier's processes use the other cores.
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  # Log lines come when they are written; a crash says where it was.
  export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
  # Nodes rarely have a way out, and looking for one costs minutes.
  export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
}

# Ranks find each other at the first node; the port follows the job, so that two jobs of one node do not meet.
set_rendezvous() {
  local first
  first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR=${MASTER_ADDR:-$first}
  export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
}

# What vLLM, Triton and torch compile goes to each node's own disk: hundreds of ranks would otherwise lock and read the
# same small files on the shared one. It outlives the job: the next one of the same user starts sooner. Where jobs meet
# other nodes each time, name a folder that all nodes see: NODE_CACHE=/shared/cache. Other versions have other folders.
set_caches() {
  export MEGATRON_OREAL_CACHE=${NODE_CACHE:-/tmp/$USER/megatron-oreal}
}

# In a heterogeneous job the nodes of the second component serve the judge JUDGE_MODEL, a server each, for this job
# alone; `judge_settings` then says where. One that dies leaves the others.
start_judge() {
  local logs=$1 node hosts=""
  export PORT=${JUDGE_PORT:-$((40000 + SLURM_JOB_ID % 20000))}
  # With JUDGE_KEY=... the servers answer only those who know it; without, whoever reaches the port.
  MODEL=${JUDGE_MODEL:?a Hugging Face folder of the judge} VLLM_API_KEY=${JUDGE_KEY:-} \
    VLLM_CACHE_ROOT=$MEGATRON_OREAL_CACHE/judge srun --het-group=1 --kill-on-bad-exit=0 --open-mode=append "--output=$logs/judge_%t.log" "${in_container[@]}" bash examples/judge/serve.sh &
  judge=$!
  for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_1"); do
    node=${JUDGE_ADDRESS:-$node}
    until curl --silent --fail --max-time 5 --output /dev/null "http://$node:$PORT/health"; do
      kill -0 "$judge" 2>/dev/null || {
        echo "the judge's servers ended before they answered: see $logs/judge_*.log" >&2
        return 1
      }
      sleep 2
    done
    hosts+=${hosts:+,}http://$node:$PORT/v1
  done
  judge_settings=("judge.hosts=[$hosts]" judge.model=judge)
  [[ -z ${JUDGE_KEY:-} ]] || judge_settings+=(judge.api_key_variable=JUDGE_KEY)
  echo "$(date '+%F %T') the judge answers at $hosts"
}

launch() {
  set_variables
  set_rendezvous
  set_caches
  # srun takes this from the batch script no longer since Slurm 22.05.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  local logs=${LOGS:-logs}/$SLURM_JOB_ID
  mkdir -p "$logs"
  local in_container=() judge="" judge_settings=()
  if [[ -n ${CONTAINER_IMAGE:-} ]]; then
    in_container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD")
    in_container+=("--container-mounts=$PWD:$PWD${MOUNTS:+,$MOUNTS}")
  fi
  # A rank that dies takes the others along, which would wait for it until their time-out, but five minutes later: not
  # --kill-on-bad-exit, which ends the ranks that are still on their way to REQUEUE_STATUS. A restart appends.
  # Each rank has a log of its own; srun writes the lines of all of them, labelled, as they come.
  local options=(--wait=300 --label --open-mode=append "--output=$logs/all.log" "${in_container[@]}")
  if ((${SLURM_HET_SIZE:-1} > 1)); then
    start_judge "$logs"
    options+=(--het-group=0)
  fi
  echo "$(date '+%F %T') $SLURM_JOB_ID: $SLURM_NTASKS ranks on $SLURM_JOB_NUM_NODES nodes, logs in $logs"
  srun "${options[@]}" bash examples/slurm/rank.sh "$logs" "$@" "${judge_settings[@]}" &
  local step=$!
  # Slurm signals this script alone (--signal=B:...), before the time limit and before a pre-emption; srun hands it on
  # to every rank. They finish their iteration, save, and end with REQUEUE_STATUS.
  trap 'echo "$(date "+%F %T") asked to stop"; kill -USR1 '"$step" USR1
  # A job that is cancelled gets TERM here and in every rank, and is not to come back by itself.
  local cancelled=0
  trap 'echo "$(date "+%F %T") cancelled"; cancelled=1' TERM
  local status=0
  wait "$step" || status=$?
  while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not srun
    status=0
    wait "$step" || status=$?
  done
  echo "$(date '+%F %T') ended with status $status"
  if ((status == REQUEUE_STATUS && !cancelled)); then
    scontrol requeue "$SLURM_JOB_ID"
  elif [[ -n $judge ]]; then
    kill "$judge" 2>/dev/null || true # nobody asks it any more
  fi
  return "$status"
}
