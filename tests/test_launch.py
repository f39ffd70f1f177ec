"""The launch scripts print what they would do."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

TRAIN = ['--', '--config=configs/vqkd_b16.py', '--workdir=/mnt/a run', "--config.mesh.rules=(('embed','data'),)"]


def dry(*args):
  return subprocess.run(['bash', *args], capture_output=True, text=True, timeout=60)


def test_slurm():
  out = dry('launch/slurm.sh', '--dry-run', '--nodes', '2', '--gpus', '4', '--partition', 'big', *TRAIN)
  assert out.returncode == 0, out.stderr
  for line in ('--nodes=2', '--ntasks-per-node=4', '--gpus-per-node=4', '--partition=big', '--requeue'):
    assert f'#SBATCH {line}' in out.stdout
  command = out.stdout.strip().splitlines()[-1]
  words = subprocess.run(['bash', '-c', f'set -- {command}; printf "%s\\n" "$@"'], capture_output=True, text=True).stdout.splitlines()
  assert words[0] == 'srun' and words[-3:] == TRAIN[1:]  # quoting survives
  assert dry('launch/slurm.sh', '--dry-run').returncode == 2


TPU = ['--dry-run', '--name', 'b16', '--zone', 'us-east5-b']
SLICE = ['--machine', 'ct6e-standard-4t', '--topology', '4x4', '--hosts', '4', '--image', 'family/project', '--spot']
BUCKET = [*TRAIN[:2], '--workdir=gs://bucket/a run', TRAIN[3]]


@pytest.mark.parametrize('command', ['start', 'watch', 'log', 'stop', 'delete'])
def test_tpu_vm(command):
  out = dry('launch/tpu_vm.sh', command, *TPU, *((*SLICE, *BUCKET) if command in ('start', 'watch') else ()))
  assert out.returncode == 0, out.stderr
  lines = [line for line in out.stdout.splitlines() if line.startswith('gcloud')]
  assert lines and all('b16' in line or 'storage cp' in line for line in lines)
  if command == 'delete':
    assert [line.split()[2] for line in lines] == ['instance-groups', 'instance-templates', 'resource-policies']
  if command in ('start', 'watch'):
    assert [line.split()[1:4:2] for line in lines[:4]] == [
      ['storage', lines[0].split()[3]], ['compute', 'create'], ['compute', 'create'], ['compute', 'managed'],
    ]  # fmt: skip
    assert '--accelerator-topology=4x4' in lines[1] and '--region=us-east5 ' in lines[1]
    assert '--provisioning-model=SPOT' in lines[2] and '--machine-type=ct6e-standard-4t' in lines[2]
    assert '--size=4' in lines[3] and '--workload-policy=projects/PROJECT/regions/us-east5/resourcePolicies/b16' in lines[3]
  if command == 'watch':  # a slice that was taken away is made again, and its hosts go on by themselves
    assert 'delete' in lines[4] and lines[5] == lines[3]


def test_a_tpu_host_trains_when_it_comes_up(tmp_path):
  """The script of a host, run with a python that fails once: it installs once, starts again, and gives up for bad input."""
  out = dry('launch/tpu_vm.sh', 'start', *TPU, *SLICE, *BUCKET).stdout
  script = '\n'.join(line[4:] for line in out.splitlines() if line.startswith('  | '))
  script = script.replace('/var/log/', f'{tmp_path}/').replace('/opt/', f'{tmp_path}/').replace('sleep 10', 'true')
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name, body in {
    'gcloud': '[ $# = 4 ] && touch "$4"',
    'tar': 'true',
    'python3': 'mkdir -p tools/bin .venv/bin; cp "$TOOLS/pip" tools/bin/pip; cp "$TOOLS/uv" tools/bin/uv',
    'pip': 'true',
    'uv': '[ "$1" = pip ] && echo installed; cp "$TOOLS/train" .venv/bin/python',
    'train': 'printf "%s\\n" "$@"; [ -e once ] && exit 2; touch once; exit 75',
  }.items():
    (tools / name).write_text('#!/bin/bash\n' + body + '\n')
    (tools / name).chmod(0o755)
  done = subprocess.run(['bash', '-c', script], env={'PATH': f'{tools}:/usr/bin:/bin', 'TOOLS': str(tools)}, timeout=60)
  log = (tmp_path / 'beitv2_jax.log').read_text()
  assert done.returncode == 2 and log.count('installed') == 1 and log.count('--distributed') == 2, log
  assert 'ended with 75' in log and '--workdir=gs://bucket/a run' in log.splitlines()


def test_tpu_vm_errors():
  assert dry('launch/tpu_vm.sh').returncode == 2
  assert 'give --name and --zone' in dry('launch/tpu_vm.sh', 'start', '--name', 'x').stderr
  assert 'start needs --hosts' in dry('launch/tpu_vm.sh', 'start', *TPU, *SLICE[:4], *BUCKET).stderr
  assert 'give --workdir=gs://' in dry('launch/tpu_vm.sh', 'start', *TPU, *SLICE, *TRAIN).stderr
  assert 'unknown option --nme' in dry('launch/tpu_vm.sh', 'start', '--nme', 'x').stderr


@pytest.mark.parametrize(
  'hosts, where', [(1, ''), (2, '--coordinator=b16-hosts-0-0.b16:8476 --processes=2 --process=$JOB_COMPLETION_INDEX')]
)
def test_kubernetes_gpus(hosts, where):
  out = dry('launch/kubernetes.sh', 'start', '--dry-run', *'--name b16 --image i --gpus 8 --claim c --hosts'.split(), str(hosts), *TRAIN)
  assert out.returncode == 0, out.stderr
  job = yaml.safe_load(out.stdout)['spec']['replicatedJobs'][0]['template']['spec']
  assert job['completions'] == job['parallelism'] == hosts
  container = job['template']['spec']['containers'][0]
  assert container['resources']['limits'] == {'nvidia.com/gpu': 8}
  script = container['args'][0]
  assert script.rstrip().endswith(where)
  words = subprocess.run(['bash', '-c', f'exec() {{ printf "%s\\n" "$@"; }}\n{script}'], capture_output=True, text=True).stdout.splitlines()
  assert words[3:6] == TRAIN[1:]  # quoting survives


def test_kubernetes_tpus():
  args = '--name b16 --image i --tpu tpu-v5-lite-podslice --topology 8x8 --hosts 16 --claim c'.split()
  out = dry('launch/kubernetes.sh', 'start', '--dry-run', *args, *TRAIN)
  pod = yaml.safe_load(out.stdout)['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice', 'cloud.google.com/gke-tpu-topology': '8x8'
  }  # fmt: skip
  assert pod['containers'][0]['resources']['limits'] == {'google.com/tpu': 4} and '--distributed' in pod['containers'][0]['args'][0]
  assert 'kubectl delete jobset b16' in dry('launch/kubernetes.sh', 'delete', '--dry-run', '--name', 'b16').stdout
  assert 'needs --image' in dry('launch/kubernetes.sh', 'start', '--name', 'x', *TRAIN).stderr
  assert 'give --claim' in dry('launch/kubernetes.sh', 'start', *args[:-2], *TRAIN).stderr
  assert 'give --tpu and --topology, or --gpus' in dry('launch/kubernetes.sh', 'start', *args[:4], '--claim', 'c', *TRAIN).stderr


def test_kubernetes_spot_machines_and_a_bucket_need_no_claim():
  args = '--name b16 --image i --tpu tpu-v6e-slice --topology 4x4 --hosts 4 --spot'.split()
  out = dry('launch/kubernetes.sh', 'start', '--dry-run', *args, *BUCKET)
  pod = yaml.safe_load(out.stdout)['spec']['replicatedJobs'][0]['template']['spec']['template']['spec']
  assert pod['nodeSelector']['cloud.google.com/gke-spot'] == 'true' and pod['nodeSelector']['cloud.google.com/gke-tpu-topology'] == '4x4'
  assert pod['tolerations'][0]['key'] == 'cloud.google.com/gke-spot'
  assert [v['name'] for v in pod['volumes']] == [v['name'] for v in pod['containers'][0]['volumeMounts']] == ['shm']


def test_gpu_host():
  out = dry('launch/gpu_host.sh', 'start', '--dry-run', '--gpus', '0,1', *TRAIN)
  assert out.returncode == 0, out.stderr
  assert out.stdout.startswith('CUDA_VISIBLE_DEVICES=0,1 nohup') and '/mnt/a run/train.log' in out.stdout
  for command in ('log', 'stop'):
    assert dry('launch/gpu_host.sh', command, '--dry-run', '--workdir', 'runs/x').returncode == 0
  assert 'give the workdir' in dry('launch/gpu_host.sh', 'log').stderr


def test_gpu_host_goes_on_after_a_failure_but_not_after_bad_input(tmp_path):
  """The real script, with a stand-in for Python that fails twice, then succeeds; and one that refuses its input."""
  root = Path(__file__).parent.parent
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  python = tmp_path / '.venv' / 'bin' / 'python'
  for codes, tries in (([1, 1, 0], 3), ([2], 1)):
    python.write_text(f'#!/bin/bash\necho once >> tries\ncodes=({" ".join(map(str, codes))})\nexit ${{codes[$(wc -l < tries) - 1]}}\n')
    python.chmod(0o755)
    (tmp_path / 'tries').unlink(missing_ok=True)
    subprocess.run([root / 'launch/gpu_host.sh', 'start', '--', '--workdir=run'], cwd=tmp_path, check=True, timeout=60)
    pid = (tmp_path / 'run' / 'launch.pid').read_text().strip()
    subprocess.run(['tail', f'--pid={pid}', '-f', '/dev/null'], timeout=60)
    assert (tmp_path / 'tries').read_text().count('once') == tries


def test_shellcheck():
  scripts = sorted(map(str, Path('launch').glob('*.sh')))
  done = subprocess.run([Path(sys.executable).parent / 'shellcheck', *scripts], capture_output=True, text=True)
  assert len(scripts) == 4 and done.returncode == 0, done.stdout


def fake_gcloud(folder, body):
  """Environment with a gcloud of our own, which notes how it was called."""
  (folder / 'bin').mkdir()
  for name, text in {'gcloud': f'echo "$*" >> {folder}/calls\n{body}', 'sleep': 'true', 'git': 'true'}.items():
    (folder / 'bin' / name).write_text('#!/bin/bash\n' + text + '\n')
    (folder / 'bin' / name).chmod(0o755)
  return {'PATH': f'{folder}/bin:/usr/bin:/bin', 'HOME': str(folder)}


def test_an_answer_that_does_not_come_deletes_no_slice(tmp_path):
  """The third listing fails, the others have all hosts."""
  body = f"""case "$*" in *list-instances*)
    echo x >> {tmp_path}/listed
    [ $(wc -l < {tmp_path}/listed) = 3 ] && exit 1
    printf 'a\\tRUNNING\\nb\\tRUNNING\\n' ;; esac"""
  env = fake_gcloud(tmp_path, body)
  (tmp_path / 'bin' / 'sleep').write_text(f'#!/bin/bash\n[ $(wc -l < {tmp_path}/listed) -lt 5 ]\n')  # the loop ends where sleeping fails
  script = ['launch/tpu_vm.sh', 'watch', *TPU[1:], *SLICE, *BUCKET]
  subprocess.run(['bash', *script], env=env, capture_output=True, timeout=60)
  calls = (tmp_path / 'calls').read_text()
  assert calls.count('list-instances') == 5 and 'delete' not in calls and 'create' not in calls  # the group was there already


def test_what_a_failed_start_left_behind_is_deleted_and_made_again(tmp_path):
  env = fake_gcloud(
    tmp_path, 'case "$*" in *"managed delete"*|*"managed create"*|*"managed describe"*) exit 1 ;; *get-value*) echo project ;; esac'
  )
  gone = subprocess.run(['bash', 'launch/tpu_vm.sh', 'delete', *TPU[1:]], env=env, capture_output=True, text=True, timeout=60)
  calls = (tmp_path / 'calls').read_text()
  assert gone.returncode == 1 and 'instance-templates delete' in calls and 'resource-policies delete' in calls
  (tmp_path / 'calls').unlink()
  again = subprocess.run(['bash', 'launch/tpu_vm.sh', 'start', *TPU[1:], *SLICE, *BUCKET], env=env, capture_output=True, timeout=60)
  calls = (tmp_path / 'calls').read_text()  # policy and template are said to be there
  for what in ('instance-templates', 'resource-policies'):
    assert calls.index(f'{what} delete') < calls.index(f'{what} create')
  assert again.returncode == 1 and 'managed create' in calls  # still no machines


def test_gpu_host_finds_the_home_folder_and_leaves_a_run_alone(tmp_path):
  (tmp_path / 'runs').mkdir()
  out = subprocess.run(
    ['bash', 'launch/gpu_host.sh', '--dry-run', 'log', '--', '--workdir=~/runs'],
    env={'HOME': str(tmp_path), 'PATH': '/usr/bin:/bin'},
    capture_output=True,
    text=True,
  )
  assert f'{tmp_path}/runs/train.log' in out.stdout
  running = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', 'beitv2_jax.main'])
  (tmp_path / 'runs' / 'launch.pid').write_text(f'{running.pid}\n')
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  (tmp_path / '.venv' / 'bin' / 'python').symlink_to(sys.executable)
  again = subprocess.run(
    ['bash', Path('launch/gpu_host.sh').absolute(), 'start', '--', f'--workdir={tmp_path}/runs'],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  running.kill()
  assert again.returncode == 2 and 'is going on; stop it first' in again.stderr
  assert (tmp_path / 'runs' / 'launch.pid').read_text() == f'{running.pid}\n'
