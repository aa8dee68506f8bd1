#!/usr/bin/env bash
#SBATCH --job-name=flexolmo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8      # a process for each GPU, as JAX expects under Slurm:
#SBATCH --gpus-per-node=8        # https://docs.jax.dev/en/latest/multi_process.html
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300        # five minutes before the end: save, and end with 0
#SBATCH --requeue                # a job whose node is lost restarts, and resumes its run
#SBATCH --open-mode=append
#
# The same on GPUs: runs one `flexolmo train` on all of them, under Slurm.
#
#     OUT=/shared/mine sbatch tpu_scripts/slurm.sh expert flexolmo_2x7b_expert \
#         --anchor /shared/anchor --data /shared/texts --name mine
#
# Every node sees the same folders, and an environment with `pip install -e '.[cuda]'`:
# VENV, by default .venv where the job was submitted.
# shellcheck source-path=SCRIPTDIR/..
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/tpu_scripts/common.sh"
need OUT "the package to make, in a folder that all nodes see"
[[ $# -gt 0 ]] || { echo "slurm.sh: say what to train, as: expert CONFIG --data ..." >&2; exit 2; }

# Most of the memory for JAX; NCCL needs the rest:
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Gathers of the next layer's matrices run beside this one's products:
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

run srun "${VENV:-.venv}/bin/flexolmo" train "$@" --out "$OUT" --distributed --resume
# Told to stop before it was done: back into the queue.
if [[ -z "$DRY_RUN" && ! -e "$OUT/manifest.json" ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
