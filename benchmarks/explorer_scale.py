"""What an explorer of many images costs to make and to open, with generated codes and pictures.

  python -m benchmarks.explorer_scale --images 50000 --codes 8192 --out /tmp/explorer

Prints seconds and memory of making it, its size, and, in a headless Chromium with an empty cache: seconds until the first cards are drawn,
and how long frames take while its list of codes is scrolled (drawn in software: no GPU). No model is run, so what
tokenizing costs comes on top.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from beitv2_jax.downstream.survey import Survey
from beitv2_jax.pictures import explorer_files as files
from beitv2_jax.pictures import explorer_looks

SIDE, PATCH = 224, 16
GRID = SIDE // PATCH


def picture(i: int) -> np.ndarray:
  """Smooth noise, whose JPEG is about as large as a photograph's."""
  rng = np.random.default_rng(i)
  coarse = rng.integers(0, 200, (28, 28, 3), np.uint8)
  return coarse.repeat(8, 0).repeat(8, 1) + rng.integers(0, 40, (SIDE, SIDE, 3), np.uint8)


def made_up(images: int, codes: int) -> Survey:
  rng = np.random.default_rng(0)
  popular = rng.zipf(1.3, codes).clip(max=1000).astype(float)
  drawn = rng.choice(codes, (images, GRID, GRID), p=popular / popular.sum()).astype(np.int32)
  cosine = rng.uniform(0.3, 1, drawn.shape).astype(np.float16)
  means = rng.uniform(0, 1, (codes, PATCH, PATCH, 3)).astype(np.float32)
  return Survey(drawn, cosine, codes, means, rng.integers(0, 1000, images), [f'class {i}' for i in range(1000)])


def look() -> explorer_looks.Look:
  rng = np.random.default_rng(0)
  n = GRID * GRID
  features = lambda images: rng.normal(size=(len(images), n, 512)).astype(np.float32)
  return explorer_looks.Look(features, features, lambda images: rng.dirichlet(np.ones(n), (len(images), n + 1)), "the teacher's features")


FRAMES = """async (pixels) => {
  const times = [], steps = 600;
  let last = performance.now();
  for (let i = 0; i < steps; i++) {
    window.scrollBy(0, pixels);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    times.push(now - last);
    last = now;
  }
  return times.slice(1).sort((x, y) => x - y);
}"""


def opened(page: Path) -> None:
  from tests.browser import chromium

  with chromium() as browser:
    tab = browser.new_context(viewport=dict(width=1280, height=800)).new_page()
    began = time.monotonic()
    tab.goto(page.as_uri())
    tab.wait_for_selector('.card')
    tab.evaluate('new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))')
    print(f'first view: {time.monotonic() - began:.2f} s')
    tab.wait_for_timeout(1000)
    for pixels in (30, 120):
      tab.evaluate('window.scrollTo(0, 0)')
      frames = np.array(tab.evaluate(FRAMES, pixels))
      late = 100 * (frames > 25).mean()  # a screen of 60 Hz shows one every 16.7 ms
      print(
        f'scrolling {60 * pixels:,} pixels/s: frames of {np.median(frames):.1f} ms (median), {np.percentile(frames, 95):.1f} ms (95th percentile); {late:.1f} % came late'
      )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--images', type=int, default=50_000)
  parser.add_argument('--codes', type=int, default=8192)
  parser.add_argument('--shown', type=int, default=1000)
  parser.add_argument('--out', type=Path, required=True)
  args = parser.parse_args()
  survey = made_up(args.images, args.codes)
  rng = np.random.default_rng(1)
  embedding = rng.normal(size=(args.codes, 32)).astype(np.float32)
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  about = dict(title='Generated', made='', source='generated codes', names=[f'{i}.jpg' for i in range(args.images)], side=SIDE, skipped=0)
  began = time.monotonic()
  page = files.build(
    args.out, [files.Book('generated', survey, embedding)], lambda places: (picture(int(i)) for i in places), look(), about, args.shown
  )
  memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  sizes = [p.stat().st_size for p in args.out.rglob('*') if p.is_file()]
  print(
    f'made in {time.monotonic() - began:.0f} s with at most {memory:.2f} GiB: {len(sizes)} files, {sum(sizes) / 1e6:.0f} MB, the largest {max(sizes) / 1e6:.1f} MB'
  )
  opened(page)


if __name__ == '__main__':
  main()
