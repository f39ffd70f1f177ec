"""Our logits against timm and Hugging Face running our exported weights, and Flax teachers against their torch twins."""

import jax
import numpy as np
import pytest
from PIL import Image

import beitv2_jax
from beitv2_jax import config as config_lib
from beitv2_jax.downstream import predictions
from beitv2_jax.models import images as images_lib
from beitv2_jax.models import teacher, upernet
from beitv2_jax.models.classifier import Classifier
from beitv2_jax.models.mim import MIM
from beitv2_jax.models.upernet import Segmenter
from beitv2_jax.tensor_files import files
from beitv2_jax.weights import convert
from tests.test_convert import random_state

pytestmark = pytest.mark.parity
torch = pytest.importorskip('torch', reason='make test-parity installs it')


@pytest.fixture(autouse=True)
def _exact():
  import_timm()  # transformers looks for torchvision too, whichever test comes first
  with jax.default_matmul_precision('highest'):
    yield


def small(state):
  """Random weights of a size that keeps activations near one."""
  return {k: (1 + 0.1 * v if k.endswith('norm1.weight') or k.endswith('norm2.weight') else 0.2 * v) for k, v in state.items()}


def imported(tmp_path, kind, module, **sizes):
  """A .pth as torch writes it → our directory."""
  state = small(random_state(kind, module))
  torch.save({'module': {k: torch.from_numpy(v) for k, v in state.items()}, 'epoch': 3, 'args': None}, tmp_path / 'in.pth')
  read = files.read_state(tmp_path / 'in.pth')
  assert all((read[k] == v).all() for k, v in state.items()) and len(read) == len(state)
  convert.import_checkpoint(kind, tmp_path / 'in.pth', tmp_path / 'dir', **sizes)
  return beitv2_jax.load(tmp_path / 'dir')


def images(n=2, size=32):
  return np.random.default_rng(0).normal(size=(n, size, size, 3)).astype(np.float32)


def nchw(x):
  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def import_timm():
  real = torch.library.register_fake

  def skip_torchvision(name, *args, **kwargs):  # PyPI's torchvision has no compiled operators for a CPU torch; timm needs none
    return (lambda f: f) if isinstance(name, str) and name.startswith('torchvision::') else real(name, *args, **kwargs)

  torch.library.register_fake = skip_torchvision
  try:
    import timm
  finally:
    torch.library.register_fake = real
  return timm


def test_timm(tmp_path):
  model = imported(tmp_path, 'classifier', Classifier(32, 3, 2, 8, (4, 4), 7))
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'timm.safetensors', 'timm')
  theirs = import_timm().create_model(
    'beitv2_base_patch16_224', img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7, checkpoint_path=str(tmp_path / 'timm.safetensors')
  ).eval()  # fmt: skip
  with torch.no_grad():
    expected = theirs(nchw(images())).numpy()
  np.testing.assert_allclose(model.logits(images(), normalize=False), expected, atol=1e-4)
  assert expected.std() > 0.1


def test_hugging_face_classifier(tmp_path):
  from transformers import BeitForImageClassification, BeitModel

  model = imported(tmp_path, 'classifier', Classifier(32, 3, 2, 8, (4, 4), 7))
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'hf', 'hf')
  theirs, report = BeitForImageClassification.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  with torch.no_grad():
    expected = theirs.eval()(nchw(images())).logits.numpy()
    hidden = BeitModel.from_pretrained(tmp_path / 'hf').eval()(nchw(images())).last_hidden_state.numpy()
  np.testing.assert_allclose(model.logits(images(), normalize=False), expected, atol=1e-4)
  np.testing.assert_allclose(model.features(images(), normalize=False)['patches'], hidden[:, 1:], atol=1e-4)


def test_hugging_face_masked_image_modeling(tmp_path):
  from transformers import BeitForMaskedImageModeling

  model = imported(tmp_path, 'pretrain', MIM(32, 4, 2, 8, (4, 4), 24, early_layer=3), early=3)
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'hf', 'hf')
  theirs, report = BeitForMaskedImageModeling.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  mask = np.random.default_rng(1).random((2, 16)) < 0.4
  with torch.no_grad():
    expected = theirs.eval()(nchw(images()), bool_masked_pos=torch.from_numpy(mask)).logits.numpy()
  np.testing.assert_allclose(model.masked_logits(images(), mask, normalize=False)[0], expected, atol=1e-4)


def test_hugging_face_segmentation(tmp_path):
  """Loaded as it stands; the last block of the backbone is read, which theirs has no index for without the spare block."""
  from transformers import BeitForSemanticSegmentation

  module = Segmenter(32, 4, 2, 8, (6, 6), 7, (0, 1, 2, 3), channels=32, aux_channels=16)
  model = imported(tmp_path, 'segmenter', module, out_indices=(0, 1, 2, 3))
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'hf', 'hf')
  theirs, report = BeitForSemanticSegmentation.from_pretrained(tmp_path / 'hf', output_loading_info=True)
  assert not report['missing_keys'] and not report['unexpected_keys']
  x = images(size=48)
  with torch.no_grad():
    expected = theirs.eval()(nchw(x)).logits.numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(model.logits(x, normalize=False), expected, atol=1e-4)
  # and back: their file under their names is read as it is
  theirs.save_pretrained(tmp_path / 'again')
  convert.import_checkpoint('segmenter', tmp_path / 'again' / 'model.safetensors', tmp_path / 'back', out_indices=(0, 1, 2, 3))
  back = beitv2_jax.load(tmp_path / 'back')
  np.testing.assert_array_equal(
    back.variables['params']['backbone']['block_3']['attn']['qkv'], model.variables['params']['backbone']['block_3']['attn']['qkv']
  )
  np.testing.assert_allclose(back.logits(x, normalize=False), expected, atol=1e-4)


def test_batch_norm_and_resampling_are_torchs():
  """Also in training mode: the running variance is the unbiased one, and bins and borders are torch's."""
  x = np.random.default_rng(0).normal(size=(3, 7, 10, 4)).astype(np.float32)
  theirs = torch.nn.BatchNorm2d(4)
  expected = theirs.train()(nchw(x)).detach().numpy().transpose(0, 2, 3, 1)
  ours = upernet.BatchNorm()
  y, new = ours.apply(ours.init(jax.random.key(0), x, False), x, True, mutable=['batch_stats'])
  np.testing.assert_allclose(y, expected, atol=1e-5)
  np.testing.assert_allclose(new['batch_stats']['mean'], theirs.running_mean, atol=1e-6)
  np.testing.assert_allclose(new['batch_stats']['var'], theirs.running_var, atol=1e-6)
  for size in ((3, 4), (14, 21)):
    linear = torch.nn.functional.interpolate(nchw(x), size=size, mode='bilinear', align_corners=False).numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(upernet.resample(x, size), linear, atol=1e-5)
  pooled = torch.nn.functional.adaptive_avg_pool2d(nchw(x), (3, 6)).numpy().transpose(0, 2, 3, 1)
  np.testing.assert_allclose(upernet.resample(x, (3, 6), upernet.pool_weights), pooled, atol=1e-5)


def test_clip_teacher(tmp_path):
  from transformers import CLIPConfig, CLIPModel

  tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
  config = CLIPConfig(text_config=dict(**tower, vocab_size=9), vision_config=dict(**tower, patch_size=8, image_size=32), projection_dim=24)
  theirs = CLIPModel(config).eval()
  for p in theirs.parameters():
    torch.nn.init.normal_(p, std=0.2)
  theirs.save_pretrained(tmp_path / 'clip')
  ours, params = teacher.load('clip', str(tmp_path / 'clip'), (4, 4))
  x = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    vision = theirs.vision_model(nchw(np.asarray(images_lib.normalize(x, images_lib.CLIP_MEAN, images_lib.CLIP_STD))))
    expected = theirs.visual_projection(theirs.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])).numpy()
  np.testing.assert_allclose(ours.apply(params, x), expected, atol=1e-4, rtol=1e-4)


def test_dino_teacher(tmp_path):
  from transformers import ViTConfig, ViTModel

  config = ViTConfig(
    hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2, patch_size=8, image_size=32, layer_norm_eps=1e-6
  )
  theirs = ViTModel(config, add_pooling_layer=False).eval()
  for p in theirs.parameters():
    torch.nn.init.normal_(p, std=0.2)
  theirs.save_pretrained(tmp_path / 'dino')
  ours, params = teacher.load('dino', str(tmp_path / 'dino'), (4, 4))
  x = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    expected = (
      theirs(nchw(np.asarray(images_lib.normalize(x, images_lib.IMAGENET_MEAN, images_lib.IMAGENET_STD)))).last_hidden_state[:, 1:].numpy()
    )
  np.testing.assert_allclose(ours.apply(params, x), expected, atol=1e-4, rtol=1e-4)


def photographs():
  """Smooth pictures, as Pillow images: wide, tall, grey, CMYK, with transparency, square."""
  rng, out = np.random.default_rng(0), []
  for size, mode in (((90, 60), 'RGB'), ((48, 71), 'RGB'), ((120, 33), 'L'), ((64, 52), 'CMYK'), ((40, 40), 'RGBA'), ((77, 58), 'RGB')):
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)
    out.append(coarse.convert(mode))
  return out


def cropped_alike(image, size=32, crop_pct=0.875):
  """Whether theirs, which rounds half a pixel down, crops where we and torchvision do, who round it to even."""
  short = int(size / crop_pct)
  long = int(short * max(image.size) / min(image.size))
  return (long - size) // 2 == round((long - size) / 2)


@pytest.fixture
def classifier(tmp_path):
  """A directory of ours with classes of its own, other statistics, and the same as Hugging Face's and timm's."""
  model = imported(tmp_path, 'classifier', Classifier(32, 3, 2, 8, (4, 4), 7))
  config = config_lib.load(tmp_path / 'dir').unlock()
  with config.data.ignore_type():
    config.data.mean, config.data.std = (0.5, 0.4, 0.5), (0.5, 0.5, 0.6)
  config.class_names = tuple(f'kind {i}' for i in range(7))
  config_lib.save(config, tmp_path / 'dir')
  model = beitv2_jax.load(tmp_path / 'dir')
  for form in ('hf', 'timm'):
    convert.export_checkpoint(tmp_path / 'dir', tmp_path / form, form)
  files = []
  for i, image in enumerate(photographs()):
    files.append(tmp_path / f'{i}.{"jpg" if image.mode == "CMYK" else "png"}')
    image.save(files[-1])
  ours = [{c['name']: c['probability'] for c in row['classes']} for row in predictions.classes(model, files, top=7)]
  return tmp_path, files, ours


def test_hugging_faces_pipeline_gives_our_probabilities(classifier):
  from transformers import pipeline

  folder, files, ours = classifier
  theirs = pipeline('image-classification', str(folder / 'hf'), top_k=7, use_fast=False)
  alike = [cropped_alike(Image.open(file)) for file in files]
  assert 4 <= sum(alike) < len(files)  # of the others the crop is one pixel aside
  for file, expected, same in zip(files, ours, alike):
    found = {row['label']: row['score'] for row in theirs(Image.open(file).convert('RGB') if file.suffix == '.jpg' else str(file))}
    assert found.keys() == expected.keys()
    if same:
      assert max(abs(found[k] - expected[k]) for k in found) < 1e-3, file


def test_timms_local_dir_gives_our_probabilities(classifier):
  timm = import_timm()
  folder, files, ours = classifier
  theirs = timm.create_model(f'local-dir:{folder}/timm', pretrained=True).eval()
  data = timm.data.resolve_model_data_config(theirs)
  assert (
    data['crop_pct'] == 0.875
    and data['crop_mode'] == 'center'
    and tuple(data['mean']) == (0.5, 0.4, 0.5)
    and tuple(data['std']) == (0.5, 0.5, 0.6)
  )
  transform = timm.data.create_transform(**data, is_training=False)
  assert theirs.pretrained_cfg['label_names'] == [f'kind {i}' for i in range(7)]
  for file, expected in zip(files, ours):
    with torch.no_grad():
      found = theirs(transform(Image.open(file).convert('RGB'))[None]).softmax(-1)[0].numpy()
    assert max(abs(found[i] - expected[f'kind {i}']) for i in range(7)) < 1e-3, file


@pytest.mark.parametrize('form', ['hf', 'timm'])
def test_what_leaves_comes_back_with_its_preparation_and_names(classifier, form):
  folder, files, ours = classifier
  convert.import_checkpoint('classifier', folder / form, folder / 'back')
  config = config_lib.load(folder / 'back')
  assert tuple(config.data.mean) == (0.5, 0.4, 0.5) and tuple(config.class_names) == tuple(f'kind {i}' for i in range(7))
  assert config.data.crop_pct == pytest.approx(0.875, abs=0.02)  # of whole pixels
  rows = list(predictions.classes(beitv2_jax.load(folder / 'back'), files, top=7))
  for row, expected in zip(rows, ours):
    assert {c['name']: c['probability'] for c in row['classes']} == pytest.approx(expected, abs=1e-4)


def test_microsofts_first_beit(tmp_path):
  """Mean and standard deviation 0.5, and names, in its own files: equal to 1e-4."""
  from transformers import BeitConfig, BeitForImageClassification, BeitImageProcessor

  config = BeitConfig(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8, use_relative_position_bias=True,
    use_mean_pooling=True, num_labels=3, id2label={0: 'cat', 1: 'dog', 2: 'eel'}, layer_norm_eps=1e-6,
  )  # fmt: skip
  theirs = BeitForImageClassification(config).eval()
  for p in theirs.parameters():
    torch.nn.init.normal_(p, std=0.2)
  processor = BeitImageProcessor(size=dict(height=32, width=32), do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
  theirs.save_pretrained(tmp_path / 'hf', max_shard_size='20KB')
  processor.save_pretrained(tmp_path / 'hf')
  assert len(list((tmp_path / 'hf').glob('*.safetensors'))) > 1
  convert.import_checkpoint('classifier', tmp_path / 'hf', tmp_path / 'dir')
  image = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
  with torch.no_grad():
    expected = theirs(**processor(Image.fromarray(image[0]), return_tensors='pt')).logits.numpy()
  model = beitv2_jax.load(tmp_path / 'dir')
  np.testing.assert_allclose(model.logits(image), expected, atol=1e-4)
  assert tuple(model.config.class_names) == ('cat', 'dog', 'eel')


@pytest.mark.parametrize('form', ['shards', 'bin'])
def test_a_teacher_in_several_files_or_as_a_bin(tmp_path, form):
  from transformers import CLIPConfig, CLIPModel

  tower = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_hidden_layers=2)
  config = CLIPConfig(text_config=dict(**tower, vocab_size=9), vision_config=dict(**tower, patch_size=8, image_size=32), projection_dim=24)
  theirs = CLIPModel(config).eval()
  theirs.save_pretrained(tmp_path / 'whole')
  theirs.save_pretrained(tmp_path / form, max_shard_size='50KB')
  if form == 'bin':
    for file in (tmp_path / form).glob('*.safetensors*'):
      file.unlink()
    torch.save(theirs.state_dict(), tmp_path / form / 'pytorch_model.bin')
  x = np.random.default_rng(0).uniform(size=(2, 32, 32, 3)).astype(np.float32)
  whole, parts = (
    ours.apply(params, x) for ours, params in (teacher.load('clip', str(tmp_path / name), (4, 4)) for name in ('whole', form))
  )
  np.testing.assert_array_equal(whole, parts)


@pytest.mark.parametrize('pooled', [True, False], ids=['pooled', 'cls'])
def test_timms_local_dir_of_a_model_without_bias_tables(tmp_path, pooled):
  """As fine-tuning starts from a tokenizer's encoder, and as a head on [CLS]."""
  kinds = dict(rel_pos='none', abs_pos=True, layer_scale=0.0) if pooled else dict(mean_pooling=False)
  model = imported(tmp_path, 'classifier', Classifier(32, 3, 2, 8, (4, 4), 7, **kinds), heads=2)
  convert.export_checkpoint(tmp_path / 'dir', tmp_path / 'timm', 'timm')
  theirs = import_timm().create_model(f'local-dir:{tmp_path}/timm', pretrained=True).eval()
  with torch.no_grad():
    expected = theirs(nchw(images())).numpy()
  np.testing.assert_allclose(model.logits(images(), normalize=False), expected, atol=1e-4)
  assert expected.std() > 0.1
