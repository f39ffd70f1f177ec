// Curves of a report: every <figure class="chart" data-chart='{"title", "unit", "series": {name: [[step, value(, lowest, highest)], ...]}}'>
// becomes a canvas with values under the pointer (or the arrow keys), and one bar of controls smooths and scales them all.
'use strict';

(() => {
  const LIGHT = ['#1f6fd0', '#c2490a', '#1e8449', '#a8328f', '#7a6a00', '#6b52c8', '#b3261e', '#0e7c86'];
  const DARK = ['#79b0ff', '#ff9f68', '#6fd59a', '#f08ad8', '#d9c94f', '#b3a1ff', '#ff8a80', '#5fd3dd'];
  const settings = { smooth: 0, log: false };
  const charts = [];

  const make = (tag, attributes = {}, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const short = (x) => {
    if (x === 0) return '0';
    const size = Math.abs(x);
    if (size >= 1e6 || size < 1e-3) return x.toExponential(2).replace('e+', 'e');
    return String(Number(x.toPrecision(4)));
  };
  // Round numbers between low and high, about `count` of them.
  const ticks = (low, high, count) => {
    const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough * 0.999), out = [];
    for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-6; x += step) out.push(Number(x.toPrecision(12)));
    return out;
  };
  // An average that forgets: 0 leaves the values as they are.
  const smoothed = (points, weight) => {
    let last = points[0][1];
    return points.map(([x, y]) => { last = weight * last + (1 - weight) * y; return [x, last]; });
  };

  class Chart {
    constructor(host) {
      const { title, unit, series } = JSON.parse(host.dataset.chart);
      this.names = Object.keys(series);
      this.series = Object.values(series);
      this.name = title + (unit ? `, ${unit}` : '');
      this.canvas = make('canvas', { tabindex: 0, role: 'img', 'aria-label': this.describe() });
      this.legend = make('div', { class: 'legend' });
      host.append(make('div', { class: 'title' }, this.name), this.canvas, this.legend);
      this.at = null;
      this.canvas.addEventListener('pointermove', (event) => { this.at = this.stepOf(event.clientX - this.canvas.getBoundingClientRect().left); this.draw(); });
      this.canvas.addEventListener('pointerleave', () => { this.at = null; this.draw(); });
      this.canvas.addEventListener('keydown', (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!by) return;
        event.preventDefault();
        const steps = [...new Set(this.series.flatMap((points) => points.map(([x]) => x)))].sort((x, y) => x - y);
        const now = this.at === null ? (by > 0 ? -1 : steps.length) : steps.findIndex((x) => x >= this.at);
        this.at = steps[Math.min(Math.max(now + by, 0), steps.length - 1)];
        this.draw();
      });
    }
    describe() {
      return `${this.name}: ` + this.names.map((name, i) => `${name} ends at ${short(this.series[i].at(-1)[1])}`).join(', ');
    }
    stepOf(x) {
      const [low, high] = this.across, { left, wide } = this.frame;
      return low + ((x - left) / wide) * (high - low);
    }
    draw() {
      const canvas = this.canvas, scale = window.devicePixelRatio || 1, wide = canvas.clientWidth, high = canvas.clientHeight;
      if (!wide) return;
      canvas.width = wide * scale; canvas.height = high * scale;
      const context = canvas.getContext('2d'), style = getComputedStyle(document.documentElement);
      const dark = matchMedia('(prefers-color-scheme: dark)').matches, colors = dark ? DARK : LIGHT;
      context.scale(scale, scale);
      context.font = '12px system-ui, sans-serif';
      const lines = this.series.map((points) => smoothed(points, points.length > 2 ? settings.smooth : 0));
      // With smoothing the frame follows the smooth curves, or one spike would flatten all.
      const values = (settings.smooth ? lines : this.series).flatMap((points) => points.flatMap((p) => p.slice(1))).filter((y) => !settings.log || y > 0);
      const log = settings.log && values.length > 0, to = log ? Math.log10 : (y) => y, from = log ? (y) => 10 ** y : (y) => y;
      let [bottom, top] = values.length ? [Math.min(...values), Math.max(...values)].map(to) : [0, 1];
      if (top - bottom < 1e-9 * Math.max(Math.abs(top), 1e-9)) { const by = Math.abs(top) * 0.1 || 1; bottom -= by; top += by; }
      const edge = (top - bottom) * 0.05;
      bottom -= edge; top += edge;
      const steps = this.series.flatMap((points) => [points[0][0], points.at(-1)[0]]);
      let first = Math.min(...steps), last = Math.max(...steps);
      if (first === last) { first -= 1; last += 1; }
      this.across = [first, last];
      const marks = ticks(bottom, top, 4), labels = marks.map((y) => short(from(y)));
      const left = 8 + Math.max(...labels.map((text) => context.measureText(text).width), 10);
      const frame = (this.frame = { left, top: 6, wide: wide - left - 8, high: high - 26 });
      const x = (step) => left + ((step - first) / (last - first)) * frame.wide;
      const y = (value) => frame.top + (1 - (to(value) - bottom) / (top - bottom)) * frame.high;
      context.fillStyle = style.getPropertyValue('--soft');
      context.strokeStyle = style.getPropertyValue('--line');
      context.lineWidth = 1;
      context.textBaseline = 'middle';
      context.textAlign = 'right';
      marks.forEach((mark, i) => {
        const at = y(from(mark));
        context.beginPath(); context.moveTo(left, at); context.lineTo(left + frame.wide, at); context.stroke();
        context.fillText(labels[i], left - 4, at);
      });
      context.textAlign = 'center';
      ticks(first, last, Math.max(2, wide / 110)).forEach((step) => {
        const text = short(step), half = context.measureText(text).width / 2;
        context.fillText(text, Math.min(x(step), wide - half), frame.top + frame.high + 12);
      });
      context.save();
      context.beginPath(); context.rect(left, 0, frame.wide + 8, frame.top + frame.high); context.clip();
      lines.forEach((points, i) => {
        const path = (list, value) => {
          context.beginPath();
          let down = false;
          list.forEach((p) => {
            if (log && value(p) <= 0) { down = false; return; }
            if (down) context.lineTo(x(p[0]), y(value(p))); else context.moveTo(x(p[0]), y(value(p)));
            down = true;
          });
          context.stroke();
        };
        context.strokeStyle = context.fillStyle = colors[i % colors.length];
        context.lineWidth = 1;
        context.globalAlpha = 0.25;
        const raw = this.series[i];
        if (raw[0].length > 2) { path(raw, (p) => p[2]); path(raw, (p) => p[3]); }
        else if (settings.smooth) path(raw, (p) => p[1]);
        context.globalAlpha = 1;
        context.lineWidth = 1.8;
        path(points, (p) => p[1]);
        if (points.length < 30) points.forEach((p) => { if (!log || p[1] > 0) { context.beginPath(); context.arc(x(p[0]), y(p[1]), 2.5, 0, 7); context.fill(); } });
      });
      context.restore();
      let shown = lines.map((points) => points.at(-1));
      if (this.at !== null) {
        shown = lines.map((points) => points.reduce((best, p) => (Math.abs(p[0] - this.at) < Math.abs(best[0] - this.at) ? p : best)));
        const near = shown.reduce((best, p) => (Math.abs(p[0] - this.at) < Math.abs(best[0] - this.at) ? p : best))[0];
        context.strokeStyle = style.getPropertyValue('--soft');
        context.beginPath(); context.moveTo(x(near), frame.top); context.lineTo(x(near), frame.top + frame.high); context.stroke();
      }
      this.legend.replaceChildren(make('span', {}, this.at === null ? 'last' : `step ${short(shown.reduce((best, p) => (Math.abs(p[0] - this.at) < Math.abs(best[0] - this.at) ? p : best))[0])}`),
        ...this.names.map((name, i) => { const dot = make('b'); dot.style.background = colors[i % colors.length]; return make('span', {}, dot, `${name} ${short(shown[i][1])}`); }));
    }
  }

  const first = document.querySelector('.charts, .chart');
  if (!first) return;
  const slider = make('input', { type: 'range', min: 0, max: 0.99, step: 0.01, value: 0 }), log = make('input', { type: 'checkbox' });
  const all = () => charts.forEach((chart) => chart.draw());
  slider.addEventListener('input', () => { settings.smooth = Number(slider.value); all(); });
  log.addEventListener('change', () => { settings.log = log.checked; all(); });
  first.before(make('div', { class: 'controls' }, make('label', {}, 'smoothing', slider), make('label', {}, log, 'log scale')));
  document.querySelectorAll('.chart').forEach((host) => charts.push(new Chart(host)));
  all();
  new ResizeObserver(all).observe(document.querySelector('main'));
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', all);
})();
