#!/usr/bin/env bash
# One host with one or several GPUs: one process drives them all.
#
#   launch/gpu_host.sh install                                  the environment with CUDA's JAX in .venv
#   launch/gpu_host.sh start [--gpus 0,1,2,3] -- --config=configs/beitv2_b16.py --workdir=runs/b16 ...
#   launch/gpu_host.sh log   --workdir runs/b16                 follow the log
#   launch/gpu_host.sh stop  --workdir runs/b16                 save and stop; start goes on from there
#   launch/gpu_host.sh --dry-run ...                            print what it would do
#
# start stays behind when the terminal is closed. A run that ends with an error is started again up to --retries times (3), and
# goes on from its last checkpoint; bad input (exit code 2) is not tried again.
set -euo pipefail

usage() { sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
command='' gpus='' retries=3 workdir='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    install|start|log|stop) command=$1; shift ;;
    --gpus) gpus=$2; shift 2 ;;
    --retries) retries=$2; shift 2 ;;
    --workdir) workdir=$2; shift 2 ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ -n "$command" ] || usage
for arg in "$@"; do case "$arg" in --workdir=*) workdir=${arg#--workdir=} ;; esac; done
workdir=${workdir/#\~\//$HOME/}  # bash leaves the ~ of --workdir=~/runs alone, training does not
[ "$command" = install ] || [ -n "$workdir" ] || { echo 'error: give the workdir: --workdir DIR, or --workdir=DIR among the training arguments after --' >&2; exit 2; }

run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

start() {
  local args script
  args=$(printf ' %q' "$@")
  script="for try in \$(seq 0 $retries); do
  .venv/bin/python -m beitv2_jax.main$args && exit 0
  code=\$?
  case \$code in 2|130|143) exit \$code ;; esac
  echo \"ended with \$code; going on from the last checkpoint\"
done"
  if [ -n "$dry" ]; then
    echo "${gpus:+CUDA_VISIBLE_DEVICES=$gpus }nohup bash -c '$script' >> $workdir/train.log"
    return
  fi
  [ -x .venv/bin/python ] || { echo "error: no .venv here; run $0 install first" >&2; exit 2; }
  if ps -o args= -p "$(cat "$workdir/launch.pid" 2>/dev/null || echo 0)" 2>/dev/null | grep -q beitv2_jax.main; then  # another program may have its number by now
    echo "error: a run in $workdir is going on; stop it first: $0 stop --workdir $workdir" >&2; exit 2
  fi
  mkdir -p "$workdir"
  [ -z "$gpus" ] || export CUDA_VISIBLE_DEVICES=$gpus
  nohup bash -c "$script" >> "$workdir/train.log" 2>&1 < /dev/null &
  echo $! > "$workdir/launch.pid"
  echo "started; follow it with $0 log --workdir $workdir"
}

case "$command" in
  install) run python3 -m venv .venv; run .venv/bin/pip install -q -c requirements.lock -e '.[cuda]' ;;
  start) [ $# -gt 0 ] || usage; start "$@" ;;
  log) run tail -n 50 -F "$workdir/train.log" ;;
  stop)
    pid=PID; [ -n "$dry" ] || pid=$(cat "$workdir/launch.pid")
    run pkill -TERM -P "$pid" ;;
esac
