#!/bin/bash
# Helps with a sweep from an array of Slurm tasks: sbatch [--array 1-8] scripts/hosts/slurm-sweep.sh runs/mine-sweep
# First make it: OMP_NUM_THREADS=8 finetune sweep recipes/mine.yaml --set … --sweep runs/mine-sweep --workers 0; at the end,
# finetune sweep runs/mine-sweep prints the table. Submit from the folder that the recipe's paths are relative to, on a disk that the hosts share,
# with `finetune` on their PATH; FINETUNE_CACHE too, so that they share the encoded rows. Not run here.
# A task that is killed, preempted or out of time goes back into the queue; its trial goes on from its last commit, here or elsewhere.
#SBATCH --job-name=finetune-sweep
#SBATCH --array=1-4
#SBATCH --gpus-per-task=1 # of each trial
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180 # seconds before the end: checkpoint.grace_seconds (120) and some
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-sweep-%A-%a.log
set -u

srun finetune sweep "$1" --worker
code=$?
if [ $code -eq 143 ]; then # the time is over, or somebody canceled: a canceled task stays canceled
    scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit $code
