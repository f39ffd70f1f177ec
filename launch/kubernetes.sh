#!/usr/bin/env bash
# A JobSet on Kubernetes (https://jobset.sigs.k8s.io): TPU slices on GKE, or nodes with NVIDIA GPUs, one pod a host.
#
#   launch/kubernetes.sh start --name b16 --image IMAGE --tpu tpu-v5-lite-podslice --topology 8x8 --hosts 16 --chips 4 --claim PVC -- ARGS
#   launch/kubernetes.sh start --name b16 --image IMAGE --hosts 2 --gpus 8 --claim PVC -- --config=configs/beitv2_b16.py --workdir=/data/b16
#   launch/kubernetes.sh log    --name b16        follow the first host's log
#   launch/kubernetes.sh delete --name b16
#   launch/kubernetes.sh --dry-run ...            print the manifest, or the command
#
# IMAGE holds this repository at /beitv2_jax with its environment in .venv (launch/Dockerfile makes it). The workdir is gs://BUCKET/RUN, or
# lies under /data, where the volume claim PVC is mounted, which all pods can write. Evicted or failed pods restart the set, up to
# --restarts times (100), and the run goes on from its last checkpoint; --spot takes machines that can be taken away.
set -euo pipefail

usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
command='' name='' image='' tpu='' topology='' hosts=1 chips=4 gpus=0 claim='' restarts=100 spot='' dry=''
while [ $# -gt 0 ]; do
  case "$1" in
    start|log|delete) command=$1; shift ;;
    --name) name=$2; shift 2 ;;
    --image) image=$2; shift 2 ;;
    --tpu) tpu=$2; shift 2 ;;              # cloud.google.com/gke-tpu-accelerator
    --topology) topology=$2; shift 2 ;;    # cloud.google.com/gke-tpu-topology
    --hosts) hosts=$2; shift 2 ;;
    --chips) chips=$2; shift 2 ;;          # TPU chips a host
    --gpus) gpus=$2; shift 2 ;;            # a host
    --claim) claim=$2; shift 2 ;;
    --restarts) restarts=$2; shift 2 ;;
    --spot) spot=1; shift ;;               # machines that can be taken away; the set comes back by itself
    --dry-run) dry=1; shift ;;
    --) shift; break ;;
    *) echo "error: unknown option $1" >&2; usage ;;
  esac
done
if [ -z "$command" ] || [ -z "$name" ]; then usage; fi

manifest() {
  local resource selector='' where='' mount='' volume=''  # selector is YAML at the depth of the pod's spec
  if [ -n "$tpu" ]; then
    [ -n "$topology" ] || { echo 'error: --tpu needs --topology, such as 8x8' >&2; exit 2; }
    resource="google.com/tpu: $chips"
    selector="
              cloud.google.com/gke-tpu-accelerator: $tpu
              cloud.google.com/gke-tpu-topology: $topology"
    [ "$hosts" -eq 1 ] || where=' --distributed'
  else
    [ "$gpus" -gt 0 ] || { echo 'error: give --tpu and --topology, or --gpus' >&2; exit 2; }
    resource="nvidia.com/gpu: $gpus"
    [ "$hosts" -eq 1 ] || where=" --coordinator=$name-hosts-0-0.$name:8476 --processes=$hosts --process=\$JOB_COMPLETION_INDEX"
  fi
  [ -z "$spot" ] || selector="$selector
              cloud.google.com/gke-spot: 'true'"
  [ -z "$selector" ] || selector="
            nodeSelector:$selector"
  [ -z "$spot" ] || selector="$selector
            tolerations:
            - {key: cloud.google.com/gke-spot, operator: Equal, value: 'true', effect: NoSchedule}"
  if [ -n "$claim" ]; then
    mount='
              - {name: data, mountPath: /data}'
    volume="
            - name: data
              persistentVolumeClaim: {claimName: $claim}"
  fi
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - {action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: hosts
    replicas: 1
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:  # bad input is not tried again
          rules:
          - action: FailJob
            onExitCodes: {containerName: train, operator: In, values: [2]}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120$selector
            containers:
            - name: train
              image: $image
              workingDir: /beitv2_jax
              command: [bash, -c]
              args:
              - |
                exec .venv/bin/python -m beitv2_jax.main$(printf ' %q' "$@")$where
              resources:
                limits:
                  $resource
              volumeMounts:$mount
              - {name: shm, mountPath: /dev/shm}
            volumes:$volume
            - name: shm
              emptyDir: {medium: Memory}
END
}
run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi; }

case "$command" in
  start)
    [ -n "$image" ] || { echo 'error: start needs --image' >&2; exit 2; }
    case " $*" in *' --workdir=gs://'*) ;; *) [ -n "$claim" ] || { echo 'error: give --claim for a workdir under /data, or --workdir=gs://BUCKET/RUN' >&2; exit 2; } ;; esac
    [ $# -gt 0 ] || { echo 'error: give the training arguments after --' >&2; exit 2; }
    case " $*" in *' --workdir='*) ;; *) echo 'error: give --workdir=/data/... or gs://BUCKET/RUN among the training arguments' >&2; exit 2 ;; esac
    text=$(manifest "$@")
    if [ -n "$dry" ]; then echo "$text"; else kubectl apply -f - <<< "$text"; fi ;;
  log) run kubectl logs -f -l "jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" --tail=50 ;;
  delete) run kubectl delete jobset "$name" ;;
esac
