#!/bin/bash
# A recipe on the machines of a Slurm allocation, one launcher on each; continued until it is done.
#
#   sbatch launch/slurm/train.sh RECIPE.yaml [key=value ...]
#   sbatch --nodes 4 --export ALL,PROFILE=zero3-nodes launch/slurm/train.sh RECIPE.yaml
#
# Two minutes before the time is over Slurm sends SIGUSR1: the run writes a checkpoint and the job queues again.
# A job that is done (0), or that a mistake has ended (2, 4 or a traceback), does not.
#
# PROFILE    a profile for several machines of launch/accelerate, or a file of accelerate's (ddp-nodes)
# PROCESSES  on each machine (one per GPU)
# RESTARTS   of all processes within the job, when one of them dies (3)
# SETUP      a file to source on each machine first: modules, an environment (none)
#
#SBATCH --job-name=finetune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=08:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log
set -u

if (( $# == 0 )); then
    echo "usage: sbatch $0 RECIPE.yaml [key=value ...]" >&2
    exit 2
fi
processes=${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
launcher=(
    --num_machines "$SLURM_JOB_NUM_NODES"
    --num_processes $((SLURM_JOB_NUM_NODES * processes))
    --main_process_ip "$head"
    --main_process_port $((20000 + SLURM_JOB_ID % 10000)) # its own, where jobs share a machine
    --rdzv_backend c10d
    --rdzv_conf read_timeout=600 # seconds in which the first machine must have come
    --max_restarts "${RESTARTS:-3}"
)
export PET_RDZV_ID="slurm-$SLURM_JOB_ID"
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # which steps do not inherit
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-110} # seconds for a step and a checkpoint

# shellcheck disable=SC2016 # the machine's number is known where the task runs
srun --ntasks-per-node=1 bash -c '
    if [[ -n "${SETUP:-}" ]]; then source "$SETUP"; fi
    exec finetune train "$@" --machine_rank "$SLURM_NODEID"
' launch "$@" --launch "${PROFILE:-ddp-nodes}" -- "${launcher[@]}" &
step=$!

told=0
trap '((told += 1)); echo "SIGUSR1: time is nearly over" >&2; kill -USR1 "$step"' USR1 # srun passes it on to all tasks
while # a signal ends a wait
    heard=$told
    wait "$step"
    code=$?
    ((heard != told))
do :; done

if ((told > 0 && code != 0 && code != 2 && code != 4)); then
    echo "stopped with $code after SIGUSR1: queueing again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
