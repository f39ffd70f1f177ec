"""Block-wise masking (paper section 2.2; the official MaskingGenerator, step by step), and patches at random for comparison."""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class BlockMask:
  """Adds `mask_index` [count], the masked cells of the patch grid in row-major order, to a record.

  Blocks of at least `min_block` cells (where the budget allows) and an aspect ratio in [min_aspect, 1/min_aspect] are
  added until `count` cells are masked; what ten attempts can't place is filled with single cells.
  """

  grid: tuple[int, int]
  count: int
  min_block: int = 16
  max_block: int = 0  # 0: no limit but the budget
  min_aspect: float = 0.3

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    return record | dict(mask_index=np.flatnonzero(self.draw(rng)).astype(np.int32))

  def draw(self, rng: np.random.Generator) -> np.ndarray:
    """bool [Gh, Gw] with exactly `count` cells set."""
    mask = np.zeros(self.grid, bool)
    left = self.count
    while left > 0:
      placed = self._place(mask, min(left, self.max_block or self.count), rng)
      if not placed:
        break
      left -= placed
    if left:
      free = np.flatnonzero(~mask)
      mask.flat[rng.choice(free, left, replace=False)] = True
    return mask

  def _place(self, mask: np.ndarray, room: int, rng: np.random.Generator) -> int:
    """Masks one block of at most `room` new cells in place; returns how many, 0 after ten failures."""
    gh, gw = self.grid
    log_aspect = math.log(self.min_aspect)
    for _ in range(10):
      u = rng.random(4).tolist()  # one call: a generator's cost is in the calling
      area = self.min_block + (room - self.min_block) * u[0]  # also when room < min_block, as the original does
      aspect = math.exp(log_aspect * (1 - 2 * u[1]))
      h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if w >= gw or h >= gh:  # a block never spans a whole side
        continue
      top, left = int(u[2] * (gh - h + 1)), int(u[3] * (gw - w + 1))
      block = mask[top : top + h, left : left + w]
      new = h * w - int(np.count_nonzero(block))
      if 0 < new <= room:
        block[:] = True
        return new
    return 0


@dataclasses.dataclass(frozen=True)
class RandomMask:
  """Adds `mask_index` [count] as BlockMask does, of cells drawn one by one."""

  grid: tuple[int, int]
  count: int

  def __call__(self, record: dict, rng: np.random.Generator) -> dict:
    cells = rng.choice(self.grid[0] * self.grid[1], self.count, replace=False)
    return record | dict(mask_index=np.sort(cells).astype(np.int32))
