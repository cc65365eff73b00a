#!/usr/bin/env bash
# sbatch train/distributed/slurm.sh RECIPE --output /shared/runs/NAME --set train.parallel=sharded
# Needs: a checkout and an environment with stepdistill that all nodes see, and a folder for the run that they share. Ended
#   by its time limit, a job goes on from its last checkpoint: sbatch it again with --resume at the end.
# Gave: not measured.
#SBATCH --job-name=stepdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${nodes[0]}

# One launcher on each node, which starts a process for each of its GPUs.
srun --kill-on-bad-exit=1 bash -c '
    accelerate launch --config_file train/distributed/two_nodes.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" \
        -m stepdistill train "$@"
' launcher "$@"
