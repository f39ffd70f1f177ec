"""One training step of ours against PyTorch, side by side: same sizes, same batch, same data type, taking turns.

  python benchmarks/steps.py --model mim-base --batch 4                       two CPU cores, fp32
  python benchmarks/steps.py --model mim-base --batch 128 --dtype bfloat16 --group 10    on a GPU: JAX and torch must both see it
  python benchmarks/steps.py --gpu 1 (then 2)       all that docs/performance.md compares on a GPU, in two calls of some minutes

The PyTorch side is made of timm's BEiT blocks (fused attention with the position bias as its mask), transformers' CLIP and torch's
fused AdamW, eager and compiled: what somebody would write today. Both sides make the images' codes or teacher features inside the step
and update all parameters; weights are random, images are made once. Needs the extras [test,parity]. Every side runs in a process of its
own; `--rounds` times in turn. The figure is the median group of each round; ratios are between the best medians.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import time

SIDES = ('ours', 'torch', 'torch-compile')
MODELS = ('vqkd-base', 'mim-base', 'mim-large', 'finetune-base')
GPU = {1: ('mim-base', 'mim-large'), 2: ('vqkd-base', 'finetune-base')}


def timed(args, step) -> list[float]:
  """Seconds a step: the first two (they compile), then, when told to go on, `steps` groups of `group`, with the loss read at the end of each."""
  times = []
  for count in [1, 1] + [args.group] * args.steps:
    if len(times) == 2:
      print('ready', flush=True)
      sys.stdin.readline()
    start = time.monotonic()
    for _ in range(count):
      loss = step()
    loss = float(loss)  # waits for the device
    times.append((time.monotonic() - start) / count)
  assert loss == loss
  return times


def ours(args) -> tuple[list[float], int]:
  import jax
  import numpy as np
  from beitv2_jax.configs import beitv2_b16, beitv2_l16, finetune_b16, vqkd_b16

  from beitv2_jax import config as config_lib
  from beitv2_jax import tasks
  from beitv2_jax.kernels import attention, chip, functions
  from beitv2_jax.models import flops
  from beitv2_jax.training import optim, sharding
  from beitv2_jax.training.process import use_compilation_cache
  from beitv2_jax.training.train_state import state_layout
  from beitv2_jax.training.train_step import make_train_step

  use_compilation_cache()
  recipes = {'vqkd-base': vqkd_b16, 'mim-base': beitv2_b16, 'mim-large': beitv2_l16, 'finetune-base': finetune_b16}
  c = recipes[args.model[0]].get_config().unlock()
  c.dtype = args.dtype
  if 'tokenizer_dtype' in c:
    c.tokenizer_dtype = args.tokenizer_dtype
  if args.model[0] == 'finetune-base':
    c.model.classes = 1000
  c.batch_size, c.layers.attention = args.batch, args.attention
  attention.check(config_lib.head_dims(c))  # as training does: a kernel that fails here is left alone
  functions.check()
  print(f'kernels left alone: {chip.refused}', file=sys.stderr)
  rng = np.random.default_rng(0)
  task, frozen = tasks.make(c, abstract=True)
  frozen = jax.tree.map(lambda x: 0.02 * rng.standard_normal(x.shape, np.float32), frozen)
  mesh = sharding.make_mesh(1, 1, jax.devices()[:1])
  tx, schedule = optim.make(c.optim, 1000, 10)
  layout = state_layout(task, tx, mesh, c)
  state, frozen = layout.init(jax.random.key(0)), sharding.put_replicated(frozen, mesh)
  batch = dict(image=rng.integers(0, 256, (args.batch, 224, 224, 3), np.uint8))
  if 'mask' in c:
    batch['mask_index'] = np.stack([np.sort(rng.permutation(196)[:75]) for _ in range(args.batch)]).astype(np.int32)
  if args.model[0] == 'finetune-base':
    batch['label'] = rng.integers(0, 1000, args.batch).astype(np.int32)
  batch = sharding.put_batch(batch, mesh)
  key = jax.random.key(1)
  update = jax.jit(
    make_train_step(task, tx, schedule, 1, layout), donate_argnums=0, out_shardings=(layout.shardings, sharding.replicated(mesh))
  )
  gflop = sum(flops.per_image(c).values()) / 1e9
  print(f'GFLOP an image: {gflop:.0f}', file=sys.stderr)

  def step():
    nonlocal state
    state, values = update(state, frozen, batch, key)
    return values['loss']

  with jax.set_mesh(mesh):
    times = timed(args, step)
    if args.profile:
      with jax.profiler.trace(args.profile):
        for _ in range(5):
          loss = step()
        jax.block_until_ready(loss)
  return times, (mesh.devices.flat[0].memory_stats() or {}).get('peak_bytes_in_use', 0)


def torch_model(name: str):
  """(module with .loss(images, masks), parameters to train) of the PyTorch side."""
  import torch
  import torch.nn.functional as F
  from torch import nn

  from tests.test_parity import import_timm

  import_timm()
  from timm.models.beit import Beit, Block
  from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

  norm = functools.partial(nn.LayerNorm, eps=1e-6)

  def beit(width=768, depth=12, heads=12, patch=16, chans=3, shared=False):
    return Beit(
      img_size=224 if patch == 16 else 14, patch_size=patch, in_chans=chans, num_classes=0, embed_dim=width, depth=depth, num_heads=heads,
      qkv_bias=True, init_values=0.1 if shared else None, use_abs_pos_emb=not shared, use_rel_pos_bias=False, use_shared_rel_pos_bias=shared,
      global_pool='', norm_layer=norm, drop_path_rate=0.1 if shared else 0.0,
    )  # fmt: skip

  def head(width, out):
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, out))

  class Tokenizer(nn.Module):
    def __init__(self):
      super().__init__()
      self.encoder, self.head = beit(), head(768, 32)
      self.register_buffer('codebook', F.normalize(torch.randn(8192, 32), dim=-1))

    def encode(self, x):
      return F.normalize(self.head(self.encoder(2 * x - 1)[:, 1:]).float(), dim=-1)

    def nearest(self, z):
      flat = z.reshape(-1, 32)
      return (flat.square().sum(1, keepdim=True) + self.codebook.square().sum(1) - 2 * flat @ self.codebook.T).argmin(1).view(z.shape[:2])

  class VQKD(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokenizer, self.decoder, self.out = Tokenizer(), beit(depth=3, patch=1, chans=32), head(768, 512)
      self.teacher = CLIPVisionModelWithProjection(CLIPVisionConfig(patch_size=16, projection_dim=512)).requires_grad_(False)

    def loss(self, x, index):
      with torch.no_grad():
        vision = self.teacher.vision_model
        hidden = vision(pixel_values=x).last_hidden_state[:, 1:]
        target = self.teacher.visual_projection(vision.post_layernorm(hidden))
      z = self.tokenizer.encode(x)
      codes = self.tokenizer.nearest(z.detach())
      book = self.tokenizer.codebook
      quantized = book[codes]
      with torch.no_grad():
        flat, ids = z.detach().reshape(-1, 32), codes.reshape(-1)
        counts = torch.zeros(8192, device=x.device).index_add_(0, ids, torch.ones_like(ids, dtype=torch.float32))
        sums = torch.zeros_like(book).index_add_(0, ids, flat)
        mean = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(0.99 * book + 0.01 * torch.where(counts[:, None] > 0, mean, book), dim=-1)
      commitment = (quantized - z).square().mean()
      grid = (z + (quantized - z).detach()).transpose(1, 2).reshape(-1, 32, 14, 14)
      features = self.out(self.decoder(grid)[:, 1:])
      self.tokenizer.codebook = moved
      return commitment + (1 - F.cosine_similarity(features.float(), target.float(), dim=-1)).mean()

  class MIM(nn.Module):
    def __init__(self, width, depth, heads, early):
      super().__init__()
      self.early, self.body = early, beit(width, depth, heads, shared=True)
      more = dict(dim=width, num_heads=heads, qkv_bias=True, init_values=0.1, norm_layer=norm)
      self.aggregation = nn.ModuleList([Block(**more, drop_path=0.09) for _ in range(2)])
      self.mask_token, self.lm_head = nn.Parameter(torch.zeros(1, 1, width)), nn.Linear(width, 8192)
      self.norm = nn.LayerNorm(width, eps=1e-6)
      self.tokenizer = Tokenizer().requires_grad_(False)
      self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
      self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def loss(self, x, index):
      with torch.no_grad():
        labels = self.tokenizer.nearest(self.tokenizer.encode(x)).gather(1, index).reshape(-1)
      body = self.body
      tokens = body.patch_embed((x - self.mean) / self.std)
      hidden = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, index, True)
      tokens = torch.where(hidden[:, :, None], self.mask_token.to(tokens.dtype), tokens)
      tokens = torch.cat([body.cls_token.expand(len(x), -1, -1).to(tokens.dtype), tokens], 1)
      bias = body.rel_pos_bias()
      for i, block in enumerate(body.blocks, 1):
        tokens = block(tokens, shared_rel_pos_bias=bias)
        if i == self.early:
          early = tokens[:, 1:]
      branch = torch.cat([tokens[:, :1], early], 1)
      for block in self.aggregation:
        branch = block(branch, shared_rel_pos_bias=bias)
      rows = (index + 1)[:, :, None].expand(-1, -1, tokens.shape[-1])
      return sum(F.cross_entropy(self.lm_head(self.norm(t.gather(1, rows))).flatten(0, 1), labels) for t in (tokens, branch))

  class Classifier(nn.Module):
    """timm's own, with mixup (or cutmix, which costs the same) and smoothed labels, as the recipe has them."""

    def __init__(self):
      super().__init__()
      import timm

      self.body = timm.create_model('beitv2_base_patch16_224', num_classes=1000, drop_path_rate=0.2)
      self.register_buffer('mean', torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
      self.register_buffer('std', torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def loss(self, x, index):
      labels = index[:, 0] % 1000
      target = 0.9 * F.one_hot(labels, 1000).float() + 0.1 / 1000
      x = (x - self.mean) / self.std
      x, target = 0.7 * x + 0.3 * x.flip(0), 0.7 * target + 0.3 * target.flip(0)
      return -(target * F.log_softmax(self.body(x).float(), -1)).sum(-1).mean()

  models = {
    'vqkd-base': VQKD, 'mim-base': lambda: MIM(768, 12, 12, 9), 'mim-large': lambda: MIM(1024, 24, 16, 21), 'finetune-base': Classifier,
  }  # fmt: skip
  return models[name]()


def theirs(args, compiled: bool) -> tuple[list[float], int]:
  import torch

  torch.manual_seed(0)
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  torch.backends.cuda.matmul.allow_tf32 = True
  model = torch_model(args.model[0]).to(device)
  params = [p for p in model.parameters() if p.requires_grad]
  decay = [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]
  groups = [dict(params=decay[0], weight_decay=0.05), dict(params=decay[1], weight_decay=0.0)]
  optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
  loss = torch.compile(model.loss) if compiled else model.loss
  images = torch.randint(0, 256, (args.batch, 3, 224, 224), dtype=torch.uint8, device=device)
  index = torch.stack([torch.randperm(196)[:75].sort().values for _ in range(args.batch)]).to(device)

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=args.dtype == 'bfloat16'):
      value = loss(images.float() / 255, index)
    value.backward()
    if 'mim' in args.model[0]:
      torch.nn.utils.clip_grad_norm_(params, 3.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value.detach()

  return timed(args, step), torch.cuda.max_memory_allocated() if device == 'cuda' else 0


def start(model: str, side: str, more: list[str]) -> subprocess.Popen:
  path = os.pathsep.join([os.getcwd(), os.environ.get('PYTHONPATH', '')])
  env = os.environ | dict(PYTHONPATH=path, XLA_PYTHON_CLIENT_PREALLOCATE='false')
  return subprocess.Popen(
    [sys.executable, __file__, *sys.argv[1:], *more, '--model', model, '--side', side],
    env=env,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', choices=MODELS, nargs='+', default=['mim-base'])
  parser.add_argument('--gpu', type=int, choices=GPU, help='one of the two calls, with the batches, types and groups of the documentation')
  parser.add_argument('--batch', type=int, default=4)
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument(
    '--tokenizer-dtype', choices=('float32', 'bfloat16'), default='float32', help='ours: the frozen tokenizer (float32, as the recipe)'
  )
  parser.add_argument('--steps', type=int, default=5, help='timed groups of steps; two steps come first')
  parser.add_argument('--group', type=int, default=1, help='steps in a group: more than one lets Python run ahead of the device')
  parser.add_argument('--attention', default='auto', help='ours: layers.attention')
  parser.add_argument('--profile', metavar='DIR', help='ours: a trace of five steps')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--sides', nargs='+', choices=SIDES, default=SIDES)
  parser.add_argument(
    '--together', action='store_true', help='all sides of a model compile at once (and share the memory); timed one by one all the same'
  )
  parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
  args, more = parser.parse_args(), []
  if args.gpu:
    more = '--batch 128 --dtype bfloat16 --steps 3 --group 10 --rounds 1 --together --sides ours torch-compile'.split()
    args = parser.parse_args(
      [*sys.argv[1:], *more, *(['--side', args.side, '--model', *args.model] if args.side else ['--model', *GPU[args.gpu]])]
    )
  if args.side:
    times, peak = ours(args) if args.side == 'ours' else theirs(args, args.side == 'torch-compile')
    return print(json.dumps(dict(first=times[0], steps=times[2:], peak=peak)))
  versions()
  best: dict[tuple[str, str], float] = {}
  pairs = [(model, side) for model in args.model for side in args.sides]
  for _ in range(args.rounds):
    for group in [[pair for pair in pairs if pair[0] == model] for model in args.model] if args.together else [[pair] for pair in pairs]:
      running = {pair: start(*pair, more) for pair in group}
      for (model, side), process in running.items():
        if 'ready' not in iter(lambda p=process: p.stdout.readline().strip() if p.poll() is None else 'ended', 'ended'):
          sys.exit(f'{model}, {side} failed; its message is above.')
      for (model, side), process in running.items():
        out = json.loads(process.communicate('go\n')[0].splitlines()[-1])
        median = statistics.median(out['steps'])
        memory = f', {out["peak"] / 2**30:.1f} GiB at its peak' if out['peak'] else ''
        print(
          f'{model:14s} {side:14s} {median:8.4f} s a step, {args.batch / median:9.2f} images/s{memory} (first step {out["first"]:.1f} s)',
          flush=True,
        )
        best[model, side] = min(median, best.get((model, side), median))
  for model, side in best:
    if side != 'ours' and (model, 'ours') in best:
      print(f'{model}: ours is {best[model, side] / best[model, "ours"]:.2f} times as fast as {side}')


def versions() -> None:
  """What is compared, and on what."""
  for package in ('jax', 'torch', 'timm', 'transformers'):
    print(f'{package} {importlib.metadata.version(package)}', end='  ')
  card = (
    subprocess.run(['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader'], capture_output=True, text=True)
    if shutil.which('nvidia-smi')
    else None
  )
  print(card.stdout.strip() if card else f'{os.cpu_count()} CPU cores', flush=True)


if __name__ == '__main__':
  main()
