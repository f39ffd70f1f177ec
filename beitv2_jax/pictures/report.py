"""One HTML file with everything inside: tables, curves and pictures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image


class Report:
  """`report.text(...)`, `.table(...)`, `.picture(...)`, `.curves(...)`, then `.save(path)`."""

  def __init__(self, title: str):
    self.title, self.parts = title, []

  def text(self, text: str, tag: str = 'p') -> None:
    self.parts.append(f'<{tag}>{html.escape(text)}</{tag}>')

  def table(self, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    line = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells) + '</tr>'
    self.parts.append('<table>' + line(header, 'th') + ''.join(line(r, 'td') for r in rows) + '</table>')

  def picture(self, image: Image.Image, caption: str) -> None:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    self._image(buffer.getvalue(), caption)

  def curves(self, series: dict[str, Sequence[tuple[float, float]]], title: str, smooth: float = 0.6) -> None:
    """Lines {name: [(step, value), ...]}; the thin line is what was logged, the thick one its moving average."""
    import matplotlib

    matplotlib.use('agg')
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), dpi=110)
    for name, points in series.items():
      xs, ys = zip(*points)
      average, last = [], ys[0]
      for y in ys:
        last = smooth * last + (1 - smooth) * y
        average.append(last)
      (line,) = axes.plot(xs, average, label=name)
      axes.plot(xs, ys, alpha=0.25, color=line.get_color(), linewidth=0.8)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel('step')
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', bbox_inches='tight')
    plt.close(figure)
    self._image(buffer.getvalue(), '')

  def _image(self, png: bytes, caption: str) -> None:
    data = base64.b64encode(png).decode()
    self.parts.append(
      f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(caption)}"><figcaption>{html.escape(caption)}</figcaption></figure>'
    )

  def save(self, path: str | Path) -> None:
    style = (
      'body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}'
      'table{border-collapse:collapse}td,th{padding:.3rem .8rem;border-bottom:1px solid #ddd;text-align:right}'
      'td:first-child,th:first-child{text-align:left}figure{display:inline-block;margin:1rem 1rem 0 0}'
      'img{max-width:100%;image-rendering:pixelated}figcaption{color:#666;max-width:40rem}'
    )
    body = '\n'.join(self.parts)
    Path(path).write_text(
      f'<!doctype html><meta charset="utf-8"><title>{html.escape(self.title)}</title><style>{style}</style><h1>{html.escape(self.title)}</h1>\n{body}\n'
    )
