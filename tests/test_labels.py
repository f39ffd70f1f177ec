"""Labels, classes and masks mean what their owner means: inputs that were once understood wrongly, in silence."""

import csv
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from beitv2_jax.configs import demo
from PIL import Image

from beitv2_jax import config as config_lib
from beitv2_jax.data import decode, scenes, sources
from beitv2_jax.errors import UserError
from beitv2_jax.tasks import clip
from beitv2_jax.training import loop
from tests.conftest import smoke


def picture(path, value=100, size=(16, 16)):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.full((*size, 3), value, np.uint8)).save(path)


def class_folders(root, classes='abc', count=8):
  for split in ('train', 'val'):
    for i, name in enumerate(classes):
      for j in range(count):
        picture(root / split / name / f'{j}.png', 60 * i + j)
  return root


def opened(spec, **more):
  return {split: sources.make(spec, split, **more) for split in ('train', 'eval')}


def labels_of(source):
  return [source[i]['label'] for i in range(len(source))]


def test_empty_and_hidden_folders_are_no_classes(tmp_path, caplog):
  class_folders(tmp_path)
  for name in ('.ipynb_checkpoints', '__MACOSX', 'aa_empty'):
    (tmp_path / 'train' / name).mkdir()
  picture(tmp_path / 'train' / '.ipynb_checkpoints' / 'x.png')
  with caplog.at_level(logging.WARNING):
    both = opened(f'folder:{tmp_path}')
  assert both['train'].classes == both['eval'].classes == ['a', 'b', 'c']
  assert labels_of(both['train']) == labels_of(both['eval']) == [0] * 8 + [1] * 8 + [2] * 8
  assert 'aa_empty' in caplog.text and 'MACOSX' not in caplog.text


def test_a_flat_folder_with_a_small_one_inside(tmp_path, caplog):
  for i in range(20):
    picture(tmp_path / f'{i}.png')
  picture(tmp_path / '.thumbnails' / '1.png')
  assert len(sources.make(f'folder:{tmp_path}', 'train')) == 18
  picture(tmp_path / 'old' / '1.png')
  with pytest.raises(UserError, match='20 images of its own and 1 in the sub-folders old'):
    sources.make(f'folder:{tmp_path}', 'train')
  with caplog.at_level(logging.WARNING):
    picture(class_folders(tmp_path / 'more') / 'train' / 'stray.png')
    assert len(sources.make(f'folder:{tmp_path}/more', 'train')) == 24
  assert 'left out 1 images' in caplog.text


def test_one_folder_too_high(tmp_path):
  class_folders(tmp_path / 'imagenet')
  with pytest.raises(UserError, match='point at .*/imagenet'):
    sources.make(f'folder:{tmp_path}', 'train')


def test_imagenet_as_kaggle_has_it(tmp_path):
  """A flat val: labels from LOC_val_solution.csv, or refused for fine-tuning at the start."""
  root = tmp_path / 'ILSVRC' / 'Data' / 'CLS-LOC'
  for i, name in enumerate(('n01', 'n02')):
    for j in range(16):
      picture(root / 'train' / name / f'{name}_{j}.JPEG', 100 * i)
  for j in range(16):
    picture(root / 'val' / f'ILSVRC2012_val_{j:08d}.JPEG')
  config = smoke('classifier', data__source=f'folder:{root}')
  with pytest.raises(UserError, match='labels for training and none for evaluation'):
    loop.run(config, tmp_path / 'run')
  with (tmp_path / 'LOC_val_solution.csv').open('w', newline='') as f:
    rows = [(f'ILSVRC2012_val_{j:08d}', f'n0{1 + j % 2} 1 2 3 4 ') for j in range(16)]
    csv.writer(f).writerows([('ImageId', 'PredictionString'), *rows])
  source = sources.make(f'folder:{root}', 'eval')
  assert labels_of(source) == [0, 1] * 8 and source.classes == ['n01', 'n02']


def test_a_label_that_is_no_class_number(tmp_path):
  """As a flipped bit makes it; a list of so many names would fill the memory."""
  parquet(tmp_path / 'x.parquet', [0, 2305843009213693953])
  with pytest.raises(UserError, match='such as 2305843009213693953'):
    sources.make(f'parquet:{tmp_path}', 'train')


def parquet(path, labels, names=None):
  import pyarrow
  from pyarrow import parquet as pq

  image = dict(bytes=b'', path='')
  schema = pyarrow.schema(
    [('image', pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])), ('label', pyarrow.int64())]
  )
  if names:
    schema = schema.with_metadata({'huggingface': json.dumps({'info': {'features': {'label': {'names': names}}}})})
  path.parent.mkdir(exist_ok=True)
  pq.write_table(pyarrow.table({'image': [image] * len(labels), 'label': labels}, schema), path)


def test_parquet_splits_and_labels(tmp_path):
  """validation comes before test, whose labels are -1; all files count for the classes."""
  parquet(tmp_path / 'train-00000-of-00002.parquet', [0, 1])
  parquet(tmp_path / 'train-00001-of-00002.parquet', [3])
  parquet(tmp_path / 'test-00000-of-00001.parquet', [-1, -1])
  parquet(tmp_path / 'validation-00000-of-00001.parquet', [2, 0, 1])
  both = opened(f'parquet:{tmp_path}')
  assert both['train'].classes == both['eval'].classes == ['0', '1', '2', '3']
  assert labels_of(both['eval']) == [2, 0, 1]
  (tmp_path / 'validation-00000-of-00001.parquet').unlink()
  assert not sources.make(f'parquet:{tmp_path}', 'eval').classes
  parquet(tmp_path / 'names' / 'train-0.parquet', [0, 1], ['cat', 'dog'])
  parquet(tmp_path / 'names' / 'validation-0.parquet', [0, 1], ['dog', 'cat'])
  with pytest.raises(UserError, match='train-0.parquet and .*validation-0.parquet name their classes differently'):
    sources.make(f'parquet:{tmp_path}/names', 'train')
  parquet(tmp_path / 'bad' / 'x.parquet', [0, 5], ['cat', 'dog'])
  with pytest.raises(UserError, match='from 0 on below 2; here they are such as 5'):
    sources.make(f'parquet:{tmp_path}/bad', 'train')


@pytest.mark.parametrize(
  'lines, expected',
  [
    (['a.png 0', 'b.png -1'], "line 2: the label '-1' stands among class numbers"),
    (['a.png 0', 'b.png 0.0'], "line 2: the label '0.0' stands among class numbers"),
    (['a.png -1', 'b.png -1'], 'line 1: the label -1 is no class number'),
    (['a.png,0', 'b.png,1'], 'line 1: .* looks like CSV'),
    (['a.png 0', *[f'missing{i}.png 1' for i in range(20)]], r'no .*missing0.png \(20 of 21 looked for are missing\)'),
  ],
)
def test_lists_that_mean_something_else(tmp_path, lines, expected):
  for name in 'ab':
    picture(tmp_path / f'{name}.png')
  (tmp_path / 'list.txt').write_text('\n'.join(lines))
  with pytest.raises(UserError, match=expected):
    sources.make(f'list:{tmp_path}/list.txt', 'train')


def test_lists_with_names_quotes_and_columns(tmp_path):
  for name in ('a b.png', 'c.png', 'd.png', 'e.png'):
    picture(tmp_path / name)
  (tmp_path / 'list.txt').write_text('"a b.png" 00\nc.png 01\nd.png 00\n"e.png" 01\n')
  source = sources.make(f'list:{tmp_path}/list.txt', 'train', holdout=0.25)
  assert source.classes == ['00', '01']
  (tmp_path / 'list.csv').write_text('path,label\n"a b.png",cat\nc.png,dog\nd.png,cat\ne.png,dog\n')
  source = sources.make(f'list:{tmp_path}/list.csv', 'train', holdout=0.25)
  assert source.classes == ['cat', 'dog'] and len(source) == 3


def mask_folder(root, masks, size=(32, 32)):
  for split in ('train', 'val'):
    for i, mask in enumerate(masks):
      picture(root / split / 'images' / f'{i}.png', size=size)
      path = root / split / 'masks' / f'{i}.png'
      path.parent.mkdir(exist_ok=True)
      Image.fromarray(mask).save(path)
  return f'scenes:{root}'


def halves(a, b, dtype=np.uint8, size=32):
  mask = np.full((size, size), a, dtype)
  mask[:, size // 2 :] = b
  return mask


def segment(source, classes, **labels):
  more = {f'labels__{k}': v for k, v in dict(reduce_zero=False, **labels).items()}
  return smoke('segmenter', data__source=source, model__classes=classes, steps=1, batch_size=4, eval_batch_size=4, **more)


def test_binary_masks_of_0_and_255(tmp_path):
  """The most common kind: 255 would be no class, and everything right."""
  source = mask_folder(tmp_path / 'data', [halves(0, 255)] * 4)
  with pytest.raises(
    UserError, match=r'all labelled pixels are of one class. 255 is taken for no class.*values="\(0, 255\)".*255 \(no class\) 50.0 %'
  ):
    loop.run(segment(source, 2), tmp_path / 'a')
  loop.run(segment(source, 2, values=(0, 255)), tmp_path / 'b')
  assert '255 (class 1) 50.0 %' in (tmp_path / 'b' / 'data.txt').read_text()
  record = dict(mask=halves(0, 255), image=np.zeros((32, 32, 3), np.uint8))
  np.testing.assert_array_equal(scenes.Labels(2, values=(0, 255))(record, None)['mask'], halves(0, 1))


def test_masks_of_one_class_and_classes_that_never_occur(tmp_path):
  one = mask_folder(tmp_path / 'one', [halves(1, 1)] * 4)
  with pytest.raises(UserError, match='all labelled pixels are of one class'):
    loop.run(segment(one, 2), tmp_path / 'a')
  two = mask_folder(tmp_path / 'two', [halves(0, 1)] * 4)
  with pytest.raises(UserError, match='1 of 3 classes never occur, such as class 2'):
    loop.run(segment(two, 3), tmp_path / 'b')
  loop.run(segment(two, 3, any=True), tmp_path / 'c')


def test_masks_of_16_bits_keep_their_classes(tmp_path):
  source = mask_folder(tmp_path / 'data', [halves(5, 261, np.uint16)] * 4)
  loop.run(segment(source, 300, any=True), tmp_path / 'run')
  assert '261 (class 261) 50.0 %' in (tmp_path / 'run' / 'data.txt').read_text()
  record = decode.Decoded(sources.make(source, 'train'))[0]
  np.testing.assert_array_equal(scenes.Labels(300)(record, None)['mask'], halves(5, 261, np.uint16))


def test_masks_in_sub_folders(tmp_path):
  for town, value in (('berlin', 1), ('paris', 2)):
    picture(tmp_path / 'images' / town / '0000.png')
    (tmp_path / 'masks' / town).mkdir(parents=True)
    Image.fromarray(np.full((16, 16), value, np.uint8)).save(tmp_path / 'masks' / town / '0000.png')
  source = sources.make(f'scenes:{tmp_path}', 'eval', holdout=1.0)
  found = {source.name(i).split('/')[-2]: int(decode.Decoded(source)[i]['mask'].max()) for i in range(2)}
  assert found == {'berlin': 1, 'paris': 2}
  (tmp_path / 'masks' / 'berlin').rename(tmp_path / 'masks' / 'rome')
  with pytest.raises(UserError, match='could have any of the masks .*same sub-folders'):
    sources.make(f'scenes:{tmp_path}', 'eval')


def test_classes_in_another_order(tmp_path):
  """A run that goes on refuses them; one that starts from its weights takes the head's outputs along by name."""
  class_folders(tmp_path / 'data', ('cat', 'dog'))
  config = smoke('classifier', data__source=f'folder:{tmp_path}/data', steps=40, batch_size=16, optim__lr=1e-2)
  first = loop.run(config, tmp_path / 'run')
  assert first['acc1'] == 100
  renamed = tmp_path / 'renamed'
  for split in ('train', 'val'):
    for old, new in (('cat', 'b_cat'), ('dog', 'a_dog')):
      (renamed / split).mkdir(parents=True, exist_ok=True)
      (renamed / split / new).symlink_to(tmp_path / 'data' / split / old)
  list_of = lambda split, names: '\n'.join(f'{tmp_path}/data/{split}/{n}/{j}.png {n}' for n in names for j in range(8))
  with pytest.raises(UserError, match='class 0 was cat, in .* it is a_dog'):
    loop.run(smoke('classifier', data__source=f'folder:{renamed}', steps=50, batch_size=16), tmp_path / 'run')
  # The same names in another order: as numbers, so that the order is the list's.
  workdir = tmp_path / 'run'
  saved = config_lib.load(workdir).unlock()
  saved.class_names = ('dog', 'cat')
  config_lib.save(saved, workdir)
  (tmp_path / 't.txt').write_text(list_of('train', ('cat', 'dog')))
  (tmp_path / 'v.txt').write_text(list_of('val', ('cat', 'dog')))
  swapped = smoke('classifier', data__source=f'list:{tmp_path}/t.txt,{tmp_path}/v.txt', init_from=str(workdir), steps=0, batch_size=16)
  assert loop.run(swapped, tmp_path / 'swapped')['acc1'] == 0  # config.json said that output 0 is the dog
  saved.class_names = ('cat', 'bird')
  config_lib.save(saved, workdir)
  with pytest.raises(UserError, match='knows other classes: dog'):
    loop.run(swapped, tmp_path / 'other')


def test_a_finished_run_is_not_changed(tmp_path):
  config = smoke('pretrain', steps=2)
  loop.run(config, tmp_path)
  before = {p.name: p.read_text() for p in tmp_path.glob('*.json*')}
  loop.run(smoke('pretrain', steps=2, log_every=2), tmp_path)
  assert {p.name: p.read_text() for p in tmp_path.glob('*.json*')} == before


def test_captions_keep_all_their_words_and_differ():
  config = config_lib.base('clip').unlock()
  config.caption, config.model = 'a photo of a {}.', demo.teacher().model
  source = SimpleNamespace(classes=['big black cat with hat', 'big black cat with bag'])
  task, _ = clip.make(config, source=source)
  assert task.config.model.text_length == 11
  task.transforms(task.config, True, source)
  with pytest.raises(UserError, match="'a photo of a cat.' and 'a photo of a Cat.' are the same to the text encoder"):
    task.transforms(task.config, True, SimpleNamespace(classes=['cat', 'Cat']))
