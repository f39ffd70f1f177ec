"""A teacher of one's own in one file: any function from images to one vector a patch.

  python -m beitv2_jax.main --config=configs/vqkd_b16.py:small_data --workdir=runs/mine --config.data.source=folder:PATH \
      --config.teacher.kind=python --config.teacher.name=examples/teacher_of_your_own.py

This one needs no weights: a patch is described by its mean colour, and by how much its light changes down and across in its four quarters.
"""

import jax.numpy as jnp


def load(grid, dtype):
  """(width, params, apply) with apply(params, images [B, h, w, 3] in [0, 1]) → features [B, rows * columns, width] of the patch grid."""

  def apply(params, images):
    b, h, w, _ = images.shape
    rows, columns = grid
    patches = images.reshape(b, rows, h // rows, columns, w // columns, 3).swapaxes(2, 3)
    light = patches.mean(-1)
    down, across = jnp.abs(jnp.diff(light, axis=3)), jnp.abs(jnp.diff(light, axis=4))
    half, side = h // rows // 2, w // columns // 2
    quarters = [x[..., r : r + half, c : c + side].mean((3, 4)) for x in (down, across) for r in (0, half - 1) for c in (0, side - 1)]
    features = jnp.concatenate([patches.mean((3, 4)) - 0.5, *(q[..., None] for q in quarters)], -1)
    return (features @ params).reshape(b, rows * columns, -1).astype(dtype)

  return 11, jnp.diag(jnp.array([1.0] * 3 + [4.0] * 8)), apply
