#!/usr/bin/env bash
# A TPU slice on Compute Engine: a managed instance group with a workload policy, whose hosts train as soon as they are up.
#
#   launch/tpu_vm.sh start  --name b16 --zone us-east5-b --machine ct6e-standard-4t --topology 4x4 --hosts 4 --image FAMILY/PROJECT [--spot] \
#                           -- --config=configs/beitv2_b16.py --workdir=gs://bucket/b16 ...
#   launch/tpu_vm.sh watch  (the same arguments)                   start, then make the slice anew whenever it is taken away
#   launch/tpu_vm.sh log    --name b16 --zone us-east5-b           follow a host's log
#   launch/tpu_vm.sh stop   --name b16 --zone us-east5-b           save and stop on all hosts; the group stays
#   launch/tpu_vm.sh delete --name b16 --zone us-east5-b
#   launch/tpu_vm.sh --dry-run ...                                 print what it would do
#
# The workdir is a folder of a bucket, gs://BUCKET/RUN; the code travels beside it. A host that comes up, for the first time or after a
# repair, installs what is missing and goes on from the last checkpoint. A host whose run fails starts again, but not after bad input (2).
# All hosts of a slice come and go together: `watch` deletes a group that has lost one, to preemption or a fault, and makes it again.
# FAMILY/PROJECT is Google's image for the TPU version (its page 'TPU OS images' lists them).
set -euo pipefail

usage() { sed -n '2,16s/^# \{0,1\}//p' "$0" >&2; exit 2; }
fail() { echo "error: $1" >&2; exit 2; }
[ $# -gt 0 ] || usage
command='' name='' zone='' machine='' topology='' hosts='' image='' spot='' dry='' every=60
while [ $# -gt 0 ]; do
  case "$1" in
    start|watch|log|stop|delete) command=$1; shift ;;
    --name) name=$2; shift 2 ;;
    --zone) zone=$2; shift 2 ;;
    --machine) machine=$2; shift 2 ;;      # a host: ct6e-standard-4t, tpu7x-standard-4t, ct5p-hightpu-4t
    --topology) topology=$2; shift 2 ;;    # chips of the slice: 4x4
    --hosts) hosts=$2; shift 2 ;;
    --image) image=$2; shift 2 ;;
    --spot) spot=1; shift ;;
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
[ -n "$command" ] || usage
if [ -z "$name" ] || [ -z "$zone" ]; then fail 'give --name and --zone'; fi
region=${zone%-*}

run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }
group() { run gcloud compute instance-groups managed "$1" "$name" --zone="$zone" "${@:2}"; }
running() { gcloud compute instance-groups managed list-instances "$name" --zone="$zone" --format='value(instance.basename(),instanceStatus)'; }
hosts_now() { if [ -n "$dry" ]; then echo "$name-HOST"; else running | cut -f1 | sort; fi; }
on() { run gcloud compute ssh "$1" --zone="$zone" --command="$2"; }

boot_script() {  # what each host does when it comes up; $1: where the code lies, then the arguments of training
  cat <<END
#!/bin/bash
exec >> /var/log/beitv2_jax.log 2>&1
mkdir -p /opt/beitv2_jax && cd /opt/beitv2_jax
if [ ! -e ready ]; then
  gcloud storage cp $(printf %q "$1") code.tgz && tar xzf code.tgz && python3 -m venv tools && tools/bin/pip install -q uv \\
    && tools/bin/uv venv -q --python 3.12 .venv && tools/bin/uv pip install -q --python .venv -c requirements.lock -e '.[tpu,gcs]' && touch ready || exit 1
fi
export HOME=/root
while true; do
  .venv/bin/python -m beitv2_jax.main --distributed$(printf ' %q' "${@:2}")
  code=\$?
  case \$code in 0|2|130|143) exit \$code ;; esac
  echo "ended with \$code; going on from the last checkpoint"
  sleep 10
done
END
}

start() {
  local workdir='' arg code boot
  for arg in "$@"; do case "$arg" in --workdir=gs://?*) workdir=${arg#--workdir=} ;; esac; done
  [ -n "$workdir" ] || fail 'give --workdir=gs://BUCKET/RUN among the training arguments after --'
  for arg in machine topology hosts image; do [ -n "${!arg}" ] || fail "$command needs --$arg"; done
  code=${workdir%/}.code.tgz boot=$(mktemp)
  boot_script "$code" "$@" > "$boot"
  if [ -n "$dry" ]; then sed 's/^/  | /' "$boot"; fi
  run git archive --format=tar.gz -o "$boot.tgz" HEAD
  run gcloud storage cp "$boot.tgz" "$code"
  # What a start that failed has left behind may have been made with other arguments.
  if there instance-templates "$name"; then run gcloud compute instance-templates delete "$name" --quiet; fi
  if there resource-policies "$name" --region="$region"; then run gcloud compute resource-policies delete "$name" --region="$region" --quiet; fi
  run gcloud compute resource-policies create workload-policy "$name" --region="$region" --type=HIGH_THROUGHPUT --accelerator-topology="$topology"
  run gcloud compute instance-templates create "$name" --machine-type="$machine" --maintenance-policy=TERMINATE \
    --image-family="${image%/*}" --image-project="${image#*/}" --boot-disk-size=100GB --scopes=cloud-platform --metadata-from-file=startup-script="$boot" \
    ${spot:+--provisioning-model=SPOT} ${spot:+--instance-termination-action=STOP}
  create
}
there() {  # 0 if gcloud knows it, 1 if not, 2 if gcloud does not answer
  local kind answer
  [ -z "$dry" ] || return 1
  read -ra kind <<< "$1"
  answer=$(gcloud compute "${kind[@]}" describe "${@:2}" 2>&1) && return 0
  [[ $answer == *'not found'* ]] && return 1
  echo "$answer" >&2
  return 2
}
create() { group create --size="$hosts" --template="$name" --target-size-policy-mode=bulk --default-action-on-vm-failure=do-nothing \
  --workload-policy="projects/$(project)/regions/$region/resourcePolicies/$name"; }
project() { if [ -n "$dry" ]; then echo PROJECT; else gcloud config get-value project 2>/dev/null; fi; }

watch() {
  [ -z "$dry" ] || { echo "every $every s: if fewer than $hosts hosts of $name are RUNNING that once were,"; group delete --quiet; create; return; }
  local were=0 are list left
  while true; do
    list=$(running) || { sleep "$every"; continue; }  # an answer that did not come says nothing about the hosts
    are=$(grep -c RUNNING <<< "$list" || true)
    if [ "$are" -lt "$were" ]; then
      echo "$(date): $are of $hosts hosts are left; making the slice anew"
      until group delete --quiet; do
        left=0; there 'instance-groups managed' "$name" --zone="$zone" || left=$?
        [ $left != 1 ] || break
        sleep "$every"
      done
      until create; do sleep "$every"; done
      are=0
    fi
    were=$are
    sleep "$every"
  done
}

case "$command" in
  start) start "$@" ;;
  watch)
    [ -n "$hosts" ] || fail 'watch needs --hosts'
    if there 'instance-groups managed' "$name" --zone="$zone"; then
      echo "$name is there and is watched as it is; the arguments after -- are not used"
    else
      start "$@"
    fi
    watch ;;
  log) on "$(hosts_now | head -n 1)" 'tail -n 50 -F /var/log/beitv2_jax.log' ;;
  stop) list=$(hosts_now); for host in $list; do on "$host" "sudo pkill -TERM -f '[b]eitv2_jax.main' || true"; done ;;
  delete)  # all three, also where a start that failed has made only some
    code=0
    group delete --quiet || code=1
    run gcloud compute instance-templates delete "$name" --quiet || code=1
    run gcloud compute resource-policies delete "$name" --region="$region" --quiet || code=1
    exit $code ;;
esac
