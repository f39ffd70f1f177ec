"""A classifier on the ImageNet variants, none of which it was trained on (paper section 3.2, robustness).

Name the sets you have; the others are left out. Folders as they are distributed: class folders named by WordNet id (-A, -R, -Sketch),
or by class number (-V2). Expected from official large weights on ImageNet-R (official README): 69.94 top-1, 82.89 top-5.

  python -m beitv2_jax robustness --from runs/l16_ft --config=configs/robustness.py --config.sets.a=folder:imagenet-a \
      --config.sets.r=folder:imagenet-r --config.sets.sketch=folder:sketch --config.sets.v2=folder:imagenetv2-matched-frequency \
      --config.sets.imagenet=tfds:imagenet2012 --config.real=real.json
"""

from ml_collections import ConfigDict


def get_config():
  c = ConfigDict()
  c.sets = ConfigDict(dict(imagenet='', v2='', a='', r='', sketch=''))  # each a labelled source
  c.real = ''  # ReaL's labels (real.json: one list a validation image, in order), judged on sets.imagenet
  c.data_dir = ''  # where tfds keeps prepared data sets
  c.crop_pct = 0.875  # the official evaluation; timm takes 0.9 for base and 0.95 for large
  c.batch_size = 64
  return c.lock()
