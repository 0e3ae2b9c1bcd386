#!/bin/bash
# Trains on several nodes under Slurm, one process a GPU; start it again and it goes on from the
# newest checkpoint.
#
#   sbatch experiments/slurm.sh experiments/configs/runs/llama_1b.gin --set train.steps=1000
#
# Edit first: the number of nodes, GPUs and tasks per node (these two agree), time, and how Python
# is found; add partition and account where your site wants them. The gin file's mesh must multiply
# to nodes * GPUs per node; its directory and caches must be on a file system that all nodes share.
#SBATCH --job-name=jaxscale
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
# All tasks get SIGTERM two minutes before the time limit: they save, stop after the same step and
# exit with 143.
#SBATCH --signal=TERM@120
# A preempted or failed node puts the job back into the queue, where it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
source .venv/bin/activate

# NCCL and the coordinator take the first interface they find; where there are several, name one:
# export NCCL_SOCKET_IFNAME=ib0
# A proxy for the coordinator's address makes every process wait for ever.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY

# Tasks see all GPUs of their node, so that NCCL can copy from one to another; each takes the one of
# its SLURM_LOCALID. With --gpus-per-task each sees one, and takes it.
# One process for all eight GPUs of a node: --ntasks-per-node=1 and
# --set runtime.processes.gpus_per_process=8.
# --kill-on-bad-exit ends the whole job when the watchdog ends one process (status 75), rather than
# leave the others.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun no longer takes it from the job
status=0
srun --kill-on-bad-exit=1 jaxscale pretrain "$@" --set runtime.processes.launcher=slurm || status=$?

# srun returns the highest status of a task. 75 and 134: a process was stuck or dead; 137: and the
# stuck one was killed. Another try resumes; three at most, for the fault may be in the run itself.
if [[ $status =~ ^(75|134|137)$ ]] && ((${SLURM_RESTART_COUNT:-0} < 3)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
