"""The explorer in a real browser, from disk and without a network."""

import numpy as np
import pytest

from beitv2_jax.downstream.survey import Survey
from beitv2_jax.pictures import explorer_files as files
from beitv2_jax.pictures import explorer_looks
from tests.browser import Page, assert_readable, chromium

GRID, SIDE = (6, 6), 48


def made_up(size, seed, classes=4, n=40):
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, size - 3, (n, *GRID)).astype(np.int32)  # three codes do not occur
  codes[:, 0, 0] = np.arange(n) % classes  # the first codes tell the class
  cosine = rng.uniform(0, 1, codes.shape).astype(np.float16)
  return Survey(
    codes,
    cosine,
    size,
    rng.uniform(0, 1, (size, 8, 8, 3)).astype(np.float32),
    np.arange(n) % classes,
    [f'kind {i}' for i in range(classes)],
  )


def a_book(name, survey, seed, faces=False):
  rng = np.random.default_rng(seed)
  embedding = rng.normal(size=(survey.size, 8)).astype(np.float32)
  embedding /= np.linalg.norm(embedding, axis=1, keepdims=True)
  return files.Book(name, survey, embedding, rng.uniform(0, 1, (survey.size, 8, 8, 3)) if faces else None)


def images_of(places):
  for i in places:
    yield np.random.default_rng(int(i)).integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)


def look():
  def features(images):
    return images.reshape(len(images), 6, 8, 6, 8, 3).mean((2, 4)).reshape(len(images), 36, 3) - 128

  def attention(images):
    x = np.random.default_rng(0).uniform(0, 1, (len(images), 37, 36))
    return x / x.sum(-1, keepdims=True)

  return explorer_looks.Look(features, features, attention, "the teacher's features")


def about(n, **more):
  return (
    dict(
      title='Codebook of a test',
      made='2026-01-01T00:00+00:00',
      source='made up',
      names=[f'image {i}.png' for i in range(n)],
      side=SIDE,
      skipped=0,
    )
    | more
  )


@pytest.fixture(scope='module')
def survey():
  return made_up(400, 0)


@pytest.fixture(scope='module')
def site(survey, tmp_path_factory):
  books = [a_book('runs/one', survey, 1, faces=True), a_book('runs/two', made_up(50, 2), 3)]
  return files.build(tmp_path_factory.mktemp('site'), books, images_of, look(), about(len(survey)), shown=30)


@pytest.fixture(scope='module')
def browser():
  with chromium() as browser:
    yield browser


@pytest.fixture
def page(browser, site):
  opened = Page(browser, site)
  yield opened
  opened.check()
  opened.close()


def shown(page):
  return [
    int(text.split(',')[0].removeprefix('code '))
    for text in page.locator('main .card').evaluate_all('x => x.map((y) => y.getAttribute("aria-label"))')
  ]


def test_a_card_has_a_picture_for_each_image_with_its_code(page, survey):
  """At most four, and what the pixel decoder draws; no empty places for rare codes."""
  p = page.open()
  p.wait_for_selector('.card')
  p.select_option('label:has-text("order") select', 'rare')
  pictures = p.locator('main .card').evaluate_all('x => x.map((y) => y.querySelectorAll(".sheet").length)')
  images = [int((survey.codes == code).any((1, 2)).sum()) for code in shown(p)]
  assert pictures == [min(n, 4) + 1 for n in images] and 1 in images


def test_codes_are_sorted_filtered_and_found(page, survey):
  p, counts = page.open(), np.bincount(survey.codes.reshape(-1), minlength=400)
  used = int((counts > 0).sum())
  p.wait_for_selector('.card')
  assert p.inner_text('h1') == f'{used} of 400 codes occur in 40 images'
  first = shown(p)
  assert [counts[c] for c in first] == sorted(counts, reverse=True)[: len(first)] and len(first) < used
  p.select_option('label:has-text("order") select', 'number')
  assert shown(p)[:5] == [c for c in range(10) if counts[c]][:5]
  p.select_option('label:has-text("show") select', 'unused')
  assert sorted(shown(p)) == np.flatnonzero(counts == 0).tolist()
  p.select_option('label:has-text("show") select', 'all')
  p.fill('#search', '39')
  assert shown(p)[0] == 39 and set(shown(p)) == {39, *range(390, 400)}
  p.fill('#search', 'kind 3')
  dominant = {
    c for c in range(400) if counts[c] and np.bincount(survey.labels[np.nonzero(survey.codes == c)[0]], minlength=4).argmax() == 3
  }
  p.select_option('label:has-text("order") select', 'purity')
  assert set(shown(p)) <= dominant and 3 in shown(p)
  p.fill('#search', 'nothing like it')
  assert 'No code fits' in p.inner_text('main')


def test_a_long_list_keeps_few_elements_in_the_page(page):
  p = page.open()
  p.wait_for_selector('.card')
  before = shown(p)
  p.evaluate('window.scrollTo(0, document.body.scrollHeight)')
  p.wait_for_function(f'document.querySelector("main .card").getAttribute("aria-label").startsWith("code {before[0]},") === false')
  assert not set(before) & set(shown(p)) and len(shown(p)) < 200


def test_from_a_code_to_a_patch_and_back(page, survey):
  code = int(survey.codes[7, 2, 3])
  p = page.open(f'#code={code}')
  p.wait_for_selector('h2:has-text("Images with most of it")')
  assert f'{(survey.codes == code).sum()}, ' in p.inner_text('table >> nth=0')
  assert p.locator('figcaption:has-text("its face")').count() == 1
  assert p.locator('.sheet').first.evaluate('x => getComputedStyle(x).backgroundImage').endswith('.jpg")')
  p.locator('.typical a').first.click()
  p.wait_for_selector('.stage')
  assert f'code {code}' in p.inner_text('.looker')
  p.locator('.stage').focus()
  p.keyboard.press('Enter')
  p.wait_for_selector(f'h1:has-text("Code {code}")')
  p.go_back()
  p.wait_for_selector('.stage')
  p.goto(f'{page.site.as_uri()}#code=9999')
  p.wait_for_selector('text=There is no code 9999: this codebook has 0 to 399')


def test_pointing_at_a_patch_tells_its_code(page, survey):
  chosen = np.unique(np.linspace(0, 39, 30).round().astype(int))
  p, codes = page.open('#image=4'), survey.codes[chosen[4]]
  p.wait_for_selector('.stage')
  box = p.locator('.stage').bounding_box()
  at = lambda row, column: (box['x'] + (column + 0.5) * box['width'] / 6, box['y'] + (row + 0.5) * box['height'] / 6)
  p.mouse.move(*at(2, 5))
  p.wait_for_selector(f'text=Row 2, column 5 (from 0): code {codes[2, 5]}')
  p.mouse.click(*at(1, 2))
  p.mouse.move(*at(4, 4))
  assert f'Row 1, column 2 (from 0): code {codes[1, 2]}' in p.inner_text('.looker')
  p.keyboard.press('ArrowDown')
  assert f'Row 2, column 2 (from 0): code {codes[2, 2]}' in p.inner_text('.looker') and 'patch=14' in p.url
  drawn = set()
  for mode in ('codes', 'same', 'similar', 'attention', 'cls', 'parts', 'plain'):
    p.check(f'input[value={mode}]')
    drawn.add(p.locator('.stage canvas').evaluate('x => x.toDataURL()'))
  assert len(drawn) == 7
  # The similarity that is shown is the cosine of the features.
  image = np.stack(list(images_of([chosen[4]])))
  x = look().target(image)[0]
  x = x / np.linalg.norm(x, axis=1, keepdims=True)
  shown = p.evaluate('async () => { const a = await looksOf(4); return [similarity(a, 3, a, 20), similarity(a, 0, a, 0)]; }')
  np.testing.assert_allclose(shown, [x[3] @ x[20], 1], atol=0.03)


def test_the_same_code_in_other_images(page, survey):
  chosen = np.unique(np.linspace(0, 39, 30).round().astype(int))
  p = page.open('#image=0&patch=0')
  p.wait_for_selector('h2:has-text("The same code in other images")')
  links = p.locator('.looker .thumb').evaluate_all('x => x.map((y) => y.getAttribute("href"))')
  numbers = [int(link.split('image=')[1].split('&')[0]) for link in links]
  assert numbers and all((survey.codes[chosen[i]] == survey.codes[0, 0, 0]).any() for i in numbers)


def test_images_are_searched(page):
  p = page.open('#images')
  p.wait_for_selector('.thumb')
  assert p.inner_text('h1') == '30 of 40 images'
  p.fill('input[type=search]', 'kind 2')
  assert set(p.locator('.thumb span').all_inner_texts()) == {'kind 2'}


def test_a_lasso_on_the_map_goes_to_its_codes(page):
  p = page.open('#map')
  box = p.locator('.plot').bounding_box()
  x, y, w, h = (box[k] for k in ('x', 'y', 'width', 'height'))
  p.mouse.move(x + 2, y + 2)
  p.mouse.down()
  for to in ((x + w / 2, y + 2), (x + w / 2, y + h - 2), (x + 2, y + h - 2), (x + 2, y + 2)):
    p.mouse.move(*to, steps=5)
  p.mouse.up()
  left = p.evaluate(
    'books.a.order.filter((code, i) => 14 + books.a.map[i][0] * (document.querySelector(".plot").clientWidth - 28) < document.querySelector(".plot").clientWidth / 2).length'
  )
  text = p.inner_text('[role=status]')
  assert text == f'see the {left} chosen codes'
  p.click('[role=status] a')
  p.wait_for_selector(f'button:has-text("chosen on the map: {left}")')
  assert p.inner_text('span[role=status]') == f'{left} codes'
  p.goto(f'{page.site.as_uri()}#map')
  p.locator('.plot canvas').focus()
  for key in ('ArrowRight', 'ArrowDown', 'ArrowRight'):
    p.keyboard.press(key)
  told = p.locator('.plot .card').get_attribute('aria-label').split(',')[0]
  p.keyboard.press('Enter')
  p.wait_for_selector(f'h1:has-text("{told.capitalize()}")')


def test_two_tokenizers_side_by_side(page):
  p = page.open('#compare')
  p.wait_for_selector('.pair')
  assert 'runs/one' in p.inner_text('thead') and 'Mutual information' in p.inner_text('main')
  p.select_option('label:has-text("from") select', 'b')
  p.wait_for_selector('h2:has-text("Codes of runs/two")')
  p.locator('.pair a').first.click()
  p.wait_for_selector('h2:has-text("What runs/one calls these patches")')
  assert 'book=b' in p.url


def test_everything_by_keyboard(page):
  p = page.open()
  p.wait_for_selector('.card')
  seen = set()
  for _ in range(16):
    p.keyboard.press('Tab')
    seen.add(
      p.evaluate(
        'document.activeElement.tagName + " " + (document.activeElement.textContent || document.activeElement.id).slice(0, 12).trim()'
      )
    )
  assert {'A Codes', 'A Images', 'A Map', 'A Compare', 'A About', 'BUTTON Dark', 'INPUT search'} <= seen
  p.locator('.card').first.focus()
  for _ in range(12):
    p.keyboard.press('ArrowDown')
  where = p.evaluate('document.activeElement.closest("[data-i]").getBoundingClientRect().bottom')
  assert 0 < where <= 800 and p.evaluate('window.scrollY') > 300
  name = p.evaluate('document.activeElement.getAttribute("aria-label")').split(',')[0]
  p.keyboard.press('Enter')
  p.wait_for_selector(f'h1:has-text("{name.capitalize()}")')


VIEWS = ('#codes', '#code=0', '#images', '#image=3&patch=5', '#map', '#compare', '#about')


@pytest.mark.parametrize('size, dark', [((1280, 800), False), ((1280, 800), True), ((360, 740), False)], ids=['light', 'dark', 'phone'])
def test_every_view_is_readable(browser, site, size, dark):
  page = Page(browser, site, size, dark, touch=size[0] < 500)
  for view in VIEWS:
    p = page.open(view)
    p.wait_for_function('document.querySelector("main").dataset.ready !== undefined')
    assert_readable(p)
  if dark:
    assert p.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(21, 22, 26)'
    p.click('#theme')
    assert p.evaluate('getComputedStyle(document.body).backgroundColor') == 'rgb(255, 255, 255)'
    p.wait_for_function('document.querySelector("main").dataset.ready !== undefined')
    assert_readable(p)
  page.check()
  page.close()


def test_touch(browser, site, survey):
  page = Page(browser, site, (390, 800), touch=True)
  p = page.open('#image=0')
  box = p.locator('.stage').bounding_box()
  p.touchscreen.tap(box['x'] + 2.5 * box['width'] / 6, box['y'] + 1.5 * box['height'] / 6)
  p.wait_for_selector(f'text=Row 1, column 2 (from 0): code {survey.codes[0, 1, 2]}')
  page.check()
  page.close()


def test_no_labels_no_looks_and_few_codes(browser, tmp_path):
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 9, (1, *GRID)).astype(np.int32)
  survey = Survey(codes, rng.uniform(0, 1, codes.shape).astype(np.float16), 2000, np.zeros((2000, 8, 8, 3), np.float32))
  site = files.build(tmp_path, [a_book('runs/one', survey, 0)], images_of, None, about(1), shown=5)
  page = Page(browser, site)
  p = page.open()
  p.wait_for_selector('.card')
  assert 'codes (100 %) are not used by these images' in p.inner_text('.note')
  assert 'purest' not in p.inner_text('label:has-text("order")')
  p.fill('#search', 'dog')
  assert 'These images have no classes: search by number' in p.inner_text('main')
  for view in ('#code=0', '#code=1999', '#images', '#image=0&patch=1', '#map', '#compare', '#about'):
    p = page.open(view)
    p.wait_for_function('document.querySelector("main").dataset.ready !== undefined')
    assert_readable(p)
  page.check()
  page.close()


def test_a_file_that_is_missing_is_named(browser, site, tmp_path):
  import shutil

  shutil.copytree(site.parent, tmp_path / 'site')
  shutil.rmtree(tmp_path / 'site' / 'a' / 'codes')
  page = Page(browser, tmp_path / 'site' / 'index.html')
  page.open('#code=0').wait_for_selector('text=a/codes/')
  (tmp_path / 'site' / 'data' / 'summary.js').unlink()
  page.open().wait_for_selector('text=data/summary.js is missing: was the whole folder copied?')
  page.close()
