#!/usr/bin/env bash
# A Cloud TPU VM slice, from creation to deletion. Every step can be repeated; --dry-run prints what it would do.
#
#   launch/tpu_vm.sh create  --name b16 --zone us-central1-a --type v5litepod-64 --version v2-alpha-tpuv5-lite [--spot]
#   launch/tpu_vm.sh install --name b16 --zone us-central1-a            copy this repository to all hosts, make the environment
#   launch/tpu_vm.sh start   --name b16 --zone us-central1-a -- --config=configs/beitv2_b16.py --workdir=/mnt/shared/b16 ...
#   launch/tpu_vm.sh log     --name b16 --zone us-central1-a            follow the first host's log
#   launch/tpu_vm.sh resume  (as create, with the arguments of start)   after preemption: wait for a new slice, install, start
#   launch/tpu_vm.sh delete  --name b16 --zone us-central1-a
#
# The workdir must be a directory that all hosts mount (Filestore, gcsfuse).
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage
command='' name='' zone='' type='' version='' spot='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    create|install|start|log|resume|delete) command=$1; shift ;;
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --type) type=$2; shift 2 ;;
    --version) version=$2; shift 2 ;;
    --spot) spot=--spot; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ -n "$command" ] || usage
if [ -z "$name" ] || [ -z "$zone" ]; then echo 'error: give --name and --zone' >&2; exit 2; fi

run() {
  if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi
}
everywhere() { run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }

create() {
  if [ -z "$type" ] || [ -z "$version" ]; then echo 'error: create needs --type and --version' >&2; exit 2; fi
  # shellcheck disable=SC2086  # empty when not wanted
  run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
    --accelerator-type="$type" --runtime-version="$version" $spot
}
ready() {
  [ -z "$dry" ] || { echo "wait until $name is ACTIVE"; return; }
  until gcloud compute tpus queued-resources describe "$name" --zone="$zone" --format='value(state.state)' | grep -q ACTIVE; do sleep 30; done
}
install() {
  local archive=/tmp/beitv2_jax.tgz
  run git archive --format=tar.gz -o "$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$name:$archive" --zone="$zone" --worker=all
  everywhere "mkdir -p beitv2_jax && tar xzf $archive -C beitv2_jax && cd beitv2_jax && python3 -m venv .venv && .venv/bin/pip install -q -c requirements.lock -e '.[tpu]'"
}
start() {
  [ $# -gt 0 ] || { echo 'error: give the training arguments after --' >&2; exit 2; }
  case " $*" in *' --workdir='*) ;; *) echo 'error: give --workdir=DIR, which all hosts mount, among the training arguments' >&2; exit 2 ;; esac
  local args
  args=$(printf ' %q' "$@")
  everywhere "cd beitv2_jax && nohup .venv/bin/python -m beitv2_jax.main --distributed$args > train.log 2>&1 < /dev/null &"
}
delete() { run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet; }

case "$command" in
  create) create ;;
  install) ready; install ;;
  start) start "$@" ;;
  log) run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=0 --command='tail -n 50 -F beitv2_jax/train.log' ;;
  resume) delete; create; ready; install; start "$@" ;;
  delete) delete ;;
  *) usage ;;
esac
