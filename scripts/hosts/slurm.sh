#!/bin/bash
# A training on Slurm, on one host or several: sbatch [--nodes 2] [--gpus-per-node 4] scripts/hosts/slurm.sh recipes/mine.yaml [OPTION …]
# With `finetune` on the PATH of every host (. .venv/bin/activate before sbatch), runs and data on a disk that they share.
# Before its time is over it commits and goes back into the queue, until it has finished. Run with Slurm 22.05, without GPUs.
# scancel JOB, a preemption and scontrol requeue leave Slurm's KillWait (30 s) for the commit; scancel --signal=TERM JOB leaves
# it all of checkpoint.grace_seconds.
#SBATCH --job-name=finetune
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1 # `finetune launch` starts a process for each GPU itself
#SBATCH --gpus-per-node=8
#SBATCH --exclusive # all CPUs of the host: a task gets one otherwise, and the ranks share it
#SBATCH --mem=0 # and all its memory
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180 # to this script, this many seconds before that: checkpoint.grace_seconds (120) and some
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=finetune-%j.log
set -u

is_time_over=false
trap 'is_time_over=true; scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the tasks of all hosts, not to this script

srun --kill-on-bad-exit=1 finetune launch --restarts 3 "$@" &
wait $!
code=$?
while kill -0 $! 2>/dev/null; do # the signal ended the first wait
    wait $!
    code=$?
done

if $is_time_over && [ $code -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID" # a canceled job stays canceled: it got no USR1
fi
exit $code
