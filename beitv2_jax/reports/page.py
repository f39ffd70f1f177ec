"""One HTML file with everything inside: tables, pictures, and curves that can be looked into. It needs no network."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SITE = Path(__file__).parent / 'site'
POINTS = 600  # of a curve: more are averaged in groups, whose lowest and highest values are kept

Curve = Sequence[tuple[float, float]]


class Page:
  """`page.heading(...)`, `.text(...)`, `.table(...)`, `.picture(...)`, `.curves(...)`, then `.html()` or `.save(path)`."""

  def __init__(self, title: str):
    self.title, self.parts, self.has_curves = title, [], False

  def heading(self, text: str) -> None:
    self.parts.append(f'<h2>{html.escape(text)}</h2>')

  def text(self, text: str) -> None:
    self.parts.append(f'<p>{html.escape(text)}</p>')

  def table(self, header: Sequence[str], rows: Sequence[Sequence]) -> None:
    line = lambda cells, tag: '<tr>' + ''.join(f'<{tag}>{html.escape(str(c))}</{tag}>' for c in cells) + '</tr>'
    head = f'<thead>{line(header, "th")}</thead>' if header else ''
    self.parts.append(f'<div class="wide"><table>{head}<tbody>{"".join(line(r, "td") for r in rows)}</tbody></table></div>')

  def picture(self, image: Image.Image, caption: str) -> None:
    buffer = io.BytesIO()
    image.save(buffer, 'PNG')
    self.png(buffer.getvalue(), caption)

  def png(self, data: bytes, caption: str) -> None:
    source, caption = base64.b64encode(data).decode(), html.escape(caption)
    self.parts.append(f'<figure><img src="data:image/png;base64,{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')

  def curves(self, title: str, series: dict[str, Curve], unit: str = '') -> None:
    """Curves {name: [(step, value), ...]} in one frame. Values that are not finite are left out."""
    kept = {name: thinned(points) for name, points in series.items()}
    kept = {name: points for name, points in kept.items() if points}
    if kept:
      self.has_curves = True
      data = html.escape(json.dumps(dict(title=title, unit=unit, series=kept), separators=(',', ':'), allow_nan=False))
      self.parts.append(f'<figure class="chart" data-chart="{data}"></figure>')

  def intervals(self, title: str, values: Mapping[str, Sequence[float]]) -> None:
    """For each name a line from the mean less the standard deviation to the mean and it, with every value as a dot."""
    name, width, line = 260, 640, 26
    points = [v for group in values.values() for v in group]
    low, high = min(points), max(points)
    low, high = (low - 1, high + 1) if low == high else (low - 0.05 * (high - low), high + 0.05 * (high - low))
    x = lambda v: name + (width - name - 60) * (v - low) / (high - low)
    parts = []
    for i, (label, group) in enumerate(values.items()):
      y, mean = line * i + line / 2, float(np.mean(group))
      spread = float(np.std(group, ddof=1)) if len(group) > 1 else 0.0
      parts.append(
        f'<text x="0" y="{y + 4}">{html.escape(label[:40])}</text><text x="{width}" y="{y + 4}" text-anchor="end">{mean:.4g}</text>'
      )
      parts.append(f'<line x1="{x(max(mean - spread, low)):.1f}" x2="{x(min(mean + spread, high)):.1f}" y1="{y}" y2="{y}"/>')
      parts += [f'<circle cx="{x(v):.1f}" cy="{y}" r="3"/>' for v in group] + [
        f'<rect x="{x(mean) - 1.5:.1f}" y="{y - 8}" width="3" height="16"/>'
      ]
    told = html.escape(f'{title}: ' + ', '.join(f'{k} {np.mean(v):.4g}' for k, v in values.items()))
    drawn = f'<svg class="intervals" viewBox="0 0 {width} {line * len(values)}" role="img" aria-label="{told}">{"".join(parts)}</svg>'
    self.parts.append(f'<figure><h3>{html.escape(title)}</h3>{drawn}</figure>')

  def begin_charts(self) -> None:
    """The curves from here to `end_charts` lie beside each other."""
    self.parts.append('<div class="charts">')

  def end_charts(self) -> None:
    self.parts.append('</div>')

  def folded(self, title: str, text: str) -> None:
    """Long text that opens when it is asked for."""
    self.parts.append(f'<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>')

  def html(self) -> str:
    title, style = html.escape(self.title), (SITE / 'page.css').read_text()
    script = f'<script>{(SITE / "charts.js").read_text()}</script>' if self.has_curves else ''
    body = '\n'.join(self.parts)
    return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
      f'<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>\n<body><main><h1>{title}</h1>\n{body}\n</main>{script}</body></html>\n'
    )

  def save(self, path: str | Path) -> None:
    Path(path).write_text(self.html(), encoding='utf-8', errors='replace')


def thinned(points: Curve) -> list[list[float]]:
  """At most POINTS of a curve, as [step, value] or, for a group, [last step, mean, lowest, highest], in five digits."""
  finite = [(x, y) for x, y in points if isinstance(y, (int, float)) and math.isfinite(y)]
  digits = lambda y: float(f'{y:.5g}')
  if len(finite) <= POINTS:
    return [[x, digits(y)] for x, y in finite]
  xs, ys = np.array(finite, float).T
  groups = np.array_split(np.arange(len(xs)), POINTS)
  return [[float(xs[g[-1]]), digits(ys[g].mean()), digits(ys[g].min()), digits(ys[g].max())] for g in groups]
