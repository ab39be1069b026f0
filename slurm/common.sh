# What every job script shares: topology, port, environment, the check before the first step, restarts, requeueing.
# Sourced on the first node of the job. What can be set from outside (sbatch hands the environment on):
#   SFTRL_HOME        the repository, when sbatch is not started at its root
#   SFTRL_CONFIG      another YAML file than the script's own
#   SFTRL_PYTHON      interpreter (python; the repository's .venv comes first on the PATH where it exists)
#   SFTRL_PROCESSES   processes per node (the GPUs that Slurm gave to the node)
#   SFTRL_LOGS        directory shared by all nodes; the logs of a job are in its NAME-JOBID (runs/slurm)
#   SFTRL_CONTAINER   image for pyxis/enroot: a .sqsh file, or a name in a registry
#   SFTRL_MOUNTS      more mounts SOURCE:TARGET,...; the repository and the working directory are mounted
#   SFTRL_INTERFACE   network interface of bootstrap connections, on hosts with several
#   SFTRL_PREFLIGHT   0: without `sftrl preflight` in front of a job's first step
#   SFTRL_RESTARTS    restarts of all ranks inside a step after one was lost (2)
#   SFTRL_ATTEMPTS    steps in a row that may begin at the same checkpoint, requeued jobs included (3); also how
#                     often the checks in front of them may fail for a reason that may pass
set -u

say() { printf '%s %s: %s\n' "$(date +%FT%T)" "${SLURM_JOB_NAME:-slurm}" "$*" >&2; }
refuse() { say "error: $*"; exit 2; }

# train KIND CONFIG [key=value ...]: check, then steps until the run is finished.
train() {
  local kind=$1 config=$2
  [ -r "$config" ] || refuse "no configuration $config in $PWD: set SFTRL_CONFIG"
  # Unmaps what fragments; vLLM's sleeping memory pool does not work with it.
  [ "$kind" = grpo ] || export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}"
  prepare
  passes step --label "$python" "$home/slurm/check_node.py" "$logs" "$processes" "$@" || stop_or "refused, see above"
  [ "${SFTRL_PREFLIGHT:-1}" = 0 ] || SFTRL_RESTARTS=0 passes launch -m megatron_sftrl preflight "${@:2}" \
    || stop_or "preflight did not pass, see $logs/node-*.log"
  while true; do
    count_attempt
    launch -m megatron_sftrl "$@"
    code=$?
    [ ! -e "$logs/refused" ] || refuse "the run was refused, see $logs/node-*.log"
    [ "$code" != 0 ] || [ -e "$logs/stopped" ] || { say "finished"; exit 0; }
    ! must_leave || requeue
    [ ! -e "$logs/stopped" ] || { say "stopped by a signal, the checkpoint is written"; exit 75; }
    say "the step ended with code $code: starting again from the last checkpoint"
  done
}

# run_tool FILE [ARGUMENT ...]: a program of tools/ under torchrun, once.
run_tool() {
  local tool=$1
  shift
  prepare
  passes step --label "$python" "$home/slurm/check_node.py" "$logs" "$processes" || stop_or "refused, see above"
  SFTRL_RESTARTS=0 launch "$home/tools/$tool" "$@"
  code=$?
  [ ! -e "$logs/refused" ] || refuse "refused, see $logs/node-*.log"
  say "ended with code $code, logs in $logs"
  exit "$code"
}

# passes CHECK...: again when it fails for a reason that may pass; what it refuses it notes as `refused`.
passes() {
  local attempt code
  for ((attempt = 1; attempt <= ${SFTRL_ATTEMPTS:-3}; attempt++)); do
    rm -f "$logs/refused"
    "$@" && return 0
    code=$?
    if [ -e "$logs/refused" ] || must_leave; then return "$code"; fi
    say "a check ended with code $code, which may pass: attempt $attempt of ${SFTRL_ATTEMPTS:-3}"
  done
  return "$code"
}

prepare() {
  [ -n "${SLURM_JOB_ID:-}" ] || refuse "this is no Slurm job: start it with sbatch"
  local parts=${SLURM_HET_SIZE:-${SLURM_PACK_SIZE:-1}}
  [ "$parts" = 1 ] || refuse "this is a heterogeneous job of $parts parts, and a run would see the nodes of the first" \
    "alone: ask for all nodes in one part, without ':' (sbatch --nodes=N)"
  home="${SFTRL_HOME:-$SLURM_SUBMIT_DIR}"
  logs="${SFTRL_LOGS:-$PWD/runs/slurm}/$SLURM_JOB_NAME-$SLURM_JOB_ID"
  # GPUS_ON_NODE counts all of an exclusive node; GPUS_PER_NODE, "8" or "h100:8", is what was asked for.
  processes="${SFTRL_PROCESSES:-${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}}"
  processes="${processes##*:}"
  python="${SFTRL_PYTHON:-python}"
  is_ending='' running=''
  [ -n "$processes" ] || refuse "no GPUs on $(hostname): ask for them (--gpus-per-node=8), or set SFTRL_PROCESSES"
  mkdir -p "$logs" || refuse "cannot write logs to $logs: set SFTRL_LOGS to a directory that all nodes share"
  [ ! -d "$home/.venv/bin" ] || export PATH="$home/.venv/bin:$PATH"
  trap end_is_near USR1
  trap : TERM  # Slurm sends it to the ranks as well, and they write a checkpoint; this shell waits for them
  environment
  topology
  container
}

topology() {
  local name address
  addresses=
  SFTRL_LAUNCH_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | xargs)
  export SFTRL_LAUNCH_NODES
  for name in $SFTRL_LAUNCH_NODES; do
    # Slurm's own address of the node: its name need not resolve, least of all inside a container.
    address=$(scontrol show node "$name" --oneliner | grep -o 'NodeAddr=[^ ]*')
    addresses="$addresses ${address#NodeAddr=}"
  done
  read -r head _ <<< "$addresses"
  # One task per node, with all of its CPUs: Slurm would bind a task, and with it all ranks, to one CPU.
  task=(srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 --kill-on-bad-exit=1
    --cpus-per-task="$SLURM_CPUS_ON_NODE")
}

container() {
  [ -n "${SFTRL_CONTAINER:-}" ] || return 0
  case "$SFTRL_CONTAINER" in
    /* | ./* | *.sqsh) [ -e "$SFTRL_CONTAINER" ] || refuse "container image $SFTRL_CONTAINER does not exist" ;;
  esac
  srun --help | grep -q -e --container-image \
    || refuse "SFTRL_CONTAINER is set, but srun knows no --container-image: this cluster has no pyxis"
  local mounts="$home:$home,$PWD:$PWD,$logs:$logs${SFTRL_MOUNTS:+,$SFTRL_MOUNTS}"
  task+=(--container-image="$SFTRL_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD")
}

environment() {
  export PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
  export PYTHONFAULTHANDLER=1  # a rank that a signal ends (NCCL's watchdog aborts) prints its stacks
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
  # Compute nodes rarely reach a hub: a wrong path is an error now, not after minutes of retries.
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 VLLM_NO_USAGE_STATS=1
  # Kernels run in the order in which they were launched; Megatron's overlap with tensor parallelism needs it.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  # InfiniBand gives a packet up after 4.096 us * 2^22 = 17 s: a fabric that reroutes takes more than the 4 s of 20.
  export NCCL_IB_TIMEOUT="${NCCL_IB_TIMEOUT:-22}"
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"  # names the link that failed
  # The last collectives of each rank, written when one times out: they tell who was missing.
  export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}" TORCH_NCCL_DUMP_ON_TIMEOUT=1
  export TORCH_NCCL_DEBUG_INFO_TEMP_FILE="$logs/nccl_trace_rank_"
  # UCX, below NCCL where HPC-X's plugin is, caches what kind of memory an address is; expandable segments remap it.
  export UCX_MEMTYPE_CACHE="${UCX_MEMTYPE_CACHE:-n}"
  [ -z "${SFTRL_INTERFACE:-}" ] || export NCCL_SOCKET_IFNAME=$SFTRL_INTERFACE GLOO_SOCKET_IFNAME=$SFTRL_INTERFACE
}

# launch ARGUMENT...: torchrun's agent on each node, all of them meeting at a port of the first one.
launch() {
  rm -f "$logs/refused" "$logs/stopped" "$logs/stop"
  free_port
  say "$SLURM_NNODES nodes x $processes processes, meeting at $head:$port; logs in $logs"
  export SFTRL_LAUNCH_ADDRESSES=$addresses SFTRL_LAUNCH_ENDPOINT=$head:$port SFTRL_LAUNCH_PROCESSES=$processes
  export SFTRL_STOP_FILE=$logs/stop SFTRL_LAUNCH_ID=$SLURM_JOB_ID-$port SFTRL_LAUNCH_LOGS=$logs SFTRL_LAUNCH_PYTHON=$python
  SFTRL_LAUNCH_RESTARTS=${SFTRL_RESTARTS:-2} \
    step --open-mode=append --output="$logs/node-%n.log" bash "$home/slurm/node.sh" "$@"
}

# From the job's number, so that two jobs on a node begin to look at different places; below the ports that the
# kernel gives to connections by itself (32768 and up).
free_port() {
  port=$((20000 + SLURM_JOB_ID * 16 % 10000))
  while (exec 3<> "/dev/tcp/$head/$port") 2> /dev/null; do port=$((port + 1)); done
}

# step ARGUMENT...: of srun. Signals interrupt the waiting, not the step.
step() {
  local code
  "${task[@]}" "$@" &
  running=$!
  while wait "$running"; code=$?; kill -0 "$running" 2> /dev/null; do :; done
  running=''
  return "$code"
}

# Slurm tells that the time limit is near (--signal=B:USR1@300).
end_is_near() {
  local end
  say "the end of the job is near: checkpoint, then requeue"
  is_ending=1
  touch "$logs/stop"  # a signal would reach all that the ranks have started, too
  # Slurm kills a job at its limit for good. A step that takes longer than that loses what is not saved, not the run.
  end=$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'EndTime=[^ ]*')
  if end=$(date -d "${end#EndTime=}" +%s 2> /dev/null); then
    (sleep $((end - $(date +%s) - 30)); scontrol requeue "$SLURM_JOB_ID") > /dev/null 2>&1 &
  fi
}

stop_or() {
  ! must_leave || requeue
  [ ! -e "$logs/refused" ] || refuse "$@"
  say "error: $*"
  exit 1
}

# Near the time limit, or in the GraceTime of a preemption: a job that only ends in it is not queued again.
must_leave() {
  [ -n "$is_ending" ] || scontrol show job "$SLURM_JOB_ID" --oneliner | grep -q 'PreemptTime=[0-9]'
}

requeue() {
  say "requeueing"
  scontrol requeue "$SLURM_JOB_ID" || exit 75
  sleep 300  # Slurm ends this script
  exit 75
}

# Attempts that begin where the last ones began, also those of this job before it was requeued, lead nowhere.
count_attempt() {
  local latest limit=${SFTRL_ATTEMPTS:-3}
  latest=$(ls -d "$(cat "$logs/run_dir")"/checkpoints/step-* 2> /dev/null | tail -n 1)
  latest=${latest:-the beginning}
  touch "$logs/attempts"
  if [ "$(tail -n "$limit" "$logs/attempts" | grep -cxF "$latest")" -ge "$limit" ]; then
    say "error: $limit attempts from $latest ended without another checkpoint, see $logs"
    exit 1
  fi
  echo "$latest" >> "$logs/attempts"
}
