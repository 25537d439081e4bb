#!/usr/bin/env bash
# What a launcher needs to know of this machine and of the others: `source scripts/base_env.sh || exit 1`.
#
# Reads, as PAI/DLC sets them; without them there is one machine:
#   RANK            number of this machine, 0 is the head       (default 0)
#   WORLD_SIZE      number of machines, not of processes        (default 1)
#   MASTER_ADDR     address of the head                         (default, on one machine: 127.0.0.1)
#   MASTER_PORT     a free port of the head, for Ray            (default 12456)
#   KUBERNETES_CONTAINER_RESOURCE_GPU, CUDA_VISIBLE_DEVICES
#                   GPUs of a machine                           (default: nvidia-smi counts; 8 if none)
#   CHATLEARN_VENV  environment made by setup_env.sh            (default .venv; if none: current python)
# Sets num_device (GPUs of all machines) and log_file, and goes to the repository. A Ray that is
# running is left alone: the run starts its own, or joins runtime_args.ray_address.

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return 1
export RANK=${RANK:-0} WORLD_SIZE=${WORLD_SIZE:-1} MASTER_PORT=${MASTER_PORT:-12456}
if ((WORLD_SIZE == 1)); then # of several, every machine must be told
    export MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
fi

gpus_per_node=${KUBERNETES_CONTAINER_RESOURCE_GPU:-}
if [[ -z $gpus_per_node && -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
    gpus_per_node=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) || true
elif [[ -z $gpus_per_node ]]; then
    gpus_per_node=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true
fi
if ((gpus_per_node == 0)); then
    gpus_per_node=8
    echo "base_env: no GPU found on this machine; counting on $gpus_per_node" >&2
fi
num_device=$((WORLD_SIZE * gpus_per_node))

if [[ -x ${CHATLEARN_VENV:-.venv}/bin/python ]]; then
    source scripts/setup_env.sh || return 1
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # workers import the code of this folder
export TOKENIZERS_PARALLELISM=false               # agents run in many processes already
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Where `tee` puts what a run prints; one file a machine, as folders may be shared.
mkdir -p outputs/logs
log_file=outputs/logs/$(basename "$0" .sh)_rank$RANK.log
