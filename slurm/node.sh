# Runs on each node, started by common.sh: torchrun's agent for the processes of this node.
# What Slurm ends or preempts it sends SIGTERM, all processes at once. The ranks write a checkpoint then; the agent
# must neither die of it nor end them.
trap '' USR1 TERM
export PET_SIGNALS_TO_HANDLE=SIGINT TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[rank ${rank}] '
# Otherwise the ranks meet in one store of the agents', in which those of before a restart have left their addresses
# (torch 2.13: _bootstrap_store_info is made once); the new ones then find no peer.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
read -r -a addresses <<< "$SFTRL_LAUNCH_ADDRESSES"
echo "$(date +%FT%T) node ${SLURMD_NODENAME:-$(hostname)}: $*"
# is_host: torchrun would compare names, and a host has several. It numbers the nodes in the order of --local-addr,
# which is Slurm's order where nodes are known by names like node017.
exec "$SFTRL_LAUNCH_PYTHON" -m torch.distributed.run \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SFTRL_LAUNCH_PROCESSES" --max-restarts "$SFTRL_LAUNCH_RESTARTS" \
  --rdzv-backend c10d --rdzv-endpoint "$SFTRL_LAUNCH_ENDPOINT" --rdzv-id "$SFTRL_LAUNCH_ID" \
  --rdzv-conf "is_host=$((SLURM_NODEID == 0)),join_timeout=900" --local-addr "${addresses[$SLURM_NODEID]}" \
  --log-dir "$SFTRL_LAUNCH_LOGS/ranks-$SLURM_NODEID" --redirects 3 --tee 3 \
  --no-python setpriv --pdeathsig KILL bash "$(dirname "${BASH_SOURCE[0]}")/rank.sh" "$@"
