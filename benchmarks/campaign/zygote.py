"""Training processes that start at once: a process that has imported everything forks for each run. That is what makes a thousand kills
an hour possible on two cores; what is killed is a training process like any other."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def serve() -> None:
  """Reads {"start": arguments, "out": file} and {"wait": pid} from stdin, and answers with a pid or an exit code."""
  from beitv2_jax import main
  from beitv2_jax.training import loop, peers  # noqa: F401

  peers.FIND_SECONDS = 40.0  # nobody waits longer here

  for line in sys.stdin:
    request = json.loads(line)
    if 'wait' in request:
      status = os.waitpid(request['wait'], 0)[1]
      print(os.waitstatus_to_exitcode(status), flush=True)
      continue
    pid = os.fork()
    if pid == 0:
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      os.setsid()
      out = os.open(request['out'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
      for number in (1, 2):
        os.dup2(out, number)
      os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
      try:
        main.main(['main', *request['start']])
      except SystemExit as e:
        main.end(e.code if isinstance(e.code, int) else 0 if e.code is None else 1)
      os._exit(0)
    print(pid, flush=True)


class Zygote:
  """Starts runs. Each is like a Popen: pid, poll, communicate, returncode, send_signal."""

  def __init__(self, **environment: str):
    command = [sys.executable, '-m', 'benchmarks.campaign.zygote']
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def ask(self, **request) -> int:
    assert self.process.stdin and self.process.stdout
    self.process.stdin.write(json.dumps(request) + '\n')
    self.process.stdin.flush()
    return int(self.process.stdout.readline())

  def start(self, arguments: list[str]) -> 'Run':
    return Run(self, arguments)


class Run:
  def __init__(self, zygote: Zygote, arguments: list[str]):
    self.zygote, self.returncode = zygote, None
    descriptor, self.out = tempfile.mkstemp(prefix='campaign-')
    os.close(descriptor)
    self.pid = zygote.ask(start=arguments, out=self.out)

  def poll(self) -> int | None:
    if self.returncode is None and Path(f'/proc/{self.pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z':
      self.returncode = self.zygote.ask(wait=self.pid)
    return self.returncode

  def communicate(self, timeout: float = 600) -> tuple[str, None]:
    until = time.monotonic() + timeout
    while self.poll() is None:
      if time.monotonic() > until:
        raise subprocess.TimeoutExpired('a run', timeout)
      time.sleep(0.02)
    text = Path(self.out).read_text(errors='replace')
    Path(self.out).unlink()
    return text, None

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)


if __name__ == '__main__':
  serve()
