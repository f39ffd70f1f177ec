"""The launch scripts print what they would do."""

import subprocess

import pytest

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


@pytest.mark.parametrize('command', ['create', 'install', 'start', 'log', 'resume', 'delete'])
def test_tpu_vm(command):
  where = ['--dry-run', '--name', 'b16', '--zone', 'z', '--type', 'v5litepod-16', '--version', 'v2', '--spot']
  out = dry('launch/tpu_vm.sh', command, *where, *(TRAIN if command in ('start', 'resume') else []))
  assert out.returncode == 0, out.stderr
  lines = out.stdout.splitlines()
  assert all('b16' in line for line in lines if line.startswith('gcloud'))
  if command == 'resume':
    verbs = ' '.join(line for line in lines)
    assert [verbs.index(v) for v in ('delete', 'create', 'wait until', 'scp', 'beitv2_jax.main')] == sorted(
      verbs.index(v) for v in ('delete', 'create', 'wait until', 'scp', 'beitv2_jax.main')
    )
    assert '--spot' in lines[1]
  if command in ('start', 'resume'):
    assert '--worker=all' in lines[-1] and '--distributed' in lines[-1]


def test_tpu_vm_errors():
  assert dry('launch/tpu_vm.sh').returncode == 2
  assert 'give --name and --zone' in dry('launch/tpu_vm.sh', 'start', '--name', 'x').stderr
  assert 'create needs --type' in dry('launch/tpu_vm.sh', 'create', '--name', 'x', '--zone', 'z').stderr
  assert 'unknown option --nme' in dry('launch/tpu_vm.sh', 'create', '--nme', 'x').stderr
