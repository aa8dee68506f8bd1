#!/usr/bin/env bash
#SBATCH --job-name=flexolmo
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8      # one process per GPU, as JAX expects under Slurm:
#SBATCH --gpus-per-node=8        # https://docs.jax.dev/en/latest/multi_process.html
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300        # five minutes before the end: save, and exit with 0
#SBATCH --requeue                # a job that loses its node starts again, and resumes
#SBATCH --open-mode=append
#
# Runs one `flexolmo train` on GPUs, under Slurm.
#
#     OUT=/shared/mine sbatch tpu_scripts/slurm.sh expert flexolmo_2x7b_expert \
#         --anchor /shared/anchor --data /shared/texts --name mine
#
# All nodes share their folders, and VENV, an environment with `pip install -e '.[cuda]'`; default:
# .venv in the folder where the job was submitted.
# shellcheck source-path=SCRIPTDIR/..
source "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/tpu_scripts/common.sh"
need OUT "the package to write, in a folder that all nodes share"
[[ $# -gt 0 ]] || { echo "slurm.sh: say what to train, such as: expert CONFIG --data ..." >&2; exit 2; }

# JAX gets most of the memory; NCCL needs the rest:
# https://docs.jax.dev/en/latest/gpu_memory_allocation.html
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# All-gathers of the next layer's matrices overlap with the matmuls of this layer:
# https://docs.jax.dev/en/latest/gpu_performance_tips.html
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"

run srun "${VENV:-.venv}/bin/flexolmo" train "$@" --out "$OUT" --distributed --resume
# The job was stopped before it was done: queue it again.
if [[ -z "$DRY_RUN" && ! -e "$OUT/manifest.json" ]]; then
  run scontrol requeue "$SLURM_JOB_ID"
fi
