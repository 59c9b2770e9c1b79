#!/bin/bash
# Builds a dataset by Slurm: an array of jobs encodes and tokenizes, a share each; a last job packs and writes.
#
#   array=$(sbatch --parsable --array=1-64 deploy/slurm-build.sh dataset.yaml 64)
#   sbatch --dependency="afterok:$array" deploy/slurm-build.sh dataset.yaml
#
# Run jobs that failed again by their numbers: --array=7,31 and the same 64. What is finished is skipped.
# What stands after MANIFEST and the number of shares goes to `lwm-data build`: on machines with a GPU a job, --workers 1.
#
#SBATCH --job-name=lwm-build
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail

manifest=${1:?usage: sbatch [--array=1-SHARES] deploy/slurm-build.sh MANIFEST [SHARES] [OPTIONS]}
shift
options=(--workers "${SLURM_CPUS_PER_TASK:-1}")
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    shares=${1:?a job of an array needs the number of shares after the manifest}
    shift
    options+=(--unit-range "$SLURM_ARRAY_TASK_ID/$shares")
fi
exec lwm-data build "$manifest" "${options[@]}" "$@"
