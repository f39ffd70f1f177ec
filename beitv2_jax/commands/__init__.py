"""The commands: `python -m beitv2_jax NAME ...`. Each file here parses, calls what does the work, and prints."""

import difflib
import importlib
import sys

COMMANDS = {
  'train': 'train the stage that a recipe describes, or go on with it (the same as python -m beitv2_jax.main)',
  'demo': 'the whole chain at toy size on images that come with scikit-learn',
  'tokenize': 'the codes of images',
  'predict': 'classes, or masks, of images',
  'explore': 'a page that shows what each code of a tokenizer stands for',
  'attention': 'where a model looks, and what its patch features have in common, as pictures',
  'report': 'curves and figures of a run, or of several side by side',
  'study': 'one of the paper’s questions at a small size: a table with seeds and controls',
  'probe': 'what frozen features are worth: linear probes, few labels, k-NN',
  'robustness': 'a classifier on ImageNet-A, -R, -Sketch, -V2, ReaL or sets of your own',
  'segmentation': 'exact mIoU of a segmenter, also multi-scale',
  'convert': 'official, timm and Hugging Face checkpoints in and out',
  'checkpoints': 'which steps a workdir has, and whether they are whole',
  'prepare': 'ImageNet-1k from its tars, or any images, into a few large files, for buckets and slow disks',
  'teach': 'a teacher’s features of all images, written once, for tokenizers to learn from',
  'bench': 'how many images a second this host prepares for training',
  'aot': 'what a TPU slice would do with a recipe, by its compiler, without one',
}


def overview() -> str:
  width = max(map(len, COMMANDS))
  lines = [f'  {name:{width}}  {what}' for name, what in COMMANDS.items()]
  return '\n'.join(
    ['usage: python -m beitv2_jax COMMAND ...', '', *lines, '', 'python -m beitv2_jax COMMAND --help says more, with an example.']
  )


def run(name: str, argv: list[str]) -> int:
  """Runs one command. Returns its exit code: 0, 1 (it failed), 2 (bad input) or 130 (stopped)."""
  if name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, 1)
    meant = f' Did you mean {close[0]}?' if close else ''
    print(f'error: no command {name!r}.{meant} python -m beitv2_jax lists them.', file=sys.stderr)
    return 2
  return importlib.import_module(f'beitv2_jax.commands.{name}').main(argv)
