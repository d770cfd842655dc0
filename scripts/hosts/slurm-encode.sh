#!/bin/bash
# Encodes the rows of a recipe with an array of Slurm tasks: sbatch [--array 1-32] scripts/hosts/slurm-encode.sh recipes/mine.yaml [OPTION …]
# With `finetune` on the PATH of every host, and FINETUNE_CACHE, data and base on a disk that they share. Not run here.
# A task that is killed or preempted goes back into the queue and continues; the last one joins the shards.
#SBATCH --job-name=finetune-encode
#SBATCH --array=1-16
#SBATCH --cpus-per-task=8 # a worker process for each; about half a GiB each
#SBATCH --mem=8G
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-encode-%A-%a.log
set -eu

finetune encode --shard "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_MAX" "$@"
