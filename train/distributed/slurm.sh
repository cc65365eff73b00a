#!/usr/bin/env bash
# sbatch train/distributed/slurm.sh RECIPE --output /shared/runs/NAME --set train.parallel=sharded
# Needs: a checkout and an environment with stepdistill that all nodes see, and a folder for the run that they share. Five
#   minutes before its time is over, or when it is preempted, the run saves a checkpoint, and the job is queued again and
#   goes on from there; after a node was lost, from the last checkpoint.
# Gave: not measured.
#SBATCH --job-name=stepdistill
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
set -euo pipefail

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS=${nodes[0]}

run=
for ((i = 1; i < $#; i++)); do
    if [[ ${!i} == --output ]]; then next=$((i + 1)) && run=${!next}; fi
done
[[ -n $run ]] || { echo "slurm.sh: give --output, a folder that all nodes see" >&2; exit 2; }
if compgen -G "$run/work/checkpoints/step-*/state.json" > /dev/null; then set -- "$@" --resume; fi

# One launcher on each node, which starts a process for each of its GPUs. The signal reaches all of them: those that train
# end after the update under way, and launchers let it pass.
srun --kill-on-bad-exit=0 bash -c '
    trap "" USR1
    accelerate launch --config_file train/distributed/two_nodes.yaml \
        --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" \
        -m stepdistill train "$@"
' launcher "$@" && exit
status=$?
if grep -q '"it was asked to stop"' "$run/status.json"; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
