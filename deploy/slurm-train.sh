#!/bin/bash
# Trains a manifest by Slurm, one process a node; Slurm starts it again when a node fails, and it goes on by itself.
#
#   sbatch --nodes=8 --gpus-per-node=8 deploy/slurm-train.sh train.yaml
#
# Five minutes before its time is over the job gets SIGTERM, saves and ends. What stands after MANIFEST goes to
# `lwm-train run`. The run's folder must lie where all nodes see it.
#
#SBATCH --job-name=lwm-train
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

manifest=${1:?usage: sbatch --nodes=N deploy/slurm-train.sh MANIFEST [OPTIONS]}
shift
# --kill-on-bad-exit: one process that ends badly ends the step, and the requeue below starts all of them.
if ! srun --kill-on-bad-exit=1 lwm-train run "$manifest" --distributed "$@"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
