"""The explorer's figures and files; test_explorer_page.py opens them in a browser."""

import base64
import json
import shutil

import numpy as np
import pytest
from beitv2_jax.configs import pixels_b16
from PIL import Image

import beitv2_jax
from beitv2_jax import commands
from beitv2_jax import config as config_lib
from beitv2_jax.downstream import survey as surveys
from beitv2_jax.downstream.codes import tokenize
from beitv2_jax.downstream.survey import Survey
from beitv2_jax.models import from_config, quantizer
from beitv2_jax.pictures import explorer_files as files
from beitv2_jax.pictures import explorer_looks, site_data
from beitv2_jax.weights import stages as workdirs
from tests.conftest import smoke, untrained


def made_up(n=30, size=12, grid=(3, 4), classes=3, seed=0) -> Survey:
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, size - 2, (n, *grid)).astype(np.int32)  # the last two do not occur
  cosine = rng.uniform(0, 1, codes.shape).astype(np.float16)
  return Survey(
    codes, cosine, size, np.zeros((size, 4, 4, 3), np.float32), rng.integers(0, classes, n), [f'class {i}' for i in range(classes)]
  )


def test_counts_of_each_code():
  s = made_up()
  places, classes = surveys.positions(s), surveys.class_counts(s)
  for code in range(s.size):
    assert surveys.usage(s)[code] == (s.codes == code).sum()
    np.testing.assert_array_equal(places[code], (s.codes == code).sum(0))
    np.testing.assert_array_equal(classes[code], [(s.codes[s.labels == c] == code).sum() for c in range(3)])


def test_spread_and_purity_at_their_ends():
  places = np.zeros((3, 2, 2))
  places[0, 1, 1], places[1] = 7, 5
  np.testing.assert_allclose(surveys.spread(places), [0, 1, 0])
  # Half the data is of each class; a code of one class, one as the data, one of three quarters, one that does not occur.
  counts = np.array([[8, 0], [3, 3], [3, 1], [0, 10], [0, 0]])
  counts = np.concatenate([counts, [counts.sum(0)[::-1]]])
  quarter = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
  np.testing.assert_allclose(surveys.purity(counts)[:5], [1, 0, 1 - quarter, 1, 0], atol=1e-12)
  assert surveys.purity(np.array([[5], [3]])).tolist() == [0, 0]


def test_typical_patches_are_the_nearest_of_different_images():
  s = made_up(n=6, size=4, grid=(2, 2))
  found = surveys.typical(s, 4)
  for code in range(4):
    best = {}
    for i, r, c in np.argwhere(s.codes == code):
      best[i] = max(best.get(i, (-1.0, 0, 0)), (float(s.closeness[i, r, c]), r, c))
    order = sorted(best, key=lambda i: -best[i][0])[:4]
    assert found[code, : len(order)].tolist() == [[i, *best[i][1:]] for i in order]
    assert (found[code, len(order) :] == -1).all()


def test_codes_of_the_same_images_beat_chance():
  rng = np.random.default_rng(0)
  codes = rng.integers(4, 300, (200, 2, 3))
  codes[:50, 0, 0], codes[:50, 1, 1] = 0, 1  # always together
  codes[50:100, 0, 0] = 2
  s = Survey(codes, np.zeros(codes.shape, np.float16), 600, np.zeros((600, 2, 2, 3)))
  found, ratios = surveys.together(s, 3)
  assert found[0, 0] == 1 and found[1, 0] == 0
  assert ratios[0, 0] == pytest.approx(50 / (50 * 50 / 200))
  assert (found[599] == -1).all() and not any(0 in found[c] for c in range(300, 600))


def test_nearest_codes():
  x = np.random.default_rng(0).normal(size=(1500, 5)).astype(np.float32)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  codes, cosines = surveys.nearest(x, 3)
  whole = x @ x.T - 2 * np.eye(len(x))
  np.testing.assert_array_equal(codes, np.argsort(-whole, 1)[:, :3])
  np.testing.assert_allclose(cosines, np.sort(whole, 1)[:, :-4:-1], atol=1e-6)
  assert surveys.nearest(x[:2], 3)[0].tolist() == [[1, -1, -1], [0, -1, -1]]


def test_nearest_codes_of_a_grid_are_its_neighbours():
  grid = quantizer.fsq_grid((8, 4))
  codes, closeness = surveys.nearest(grid, 2)
  assert (closeness <= 1).all()
  corner = int(np.flatnonzero((grid == [-1, -1]).all(1))[0])
  assert grid[codes[corner]].tolist() == [[-0.75, -1.0], [-0.5, -1.0]]  # a step and two along the finer axis
  np.testing.assert_allclose(closeness[corner], [1 - 0.25**2 / 2, 1 - 0.5**2 / 2], atol=1e-6)


def test_agreement_of_two_tokenizers():
  s = made_up(n=400)
  renamed = Survey(s.codes[..., ::1] * 3 % 31, s.closeness, 31, s.mean_patches)
  same = surveys.agreement(surveys.contingency(s, renamed))
  assert same['normalized'] == pytest.approx(1) and same['information'] == pytest.approx(same['entropy_a'])
  assert surveys.agreement(surveys.contingency(s, made_up(n=400, seed=1)))['normalized'] < 0.02
  halved = surveys.agreement(surveys.contingency(s, Survey(s.codes // 2, s.closeness, 6, s.mean_patches)))
  assert halved['information'] == pytest.approx(halved['entropy_b']) and halved['entropy_b'] < halved['entropy_a']


def test_mean_patches():
  rng = np.random.default_rng(0)
  images, codes = rng.integers(0, 256, (3, 8, 8, 3), np.uint8), rng.integers(0, 3, (3, 2, 2))
  sums, counts = np.zeros((4, 48), np.float32), np.zeros(4)
  surveys.add_patches(sums, counts, images, codes)
  for code in range(4):
    members = [images[i, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4] for i, r, c in np.argwhere(codes == code)]
    assert counts[code] == len(members)
    np.testing.assert_allclose(sums[code].reshape(4, 4, 3), np.sum(members, 0, dtype=float) if members else 0)


def test_short_features_keep_cosines():
  rng = np.random.default_rng(0)
  target = rng.normal(size=(500, 6)) @ rng.normal(size=(6, 50)) + 0.01 * rng.normal(size=(500, 50))
  basis = explorer_looks.Basis.fit(target, rng.normal(size=(500, 9)))
  short = basis.short(target).astype(float) / basis.scale
  unit = target / np.linalg.norm(target, axis=1, keepdims=True)
  assert np.abs(short @ short.T - unit @ unit.T).max() < 0.03 and basis.error < 0.01


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
  """Two untrained tokenizers, a pixel decoder of the first, and images in class folders."""
  root = tmp_path_factory.mktemp('explorer')
  for i, name in enumerate(('one', 'two')):
    untrained(smoke('tokenizer', model__teacher_width=8), root / name, seed=i + 1)
  config = pixels_b16.get_config('smoke').unlock()
  config.tokenizer_from, config.mesh.data = str(root / 'one'), 1
  tokenizer = beitv2_jax.load(root / 'one')
  config.model.update({k: tokenizer.config.model[k] for k in ('patch_size', 'codes', 'code_dim')})
  variables = from_config.fresh_variables(config.lock())
  variables['codebook'] = dict(embedding=tokenizer.variables['codebook']['quantizer']['embedding'])
  (root / 'pixels').mkdir()
  config_lib.save(config, root / 'pixels')
  workdirs.write_variables(root / 'pixels', 0, variables)
  rng = np.random.default_rng(0)
  for i in range(24):
    path = root / 'images' / f'kind {i % 3}' / f'{i:02d}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = rng.integers(0, 256, (5, 5, 3), np.uint8)
    Image.fromarray(coarse.repeat(8, 0).repeat(8, 1)).save(path)
  for kind, picture in (('images', (16, 16, 3)), ('masks', (16, 16))):
    for split in ('train', 'val'):
      path = root / 'scenes' / split / kind / '0.png'
      path.parent.mkdir(parents=True)
      Image.fromarray(np.zeros(picture, np.uint8)).save(path)
  return root


def explore(stages, out, *more, source=None):
  return commands.run(
    'explore', ['--from', f'{stages}/one', '--data', source or f'folder:{stages}/images', '--out', str(out), *map(str, more)]
  )


@pytest.fixture(scope='module')
def site(stages, tmp_path_factory):
  out = tmp_path_factory.mktemp('site') / 'site'
  assert explore(stages, out, '--compare', f'{stages}/two', '--shown', 10) == 0
  return out


def test_the_site_says_what_the_tokenizer_does(stages, site):
  summary = files.read_summary(site)
  assert summary['surveyed'] == 24 and summary['images'] == 10 and summary['classes'] == ['kind 0', 'kind 1', 'kind 2']
  book = summary['books'][0]
  assert sum(book['counts']) == book['patches'] == 24 * 16 and len(book['order']) == book['used'] == len(book['map'])
  assert site_data.read(site / 'data' / 'compare.js').keys() >= {'information', 'normalized', 'a', 'b'}
  # Image 3 of the page, through the tokenizer once more.
  model, name, label = beitv2_jax.load(stages / 'one'), summary['names'][3], summary['labels'][3]
  _, codes = tokenize(model, [stages / 'images' / f'kind {label}' / name])
  np.testing.assert_array_equal(files.read_codes(site, 0, summary['grid'])['a'][3], codes[0])
  # What is said of a code agrees with the counts.
  code = book['order'][0]
  about = site_data.read(site / 'a' / 'codes' / '000.js')[str(code)]
  heat = np.frombuffer(base64.b64decode(about['heat']), np.uint8)
  assert len(heat) == 16 and heat.max() == 255 and len(about['typical']) == files.CELLS
  assert sum(share for _, share in about['classes']) == pytest.approx(1, abs=1e-3)
  look = site_data.read(site / 'images' / 'looks' / '00003.js')
  seen = np.frombuffer(base64.b64decode(look['attention']), np.uint8).reshape(17, 16)
  assert (seen.max(1) == 255).all() and np.frombuffer(base64.b64decode(look['colors']), np.uint8).size == 48
  assert Image.open(site / 'a' / 'details' / '000.jpg').size == (files.CELLS * files.DETAIL, book['used'] * files.DETAIL)
  assert not list(site.glob('tmp*'))


def test_images_of_ones_own(stages, site, tmp_path, capsys):
  out = tmp_path / 'site'
  shutil.copytree(site, out)
  arguments = ['--from', f'{stages}/one', '--compare', f'{stages}/two', '--out', str(out), '--add', f'{stages}/images/kind 1']
  before = files.read_codes(out, 0, [4, 4])
  assert commands.run('explore', arguments) == 0
  assert 'the first is #image=10' in capsys.readouterr().out
  summary, after = files.read_summary(out), files.read_codes(out, 0, [4, 4])
  assert summary['images'] == 18 and summary['added'] == list(range(10, 18)) and len(summary['names']) == len(summary['labels']) == 18
  for key in 'ab':
    np.testing.assert_array_equal(after[key][:10], before[key])
    assert len(after[key]) == 18
  assert (out / 'images' / '00017.jpg').exists() and (out / 'images' / 'looks' / '00017.js').exists()
  assert commands.run('explore', arguments) == 0 and files.read_summary(out)['images'] == 26
  arguments[3] = f'{stages}/one'
  assert commands.run('explore', arguments) == 2
  assert 'the explorer in' in capsys.readouterr().err


def test_added_images_are_looked_at_by_the_same_model(stages, tmp_path, capsys):
  assert explore(stages, tmp_path, '--features-from', f'{stages}/two') == 0
  arguments = ['--from', f'{stages}/one', '--out', str(tmp_path), '--add', f'{stages}/images/kind 1']
  assert commands.run('explore', arguments) == 2
  assert f'has features of {stages}/two: give the same --features-from' in capsys.readouterr().err
  assert commands.run('explore', [*arguments, '--features-from', f'{stages}/two']) == 0


def test_images_are_cropped_as_the_tokenizer_was_evaluated(stages, tmp_path, capsys):
  untrained(smoke('tokenizer', model__teacher_width=8, data__crop_pct=0.5), tmp_path / 'one')
  shutil.copytree(stages / 'images', tmp_path / 'images')
  assert explore(tmp_path, tmp_path / 'site') == 0
  summary, model = files.read_summary(tmp_path / 'site'), beitv2_jax.load(tmp_path / 'one')
  name = tmp_path / 'images' / f'kind {summary["labels"][3]}' / summary['names'][3]
  codes = tokenize(model, [name])[1]
  np.testing.assert_array_equal(files.read_codes(tmp_path / 'site', 0, summary['grid'])['a'][3], codes[0])
  whole = beitv2_jax.load(stages / 'one')  # the same weights, with another crop
  assert not np.array_equal(codes, tokenize(whole, [name])[1])
  assert explore(tmp_path, tmp_path / 'other', '--compare', f'{stages}/two') == 2
  assert '--compare was trained on images that are cropped or read in another way' in capsys.readouterr().err


def test_faces_of_a_pixel_decoder(stages, tmp_path):
  assert explore(stages, tmp_path, '--pixels', f'{stages}/pixels') == 0
  book = files.read_summary(tmp_path)['books'][0]
  assert book['faces'] and Image.open(tmp_path / 'a' / 'means' / '000.png').size == (2 * files.MEAN, book['used'] * files.MEAN)


def test_without_the_teacher_the_decoder_stands_in(stages, tmp_path):
  shutil.copytree(stages / 'one', tmp_path / 'one')
  config = json.loads((tmp_path / 'one' / 'config.json').read_text())
  config['teacher'] = dict(kind='clip', name=str(tmp_path / 'gone'))
  (tmp_path / 'one' / 'config.json').write_text(json.dumps(config))
  out = tmp_path / 'site'
  assert commands.run('explore', ['--from', f'{tmp_path}/one', '--data', f'folder:{stages}/images', '--out', str(out), '--limit', '4']) == 0
  summary = files.read_summary(out)
  assert 'as the tokenizer' in summary['look']['target'] and summary['look']['dimensions'] == 8
  # Its eight directions are all there are: the cosines are those of the decoder's features.
  image = np.asarray(Image.open(stages / 'images' / f'kind {summary["labels"][0]}' / summary['names'][0]))
  from beitv2_jax.data.transforms import CenterCrop

  features = np.asarray(beitv2_jax.load(tmp_path / 'one').reconstruct(CenterCrop(32)(dict(image=image), None)['image'][None]))[0]
  features = features / np.linalg.norm(features, axis=1, keepdims=True)
  look = site_data.read(out / 'images' / 'looks' / '00000.js')
  short = np.frombuffer(base64.b64decode(look['features']), np.int8).reshape(16, 8) / look['scale']
  np.testing.assert_allclose(short @ short.T, features @ features.T, atol=0.03)


def test_a_source_of_one_image_without_labels(stages, tmp_path):
  folder = tmp_path / 'flat'
  folder.mkdir()
  shutil.copy(stages / 'images' / 'kind 0' / '00.png', folder)
  listing = tmp_path / 'list.txt'
  listing.write_text(f'{folder}/00.png\n' * 2)
  assert explore(stages, tmp_path / 'site', '--limit', 1, source=f'list:{listing}') == 0
  summary = files.read_summary(tmp_path / 'site')
  assert summary['surveyed'] == 1 and summary['classes'] is None and summary['labels'] is None and 'purity' not in summary['books'][0]
  assert set(summary['books'][0]['few'].values()) == {1}  # patches in a card


def test_images_that_do_not_decode_are_left_out(stages, tmp_path):
  shutil.copytree(stages / 'images', tmp_path / 'images')
  (tmp_path / 'images' / 'kind 1' / '04.png').write_bytes(b'nothing')
  assert explore(stages, tmp_path / 'site', source=f'folder:{tmp_path}/images') == 0
  summary = files.read_summary(tmp_path / 'site')
  assert summary['surveyed'] == 23 and summary['skipped'] == 1 and '04.png' not in summary['names']


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--data', 'folder:/nowhere'], 'no folder /nowhere'),
    ([], 'give --data SOURCE'),
    (['--data', 'fake:4', '--add', 'x.png'], 'give --data SOURCE'),
    (['--data', 'fake:4', '--pixels', '{stages}/two'], 'this is a tokenizer model'),
    (['--data', 'fake:4', '--compare', '{stages}/pixels'], '--compare is a pixels model'),
    (['--add', '{stages}/images'], 'no explorer in'),
    (['--data', 'scenes:{stages}/scenes'], 'are images with masks'),
  ],
)
def test_bad_input(stages, tmp_path, capsys, arguments, message):
  arguments = [a.format(stages=stages) for a in arguments]
  assert commands.run('explore', ['--from', f'{stages}/one', '--out', str(tmp_path / 'site'), *arguments]) == 2
  assert message in capsys.readouterr().err and not (tmp_path / 'site').exists()


def test_a_pixel_decoder_of_another_tokenizer(stages, tmp_path, capsys):
  arguments = ['--from', f'{stages}/two', '--data', 'fake:4', '--out', str(tmp_path / 'site'), '--pixels', f'{stages}/pixels']
  assert commands.run('explore', arguments) == 2
  assert 'is of another tokenizer' in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(stages, site, tmp_path, capsys):
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data' / 'precious.txt').write_text('mine')
  assert explore(stages, tmp_path) == 2
  assert 'is not empty and is no explorer' in capsys.readouterr().err and (tmp_path / 'data' / 'precious.txt').read_text() == 'mine'
  again = tmp_path / 'again'
  shutil.copytree(site, again)
  assert explore(stages, again, '--limit', 6) == 0 and files.read_summary(again)['surveyed'] == 6  # one of ours is made anew


def test_file_names_that_are_no_text(stages, tmp_path):
  import os

  shutil.copytree(stages / 'images', tmp_path / 'images')
  os.rename(
    tmp_path / 'images' / 'kind 0' / '00.png',
    os.fsencode(tmp_path / 'images' / 'kind 0') + b'/\xff</script>\xe2\x80\xa8.png'.replace(b'/s', b's'),
  )
  assert explore(stages, tmp_path / 'site', '--limit', 30, source=f'folder:{tmp_path}/images') == 0
  assert any('script>' in name for name in files.read_summary(tmp_path / 'site')['names'])
