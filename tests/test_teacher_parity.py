"""Teachers that our own ViT reads, against their torch twins in transformers and timm: tiny, with random weights."""

import json

import jax
import numpy as np
import pytest

from beitv2_jax.models import teacher, vision_teachers

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def _exact():
  from tests.test_parity import import_timm

  import_timm()
  with jax.default_matmul_precision('highest'):
    yield


SIZE = dict(hidden_size=32, num_attention_heads=2, num_hidden_layers=3, patch_size=8, image_size=32)


def random_weights(model, seed=0):
  import torch

  torch.manual_seed(seed)
  for name, p in model.named_parameters():
    torch.nn.init.normal_(p, mean=1.0 if 'norm' in name and name.endswith('weight') else 0.0, std=0.2)
  return model.eval()


def pictures(size=32):
  return np.random.default_rng(0).uniform(size=(2, size, size, 3)).astype(np.float32)


def theirs_of(model, images, spec, **kwargs):
  """(all hidden states, last hidden state) as numpy."""
  import torch

  x = ((images - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32)
  with torch.no_grad():
    out = model(pixel_values=torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), output_hidden_states=True, **kwargs)
  return out


def clip(folder):
  from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

  model = random_weights(CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZE, intermediate_size=64, projection_dim=24)))
  model.save_pretrained(folder)
  head = lambda out: model.visual_projection(model.vision_model.post_layernorm(out.last_hidden_state[:, 1:]))
  return 'clip', lambda images, spec: head(theirs_of(model, images, spec)).detach().numpy()


def siglip(folder):
  from transformers import SiglipVisionConfig, SiglipVisionModel

  model = random_weights(SiglipVisionModel(SiglipVisionConfig(**SIZE, intermediate_size=64)))
  model.save_pretrained(folder)
  return 'siglip', lambda images, spec: theirs_of(model, images, spec).last_hidden_state.numpy()


def dino(folder):
  from transformers import ViTConfig, ViTModel

  model = random_weights(ViTModel(ViTConfig(**SIZE, intermediate_size=64, layer_norm_eps=1e-6), add_pooling_layer=False))
  model.save_pretrained(folder)
  return 'dino', lambda images, spec: theirs_of(model, images, spec).last_hidden_state[:, 1:].numpy()


def dinov2(folder, registers=0, swiglu=False):
  from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

  more = dict(mlp_ratio=2, use_swiglu_ffn=swiglu)
  if registers:
    model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZE, **more, num_register_tokens=registers))
  else:
    model = Dinov2Model(Dinov2Config(**SIZE, **more))
  random_weights(model).save_pretrained(folder)
  return 'dinov2', lambda images, spec: theirs_of(model, images, spec).last_hidden_state[:, 1 + registers :].numpy()


def dinov3(folder, gated=False):
  from transformers import DINOv3ViTConfig, DINOv3ViTModel

  more = dict(intermediate_size=64, num_register_tokens=3, use_gated_mlp=gated, hidden_act='silu' if gated else 'gelu')
  model = random_weights(DINOv3ViTModel(DINOv3ViTConfig(**SIZE, **more)))
  model.save_pretrained(folder)
  return 'dinov3', lambda images, spec: theirs_of(model, images, spec).last_hidden_state[:, 4:].numpy()


def timm(folder, **more):
  import safetensors.torch
  import timm as library
  import torch

  model = random_weights(library.create_model('vit_tiny_patch16_224', img_size=64, depth=3, **more))
  folder.mkdir(exist_ok=True)
  safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / 'model.safetensors')
  preparation = dict(mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.1])
  (folder / 'config.json').write_text(json.dumps(dict(architecture='vit_tiny_patch16_224', pretrained_cfg=preparation)))

  def run(images, spec):
    assert spec.mean == (0.5, 0.4, 0.3) and spec.heads == 3
    x = ((images - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32).transpose(0, 3, 1, 2).copy()
    with torch.no_grad():
      return model.forward_features(torch.from_numpy(x))[:, model.num_prefix_tokens :].numpy()

  return 'timm', run


def naflex(folder):
  """SigLIP 2 for flexible sizes: its table of 4 x 4 positions is resized to any grid, here 3 x 5."""
  import torch
  from transformers import Siglip2VisionConfig, Siglip2VisionModel

  more = {k: v for k, v in SIZE.items() if k != 'image_size'}
  model = random_weights(Siglip2VisionModel(Siglip2VisionConfig(**more, intermediate_size=64, num_patches=16)))
  model.save_pretrained(folder)

  def run(images, spec):
    x = (images - np.array(spec.mean)) / np.array(spec.std)
    b, h, w, _ = x.shape
    x = x.reshape(b, h // 8, 8, w // 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, 192).astype(np.float32)
    with torch.no_grad():
      shapes = torch.tensor([[h // 8, w // 8]] * b)
      return model(torch.from_numpy(x), torch.ones(x.shape[:2], dtype=torch.int32), shapes).last_hidden_state.numpy()

  return 'siglip', run


def open_clip(folder, quick_gelu=False):
  import open_clip as library
  import safetensors.torch
  import torch

  vision = dict(image_size=32, layers=3, width=32, head_width=16, patch_size=8)
  text = dict(context_length=8, vocab_size=16, width=32, heads=2, layers=1)
  model = random_weights(library.CLIP(24, library.CLIPVisionCfg(**vision), library.CLIPTextCfg(**text), quick_gelu=quick_gelu))
  folder.mkdir(exist_ok=True)
  safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / 'open_clip_model.safetensors')
  preparation = dict(mean=[0.5, 0.4, 0.3], std=[0.3, 0.2, 0.1])
  described = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)
  (folder / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=described, preprocess_cfg=preparation)))
  model.visual.output_tokens = True

  def run(images, spec):
    assert spec.mean == (0.5, 0.4, 0.3)
    x = ((images - np.array(spec.mean)) / np.array(spec.std)).astype(np.float32).transpose(0, 3, 1, 2).copy()
    with torch.no_grad():
      return (model.visual(torch.from_numpy(x))[1] @ model.visual.proj).numpy()

  return 'open_clip', run


CASES = dict(
  clip=clip,
  naflex=naflex,
  open_clip=open_clip,
  open_clip_quick=lambda f: open_clip(f, quick_gelu=True),
  siglip=siglip,
  dino=dino,
  dinov2=dinov2,
  registers=lambda f: dinov2(f, registers=3),
  swiglu=lambda f: dinov2(f, swiglu=True),
  dinov3=dinov3,
  gated=lambda f: dinov3(f, gated=True),
  timm=timm,
  timm_scaled=lambda f: timm(f, init_values=0.1),
)


@pytest.mark.parametrize('case', CASES)
def test_features_are_those_of_the_torch_model(case, tmp_path):
  kind, theirs = CASES[case](tmp_path / 'teacher')
  spec, params = vision_teachers.load(kind, str(tmp_path / 'teacher'))
  images = pictures(64 if kind == 'timm' else 32)
  if case == 'naflex':
    images = np.concatenate([images[:, :24], images[:, :24, ::-1]], 2)[:, :, :40]
  ours = jax.jit(lambda p, x: vision_teachers.apply(spec, p, x))(params, images)
  expected = theirs(images, spec)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(ours, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('case', ['clip', 'dino'])
def test_both_doors_give_the_same(case, tmp_path):
  """transformers' Flax classes, and our own reader that takes over where they are gone."""
  folder = tmp_path / 'teacher'
  if case == 'clip':  # the Flax class wants the text tower too
    from transformers import CLIPConfig, CLIPModel

    tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
    config = CLIPConfig(
      text_config=dict(**tower, vocab_size=9), vision_config=dict(**tower, patch_size=8, image_size=32), projection_dim=24
    )
    random_weights(CLIPModel(config)).save_pretrained(folder)
  else:
    dino(folder)
  images, both = pictures(48), []
  for flax in (True, False):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(teacher, 'has_flax', lambda flax=flax: flax)
      opened, params = teacher.load(case, str(folder), (4, 4))
      both.append((opened.width, np.asarray(opened.apply(params, images))))
  assert both[0][0] == both[1][0] == both[0][1].shape[-1]
  np.testing.assert_allclose(both[0][1], both[1][1], atol=1e-4)


def test_rotary_positions_follow_any_grid(tmp_path):
  """DINOv3 at another size than its config's, as torch does it: its angles come from the image itself."""
  kind, theirs = dinov3(tmp_path / 'teacher')
  spec, params = vision_teachers.load(kind, str(tmp_path / 'teacher'))
  images = np.random.default_rng(0).uniform(size=(1, 40, 64, 3)).astype(np.float32)
  np.testing.assert_allclose(vision_teachers.apply(spec, params, images), theirs(images, spec), atol=1e-4, rtol=1e-4)


def test_the_mean_of_several_layers(tmp_path):
  import torch
  from transformers import Dinov2Config, Dinov2Model

  model = random_weights(Dinov2Model(Dinov2Config(**SIZE, mlp_ratio=2)))
  model.save_pretrained(tmp_path / 'teacher')
  spec, params = vision_teachers.load('dinov2', str(tmp_path / 'teacher'))
  states = theirs_of(model, pictures(), spec).hidden_states  # of the embeddings, and of each block
  with torch.no_grad():
    expected = torch.stack([model.layernorm(states[i]) for i in (1, 3)]).mean(0)[:, 1:].numpy()
  np.testing.assert_allclose(vision_teachers.apply(spec, params, pictures(), layers=(1, 3)), expected, atol=1e-4, rtol=1e-4)


def test_a_tokenizer_learns_from_dinov2(tmp_path):
  """By the recipe, from a directory; another kind, a layer it has not, and missing arrays are said in words."""
  import safetensors.numpy

  from beitv2_jax.errors import UserError
  from beitv2_jax.tensor_files import files
  from beitv2_jax.training import loop
  from tests.conftest import smoke

  dinov2(tmp_path / 'teacher', registers=2)
  config = smoke('tokenizer', teacher__kind='dinov2', teacher__name=str(tmp_path / 'teacher'), teacher__layers=(2, 3), steps=2)
  assert loop.run(config, tmp_path / 'run')['rec_loss'] < 1.2
  for changes, message in (
    (dict(teacher__kind='dinov3'), "is a 'dinov2_with_registers' model: give teacher.kind=dinov2"),
    (dict(teacher__layers=(4,)), 'this teacher has blocks 1 to 3'),
    (dict(teacher__name=''), 'teacher.name is empty'),
    (dict(teacher__name='/nowhere/at/all'), 'no teacher in /nowhere/at/all'),
  ):
    given = dict(teacher__kind='dinov2', teacher__name=str(tmp_path / 'teacher')) | changes
    with pytest.raises(UserError, match=message):
      loop.run(smoke('tokenizer', **given), tmp_path / 'other')
  state = files.read_state(tmp_path / 'teacher')
  state.pop('encoder.layer.1.mlp.fc1.weight')
  safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, tmp_path / 'teacher' / 'model.safetensors')
  with pytest.raises(UserError, match='lacks encoder.layer.1.mlp.fc1.weight, which a dinov2 teacher has'):
    vision_teachers.load('dinov2', str(tmp_path / 'teacher'))
