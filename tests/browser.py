"""A headless Chromium for tests of pages, and what every page must pass."""

import contextlib
import os
import shutil

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


@contextlib.contextmanager
def chromium():
  """A browser of playwright's. Skips, and says what to do, where there is no Chromium."""
  from playwright.sync_api import sync_playwright

  path = next(filter(None, map(shutil.which, NAMES)), None)
  if path is None:
    assert os.environ.get('CI') != 'true', 'CI must have a Chromium: make browser'
    pytest.skip('NO BROWSER: the pages are not tested. `make browser` installs Chromium on Debian and Ubuntu.')
  with sync_playwright() as playwright:
    sandbox = ['--no-sandbox'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else []
    browser = playwright.chromium.launch(executable_path=path, args=sandbox)
    yield browser
    browser.close()


class Page:
  """A page from disk that collects what goes wrong in it. `check` fails if anything did."""

  def __init__(self, browser, site, size=(1280, 800), dark=False, touch=False):
    width, height = size
    scheme = 'dark' if dark else 'light'
    self.context = browser.new_context(viewport=dict(width=width, height=height), color_scheme=scheme, has_touch=touch, offline=True)
    self.page, self.site, self.wrong = self.context.new_page(), site, []
    self.page.set_default_timeout(20_000)
    self.page.on('console', lambda message: message.type in ('error', 'warning') and self.wrong.append(message.text))
    self.page.on('pageerror', lambda error: self.wrong.append(str(error)))
    # What the page itself gave up, by going elsewhere, is not missing.
    self.page.on('requestfailed', lambda request: request.failure != 'net::ERR_ABORTED' and self.wrong.append(f'missing: {request.url}'))
    self.page.on('request', lambda request: request.url.startswith('http') and self.wrong.append(f'from the network: {request.url}'))

  def open(self, fragment=''):
    self.page.goto('about:blank')
    self.page.goto(f'{self.site.as_uri()}{fragment}')
    return self.page

  def check(self):
    assert not self.wrong, self.wrong

  def close(self):
    self.context.close()


# Every piece of text whose contrast with what is behind it is under WCAG's AA: 4.5, or 3 for large text.
FAINT = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const parse = (text) => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const color = parse(getComputedStyle(node).backgroundColor);
      if (color.length < 4 || color[3] > 0.99) return color;
    }
    return [255, 255, 255];
  };
  const faint = [];
  for (const node of document.querySelectorAll('body *')) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!own || !node.getClientRects().length || node.closest('svg')) continue;
    const style = getComputedStyle(node), size = parseFloat(style.fontSize);
    const pair = [light(parse(style.color)), light(behind(node))].sort((x, y) => y - x);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < (size >= 24 || (size >= 18.6 && style.fontWeight >= 700) ? 3 : 4.5)) faint.push(`${ratio.toFixed(2)} ${node.tagName} ${node.textContent.slice(0, 40)}`);
  }
  return faint;
}"""

# What a screen reader could not name: pictures without words, controls without a label.
NAMELESS = """() => [...document.querySelectorAll('img, canvas, svg, button, input, select, textarea, a')].filter((node) => {
  if (!node.getClientRects().length || node.closest('[aria-hidden=true]')) return false;
  const named = node.getAttribute('aria-label') || node.getAttribute('alt') || node.textContent.trim() || (node.labels && node.labels.length) || node.querySelector?.('img[alt]');
  return !named && !(node.tagName === 'CANVAS' && node.closest('[aria-label]'));
}).map((node) => node.outerHTML.slice(0, 120))"""


def assert_readable(page):
  """Contrast, names, and no sideways scrolling."""
  assert page.evaluate(FAINT) == []
  assert page.evaluate(NAMELESS) == []
  assert page.evaluate('document.documentElement.scrollWidth - document.documentElement.clientWidth') <= 0
