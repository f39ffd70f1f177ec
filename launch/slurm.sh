#!/usr/bin/env bash
# A SLURM job on GPU nodes: one process a GPU; JAX reads the rest from SLURM itself.
#
#   launch/slurm.sh --nodes 2 --gpus 8 -- --config=configs/beitv2_b16.py --workdir=/shared/runs/b16 --config.tokenizer_from=/shared/runs/vqkd
#   launch/slurm.sh --dry-run ...        print the job script instead of submitting it
#
# Run it from the root of the repository, on a file system that all nodes see, after `make` made .venv there
# (.venv/bin/pip install -e '.[cuda]'). The job is requeued after preemption and goes on from its last checkpoint.
set -euo pipefail

nodes=1 gpus=8 cpus=8 hours=24 partition='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    --nodes) nodes=$2; shift 2 ;;
    --gpus) gpus=$2; shift 2 ;;            # a node
    --cpus) cpus=$2; shift 2 ;;            # a GPU
    --hours) hours=$2; shift 2 ;;
    --partition) partition=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1; see the head of $0" >&2; exit 2 ;;
  esac
done
[ $# -gt 0 ] || { echo "error: give the training arguments after --, such as -- --config=configs/vqkd_b16.py --workdir=DIR" >&2; exit 2; }
case " $*" in *' --workdir='*) ;; *) echo 'error: give --workdir=DIR, on a file system that all nodes see, among the training arguments' >&2; exit 2 ;; esac
[ -n "$dry" ] || [ -x .venv/bin/python ] || { echo 'error: no .venv here; run make in the root of the repository first' >&2; exit 2; }

job() {
  cat <<END
#!/usr/bin/env bash
#SBATCH --job-name=beitv2_jax
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gpus-per-node=$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$hours:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --output=slurm-%j.log
END
  [ -z "$partition" ] || echo "#SBATCH --partition=$partition"
  echo
  printf 'srun --kill-on-bad-exit=1 .venv/bin/python -m beitv2_jax.main'
  printf ' %q' "$@"
  echo
}

if [ -n "$dry" ]; then job "$@"; else job "$@" | sbatch; fi
