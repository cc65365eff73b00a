#!/usr/bin/env bash
# sbatch train/distributed/slurm.sh RECIPE --output /shared/runs/NAME --set train.parallel=sharded
# Needs: a checkout and an environment with stepdistill that all nodes see, and a folder for the run that they share. Five
#   minutes before its time is over, or when it is preempted, the run saves a checkpoint, and the job is queued again and
#   goes on from there; after a node was lost, from the last checkpoint. Where it fails on one node it ends on all.
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

before=$(cat "$run/status.json" 2> /dev/null || true)

# One launcher on each node, which starts a process for each of its GPUs. The signal reaches all of them: those that train
# end after the update under way, and launchers let it pass.
# --kill-on-bad-exit=1: where a process fails on one node the others wait for it in a collective until that times out, ten
# minutes and more of all GPUs, so Slurm ends them at once. Processes that were asked to stop do not end together (the main
# one may still write its checkpoint), and launchers say 1 of those, too: of them the step is told 0, and nobody is killed.
status=0
srun --kill-on-bad-exit=1 bash -c '
    asked=
    trap "asked=1" USR1 TERM
    (
        trap "" USR1
        exec accelerate launch --config_file train/distributed/two_nodes.yaml \
            --num_machines "$SLURM_NNODES" --num_processes "$((SLURM_NNODES * SLURM_GPUS_ON_NODE))" \
            --machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" \
            -m stepdistill train "$@"
    ) &
    wait $! && status=0 || status=$?
    while kill -0 $! 2> /dev/null; do wait $! && status=0 || status=$?; done  # a signal ends a wait, not the launcher
    exit "$((asked ? 0 : status))"
' launcher "$@" || status=$?
# One that was there before is of an earlier start, which must not queue a job again that now fails at its first line.
told=$(cat "$run/status.json" 2> /dev/null || true)
if [[ $told != "$before" && $told == *'"it was asked to stop"'* ]]; then exec scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
