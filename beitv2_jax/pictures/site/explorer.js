// The codebook explorer: plain JavaScript and no library, since a page from disk may load scripts but neither modules nor data.
// Files of data call explorer.load(name, value). explorer_files.py, which writes them, says what is in each.
'use strict';

const explorer = {
  values: new Map(), waiting: new Map(),
  load(name, value) {
    this.values.set(name, value);
    (this.waiting.get(name) || []).forEach((done) => done(value));
    if (name === 'summary') start(value);
  },
  // The value of a file, which is asked for once.
  need(name, file) {
    if (this.values.has(name)) return Promise.resolve(this.values.get(name));
    return new Promise((done, failed) => {
      const others = this.waiting.get(name);
      if (others) { others.push(done); return; }
      this.waiting.set(name, [done]);
      const script = element('script', { src: file });
      script.onerror = () => { this.waiting.delete(name); failed(new Error(`${file} is missing: was the whole folder copied?`)); };
      document.head.append(script);
    });
  },
};
window.explorer = explorer;

let site; // data/summary.js
let books = {}; // by key: what the summary says of a tokenizer, and `rank`, the place of each code in its order
let cleanup = []; // what the present view listens to
const state = { sort: 'usage', query: '', filter: 'used', selection: null, book: 'a', color: '', mode: 'codes', images: '' };

// ---------------------------------------------------------------- small things

function element(tag, attributes = {}, ...children) {
  const made = tag === 'svg' || tag === 'rect' ? document.createElementNS('http://www.w3.org/2000/svg', tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith('on')) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}
const number = (x) => x.toLocaleString('en');
const percent = (x) => (x >= 0.1 ? (100 * x).toFixed(0) : x >= 0.001 ? (100 * x).toFixed(2) : (100 * x).toFixed(4)) + ' %';
const padded = (x, length) => String(x).padStart(length, '0');
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const className = (i) => (i >= 0 && site.classes ? site.classes[i] : '');
const share = (book, code) => book.counts[code] / book.patches;
const linkTo = (parameters) => '#' + new URLSearchParams(parameters).toString();
const codeLink = (book, code) => linkTo(book.key === 'a' ? { code } : { code, book: book.key });
function listen(target, event, handler, options) {
  target.addEventListener(event, handler, options);
  cleanup.push(() => target.removeEventListener(event, handler, options));
}
function codeColor(code) {
  const hue = ((code * 0.618034) % 1) * 360;
  return `hsl(${hue} ${45 + 40 * (code % 2)}% ${62 - 10 * (code % 3)}%)`;
}
const HEAT = [[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]];
function heatColor(value, alpha = 1) {
  const place = Math.min(Math.max(value, 0), 1) * (HEAT.length - 1), left = Math.min(Math.floor(place), HEAT.length - 2), part = place - left;
  const [r, g, b] = HEAT[left].map((x, i) => Math.round(x * (1 - part) + HEAT[left + 1][i] * part));
  return `rgb(${r} ${g} ${b} / ${alpha})`;
}

// A list of which only the part near the window is in the page. `make(i)` gives the element of item i.
class Grid {
  constructor(host, { count, width, height, gap = 10, make, label }) {
    Object.assign(this, { host, count, width, height, gap, make, shown: new Map() });
    host.classList.add('grid');
    host.setAttribute('role', 'list');
    host.setAttribute('aria-label', label);
    const update = () => { if (!this.asked) this.asked = requestAnimationFrame(() => { this.asked = 0; this.draw(); }); };
    listen(window, 'scroll', update, { passive: true });
    listen(window, 'resize', update);
    host.addEventListener('keydown', (event) => this.key(event));
    this.draw();
  }
  draw() {
    const wide = this.host.clientWidth || 300;
    this.columns = Math.max(1, Math.floor((wide + this.gap) / (this.width + this.gap)));
    const line = this.height + this.gap, lines = Math.ceil(this.count / this.columns);
    this.host.style.height = `${Math.max(lines * line, 1)}px`;
    const top = -this.host.getBoundingClientRect().top, seen = window.innerHeight;
    const first = Math.max(0, Math.floor((top - seen / 2) / line)) * this.columns;
    const last = Math.min(this.count, Math.ceil((top + 1.5 * seen) / line) * this.columns);
    for (const [i, made] of this.shown) {
      if ((i < first || i >= last) && !made.contains(document.activeElement)) { made.remove(); this.shown.delete(i); }
    }
    const fresh = [];
    for (let i = first; i < last; i++) {
      let made = this.shown.get(i);
      if (!made) {
        made = element('div', { role: 'listitem', 'aria-setsize': this.count, 'aria-posinset': i + 1, 'data-i': i }, this.make(i));
        made.style.width = `${this.width}px`;
        made.style.height = `${this.height}px`;
        this.shown.set(i, made);
        fresh.push(made);
      }
      made.style.transform = `translate(${(i % this.columns) * (this.width + this.gap)}px, ${Math.floor(i / this.columns) * line}px)`;
    }
    this.host.append(...fresh);
  }
  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: this.columns, ArrowUp: -this.columns, Home: -Infinity, End: Infinity }[event.key];
    const now = event.target.closest('[data-i]');
    if (!step || !now || event.target.tagName !== 'A') return;
    event.preventDefault();
    this.focus(Math.min(Math.max(Number(now.dataset.i) + step, 0), this.count - 1));
  }
  focus(i) {
    const y = this.host.getBoundingClientRect().top + window.scrollY + Math.floor(i / this.columns) * (this.height + this.gap);
    const header = 90, bottom = y + this.height - window.innerHeight + 10;
    if (y - header < window.scrollY) window.scrollTo(0, y - header);
    else if (bottom > window.scrollY) window.scrollTo(0, bottom);
    this.draw();
    this.shown.get(i).querySelector('a').focus({ preventScroll: true });
  }
}

// ---------------------------------------------------------------- pictures of codes

// One cell of a sheet as an element `size` pixels wide; with `wide` the window that it shows, in patches, its middle patch is marked.
function cell(book, kind, code, index, count, size, wide) {
  const rank = book.rank[code], block = Math.floor(rank / site.block), row = rank % site.block;
  const made = element('div', { class: 'sheet' });
  const type = kind === 'means' ? 'png' : 'jpg';
  made.style.cssText = `width:${size}px;height:${size}px;background-image:url(${book.key}/${kind}/${padded(block, 3)}.${type});` +
    `background-size:${count * size}px auto;background-position:${-index * size}px ${-row * size}px`;
  if (wide) made.append(mark(size, wide));
  return made;
}
function mark(size, wide) {
  const side = size / wide, made = element('i');
  made.style.cssText = `left:${(size - side) / 2}px;top:${(size - side) / 2}px;width:${side}px;height:${side}px`;
  return made;
}
const cardWidth = (book) => (site.cells.card_count + book.faces) * (site.cells.card + 2) + 10;
const CARD_HEIGHT = () => site.cells.card + 12 + 36;

// A strip of what a code looks like: small patches with what surrounds them, and its face.
function strip(book, code) {
  const { card, card_count: count, card_window: wide } = site.cells, all = count + book.faces;
  if (book.rank[code] < 0) return element('div', { class: 'strip soft' }, 'does not occur');
  const shown = [...Array(all).keys()].filter((i) => i < (book.few[code] ?? count) || i >= count);
  return element('div', { class: 'strip' }, shown.map((i) => cell(book, 'cards', code, i, all, card, i < count ? wide : 0)));
}
function card(book, code, more) {
  const dominant = book.dominant && book.counts[code] ? className(book.dominant[code]) : '';
  const words = more || dominant || (book.counts[code] ? `spread ${book.spread[code].toFixed(2)}` : '');
  return element('a', { class: 'card', href: codeLink(book, code), 'aria-label': `code ${code}, ${percent(share(book, code))} of patches, ${words}` },
    strip(book, code),
    element('div', { class: 'words' }, element('span', {}, `#${code}`), element('span', {}, percent(share(book, code)))),
    element('div', { class: 'words' }, element('span', {}, words)));
}

// ---------------------------------------------------------------- codes

const SORTS = {
  usage: ['most used', (b) => (x, y) => b.counts[y] - b.counts[x] || x - y],
  rare: ['least used', (b) => (x, y) => b.counts[x] - b.counts[y] || x - y],
  purity: ['purest class', (b) => (x, y) => b.purity[y] - b.purity[x] || b.counts[y] - b.counts[x]],
  spread: ['most spread over the image', (b) => (x, y) => b.spread[y] - b.spread[x] || b.counts[y] - b.counts[x]],
  place: ['most bound to a place', (b) => (x, y) => b.spread[x] - b.spread[y] || b.counts[y] - b.counts[x]],
  number: ['number', () => (x, y) => x - y],
};

function codesInOrder(book) {
  let codes = [...Array(book.size).keys()];
  if (state.filter === 'used') codes = book.order.slice();
  if (state.filter === 'often') codes = book.order.filter((code) => book.counts[code] >= 20);
  if (state.filter === 'unused') codes = codes.filter((code) => !book.counts[code]);
  if (state.selection && state.selection.book === book.key) codes = codes.filter((code) => state.selection.codes.has(code));
  const query = state.query.trim().toLowerCase().replace(/^#/, '');
  if (/^\d+$/.test(query)) codes = codes.filter((code) => String(code).startsWith(query));
  else if (query) codes = codes.filter((code) => book.dominant && book.counts[code] && className(book.dominant[code]).toLowerCase().includes(query));
  const sort = SORTS[state.sort][0] && (state.sort !== 'purity' || book.purity) ? state.sort : 'usage';
  codes.sort(SORTS[sort][1](book));
  if (/^\d+$/.test(query)) codes.sort((x, y) => (String(y) === query) - (String(x) === query));
  return codes;
}

function bookChoice(change) {
  if (site.books.length < 2) return null;
  return choice('tokenizer', site.books.map((b) => [b.key, b.name]), state.book, (value) => { state.book = value; change(); });
}
function choice(label, options, chosen, change) {
  const select = element('select', { onchange: () => change(select.value) });
  for (const [value, text] of options) select.append(element('option', { value, selected: value === chosen }, text));
  return element('label', {}, label, select);
}

function viewCodes(main) {
  const book = books[state.book];
  main.append(element('h1', {}, `${number(book.used)} of ${number(book.size)} codes occur in ${number(site.surveyed)} images`));
  if (book.used < book.size / 2) {
    main.append(element('p', { class: 'note' }, `${number(book.size - book.used)} codes (${percent(1 - book.used / book.size)}) are not used by these images. ` +
      'Few images use few codes; where many images do, the codebook has dead codes, and a smaller one, or reviving them, would serve better.'));
  }
  const found = element('span', { class: 'soft', role: 'status' }), host = element('div');
  const search = element('input', { type: 'search', placeholder: site.classes ? 'number or class' : 'number', value: state.query, 'aria-label': 'search codes', id: 'search' });
  const draw = () => {
    const codes = codesInOrder(book), fresh = element('div');
    host.replaceChildren(fresh);
    found.textContent = codes.length === 1 ? '1 code' : `${number(codes.length)} codes`;
    if (!codes.length) {
      const why = !site.classes && state.query && !/^#?\d+$/.test(state.query.trim()) ? ' These images have no classes: search by number.' : '';
      fresh.append(element('p', { class: 'empty' }, `No code fits.${why}`));
      return;
    }
    new Grid(fresh, { count: codes.length, width: cardWidth(book), height: CARD_HEIGHT(), make: (i) => card(book, codes[i]), label: 'codes' });
  };
  search.addEventListener('input', () => { state.query = search.value; draw(); });
  const sorts = Object.entries(SORTS).filter(([key]) => key !== 'purity' || book.purity).map(([key, [text]]) => [key, text]);
  main.append(element('div', { class: 'bar' },
    search,
    choice('order', sorts, state.sort, (value) => { state.sort = value; draw(); }),
    choice('show', [['used', 'used'], ['often', 'used 20 times or more'], ['unused', 'unused'], ['all', 'all']], state.filter, (value) => { state.filter = value; draw(); }),
    bookChoice(show),
    state.selection && state.selection.book === book.key ? element('button', { type: 'button', onclick: () => { state.selection = null; show(); } },
      `chosen on the map: ${number(state.selection.codes.size)} ✕`) : null,
    found), host);
  draw();
}

async function viewCode(main, parameters) {
  const book = books[parameters.get('book') || 'a'] || books.a, code = Number(parameters.get('code'));
  if (!Number.isInteger(code) || code < 0 || code >= book.size) {
    main.append(element('p', { class: 'empty' }, `There is no code ${parameters.get('code')}: this codebook has 0 to ${book.size - 1}.`));
    return;
  }
  const order = codesInOrder(book), place = order.indexOf(code);
  const step = (by, text) => {
    const other = order[place + by];
    return place < 0 || other === undefined ? null : element('a', { href: codeLink(book, other), rel: by < 0 ? 'prev' : 'next' }, text);
  };
  main.append(element('div', { class: 'bar' }, element('a', { href: '#codes' }, 'all codes'), step(-1, '← previous'), step(1, 'next →')),
    element('h1', {}, `Code ${code}`, site.books.length > 1 ? element('span', { class: 'soft' }, ` of ${book.name}`) : null));
  if (!book.counts[code]) {
    main.append(element('p', { class: 'empty' }, `No patch of these ${number(site.surveyed)} images has this code.`));
    return;
  }
  listen(document, 'keydown', (event) => {
    const other = order[place + { ArrowLeft: -1, ArrowRight: 1 }[event.key]];
    if (place >= 0 && other !== undefined && document.activeElement === document.querySelector('main')) location.hash = codeLink(book, other);
  });
  const block = Math.floor(book.rank[code] / site.block);
  const about = (await explorer.need(`${book.key}/codes/${block}`, `${book.key}/codes/${padded(block, 3)}.js`))[code];
  const facts = [
    ['patches that have it', `${number(book.counts[code])}, ${percent(share(book, code))}`],
    ['rank by usage', `${number(book.rank[code] + 1)} of ${number(book.used)}`],
    ['spread over the image (0 one place, 1 everywhere)', book.spread[code].toFixed(2)],
    book.purity ? ['purity of its classes (0 as the data, 1 one class)', book.purity[code].toFixed(2)] : null,
  ].filter(Boolean);
  const { window: wide, count } = site.cells;
  const size = 112;
  main.append(element('h2', {}, 'Most typical patches'), element('div', { class: 'typical' }, about.typical.map(([image, row, column, near], i) => {
    const picture = cell(book, 'details', code, i, count, size, wide);
    const link = image >= 0 ? element('a', { href: linkTo({ image, patch: row * site.grid[1] + column, book: book.key }), 'aria-label': `typical patch ${i + 1}, in image ${image}` }, picture) : picture;
    return element('figure', {}, link, element('figcaption', {}, `${book.measure} ${near.toFixed(2)}`));
  })));
  if (about.typical.length < count) main.append(element('p', { class: 'soft' }, `It occurs in ${about.typical.length} image${about.typical.length === 1 ? '' : 's'} only.`));
  const heat = element('canvas', { width: site.grid[1], height: site.grid[0], class: 'pixels', role: 'img', 'aria-label': `where in the image code ${code} occurs` });
  heat.style.cssText = `width:168px;height:${Math.round((168 * site.grid[0]) / site.grid[1])}px`;
  const context = heat.getContext('2d');
  bytes(about.heat).forEach((value, i) => { context.fillStyle = heatColor(value / 255); context.fillRect(i % site.grid[1], Math.floor(i / site.grid[1]), 1, 1); });
  const means = element('div', { class: 'typical' }, element('figure', {}, cell(book, 'means', code, 0, 1 + book.faces, 84), element('figcaption', {}, 'mean patch')),
    book.faces ? element('figure', {}, cell(book, 'means', code, 1, 2, 84), element('figcaption', {}, 'its face')) : null);
  const table = element('table', {}, element('tbody', {}, facts.map(([name, value]) => element('tr', {}, element('td', {}, name), element('td', {}, value)))));
  main.append(element('div', { class: 'columns' },
    element('section', {}, element('h2', {}, 'In numbers'), table),
    element('section', {}, element('h2', {}, 'Where in the image'), heat, element('p', { class: 'soft' }, `${number(about.most)} times at its most frequent place`)),
    element('section', {}, element('h2', {}, book.faces ? 'What it looks like' : 'On average'), means),
    about.classes ? element('section', {}, element('h2', {}, 'Classes of its images'), element('table', {}, element('tbody', {}, about.classes.map(([c, part]) => {
      const meter = element('span', { class: 'meter' }, element('b'));
      meter.firstChild.style.width = `${100 * part}%`;
      return element('tr', {}, element('td', {}, className(c)), element('td', {}, meter), element('td', {}, percent(part)));
    })))) : null));
  const cards = (list, words) => element('ul', { class: 'cards' }, list.map(([other, value]) => element('li', {}, card(book, other, words(value)))));
  main.append(element('h2', {}, 'Nearest codes'), cards(about.nearest, (x) => `${book.measure} ${x.toFixed(2)}`), element('h2', {}, 'Codes of the same images'),
    about.together.length ? cards(about.together, (x) => `${x.toFixed(1)} times chance`) : element('p', { class: 'empty' }, 'None occurs with it more often than by chance.'));
  if (site.books.length > 1) {
    const pairs = (await explorer.need('compare', 'data/compare.js'))[book.key][code] || [], other = books[book.key === 'a' ? 'b' : 'a'];
    main.append(element('h2', {}, `What ${other.name} calls these patches`),
      element('ul', { class: 'cards' }, pairs.map(([match, part]) => element('li', {}, card(other, match, `${percent(part)} of them`)))));
  }
  main.append(element('h2', {}, 'Images with most of it'), about.images.length ? element('div', { class: 'cards' },
    about.images.map(([image, cells]) => thumb(image, cells, 112, { image, patch: cells[0], book: book.key }))) : element('p', { class: 'empty' }, 'None of the images that can be opened has it.'));
}

// ---------------------------------------------------------------- images

function thumb(image, cells, size, parameters, words) {
  const [rows, columns] = site.grid;
  const made = element('a', { class: 'thumb', href: linkTo(parameters || { image }) },
    element('img', { src: `images/${padded(image, 5)}.jpg`, alt: site.names[image], loading: 'lazy', decoding: 'async', width: size, height: size }));
  if (cells) {
    const drawing = element('svg', { viewBox: `0 0 ${columns} ${rows}`, 'aria-hidden': 'true' });
    cells.forEach((c) => drawing.append(element('rect', { x: (c % columns) + 0.04, y: Math.floor(c / columns) + 0.04, width: 0.92, height: 0.92, fill: 'none', stroke: '#ff3b1f', 'stroke-width': 0.16 })));
    made.append(drawing);
  }
  made.append(element('span', {}, words || (site.labels && className(site.labels[image])) || site.names[image]));
  made.style.width = `${size}px`;
  return made;
}

function viewImages(main) {
  main.append(element('h1', {}, `${number(site.images)} of ${number(site.surveyed)} images`));
  const host = element('div'), found = element('span', { class: 'soft', role: 'status' });
  const search = element('input', { type: 'search', placeholder: site.classes ? 'name or class' : 'name', value: state.images, 'aria-label': 'search images' });
  const added = new Set(site.added || []);
  const draw = () => {
    const query = state.images.trim().toLowerCase();
    let list = [...Array(site.images).keys()].filter((i) => !query || site.names[i].toLowerCase().includes(query) ||
      (site.labels && className(site.labels[i]).toLowerCase().includes(query)));
    list.sort((x, y) => added.has(y) - added.has(x) || x - y);
    const fresh = element('div');
    host.replaceChildren(fresh);
    found.textContent = list.length === 1 ? '1 image' : `${number(list.length)} images`;
    if (!list.length) fresh.append(element('p', { class: 'empty' }, 'No image fits.'));
    else new Grid(fresh, { count: list.length, width: 132, height: 156, make: (i) => thumb(list[i], null, 132), label: 'images' });
  };
  search.addEventListener('input', () => { state.images = search.value; draw(); });
  main.append(element('div', { class: 'bar' }, search, found), host);
  draw();
}

async function codesOf(image, key) {
  const block = Math.floor(image / site.image_block), value = await explorer.need(`images/${block}`, `images/codes/${padded(block, 3)}.js`);
  const all = new Uint32Array(bytes(value[key]).buffer), patches = site.grid[0] * site.grid[1], first = (image % site.image_block) * patches;
  return all.subarray(first, first + patches);
}
async function looksOf(image) {
  const value = await explorer.need(`looks/${image}`, `images/looks/${padded(image, 5)}.js`);
  if (!value.ready) {
    value.short = new Int8Array(bytes(value.features).buffer);
    value.seen = bytes(value.attention);
    value.rgb = bytes(value.colors);
    value.ready = true;
  }
  return value;
}
// Cosine of the teacher's features at two patches.
function similarity(a, i, b, j) {
  const d = site.look.dimensions;
  let sum = 0;
  for (let k = 0; k < d; k++) sum += a.short[i * d + k] * b.short[j * d + k];
  return sum / (a.scale * b.scale);
}
const MODES = {
  codes: 'codes', same: 'patches of the same code', similar: 'similar for the teacher', attention: 'where this patch looks', cls: 'where [CLS] looks', parts: 'principal components', plain: 'nothing',
};

async function viewImage(main, parameters) {
  const book = books[parameters.get('book') || state.book] || books.a, image = Number(parameters.get('image'));
  const [rows, columns] = site.grid, patches = rows * columns;
  if (!Number.isInteger(image) || image < 0 || image >= site.images) {
    main.append(element('p', { class: 'empty' }, `There is no image ${parameters.get('image')}: 0 to ${site.images - 1} can be opened.`));
    return;
  }
  const codes = await codesOf(image, book.key), looks = site.look ? await looksOf(image) : null;
  if (!looks && ['similar', 'attention', 'cls', 'parts'].includes(state.mode)) state.mode = 'codes';
  let patch = Math.min(Math.max(Number(parameters.get('patch')) || 0, 0), patches - 1), pinned = parameters.has('patch');
  const canvas = element('canvas', { width: 896, height: Math.round((896 * rows) / columns) }), context = canvas.getContext('2d');
  const stage = element('div', { class: 'stage', tabindex: 0, role: 'group', 'aria-label': `${site.names[image]}: arrow keys move from patch to patch, Enter opens the code` },
    element('img', { src: `images/${padded(image, 5)}.jpg`, alt: site.names[image] }), canvas);
  stage.style.aspectRatio = `${columns} / ${rows}`;
  const panel = element('div', { 'aria-live': 'polite' }), others = element('div');
  const side = canvas.width / columns;

  function fillOf(p) {
    if (state.mode === 'codes') return codeColor(codes[p]).replace(')', ' / .55)');
    if (state.mode === 'same') return codes[p] === codes[patch] ? null : 'rgb(0 0 0 / .6)';
    if (state.mode === 'similar') return heatColor(similarity(looks, patch, looks, p), 0.75);
    if (state.mode === 'attention') return heatColor(looks.seen[(1 + patch) * patches + p] / 255, 0.75);
    if (state.mode === 'cls') return heatColor(looks.seen[p] / 255, 0.75);
    if (state.mode === 'parts') return `rgb(${looks.rgb[3 * p]} ${looks.rgb[3 * p + 1]} ${looks.rgb[3 * p + 2]})`;
    return null;
  }
  function draw() {
    context.clearRect(0, 0, canvas.width, canvas.height);
    for (let p = 0; p < patches; p++) {
      const fill = fillOf(p);
      if (!fill) continue;
      context.fillStyle = fill;
      context.fillRect((p % columns) * side, Math.floor(p / columns) * side, side, side);
    }
    for (let p = 0; p < patches; p++) {
      if (codes[p] !== codes[patch]) continue;
      const x = (p % columns) * side, y = Math.floor(p / columns) * side, width = p === patch ? side / 7 : side / 16;
      context.lineWidth = width + 3; context.strokeStyle = '#000';
      context.strokeRect(x + width / 2, y + width / 2, side - width, side - width);
      context.lineWidth = width; context.strokeStyle = '#fff';
      context.strokeRect(x + width / 2, y + width / 2, side - width, side - width);
    }
  }
  function tell() {
    const code = codes[patch], same = [...codes.keys()].filter((p) => p !== patch && codes[p] === code);
    const likeness = looks && same.length ? same.map((p) => similarity(looks, patch, looks, p)) : [];
    const mean = likeness.length ? likeness.reduce((x, y) => x + y) / likeness.length : null;
    panel.replaceChildren(element('p', {}, `Row ${Math.floor(patch / columns)}, column ${patch % columns} (from 0): code ${code}`), card(book, code),
      element('p', {}, same.length ? `${same.length} other patch${same.length === 1 ? '' : 'es'} of this image ha${same.length === 1 ? 's' : 've'} it` : 'No other patch of this image has it') );
    if (mean !== null) panel.lastChild.append(`; for the teacher they are ${mean.toFixed(2)} similar (mean cosine).`);
    else panel.lastChild.append('.');
  }
  let asked = 0;
  async function elsewhere() {
    const code = codes[patch], turn = ++asked, block = Math.floor(book.rank[code] / site.block);
    if (book.rank[code] < 0) { others.replaceChildren(element('p', { class: 'empty' }, 'No surveyed image has this code.')); return; }
    const about = (await explorer.need(`${book.key}/codes/${block}`, `${book.key}/codes/${padded(block, 3)}.js`))[code];
    const list = about.images.filter(([other]) => other !== image).slice(0, 12);
    const theirs = looks ? await Promise.all(list.map(([other]) => looksOf(other))) : [];
    if (turn !== asked) return;
    others.replaceChildren(element('h2', {}, 'The same code in other images'), list.length ? element('div', { class: 'cards' }, list.map(([other, cells], i) => {
      const best = looks ? cells.map((c) => similarity(looks, patch, theirs[i], c)) : [];
      return thumb(other, cells, 112, { image: other, patch: cells[0], book: book.key }, looks ? `similar ${Math.max(...best).toFixed(2)}` : undefined);
    })) : element('p', { class: 'empty' }, 'None of the other images that can be opened has it.'));
  }
  const move = (to, pin) => {
    if (to !== patch) { patch = to; draw(); tell(); }
    if (pin) { pinned = true; history.replaceState(null, '', linkTo(Object.assign({ image, patch }, book.key === 'a' ? {} : { book: book.key }))); elsewhere(); }
  };
  const under = (event) => {
    const box = canvas.getBoundingClientRect();
    const x = Math.floor(((event.clientX - box.left) / box.width) * columns), y = Math.floor(((event.clientY - box.top) / box.height) * rows);
    return Math.min(Math.max(y, 0), rows - 1) * columns + Math.min(Math.max(x, 0), columns - 1);
  };
  stage.addEventListener('pointermove', (event) => { if (!pinned && event.pointerType === 'mouse') move(under(event)); });
  stage.addEventListener('click', (event) => { const to = under(event); if (pinned && to === patch && event.detail) pinned = false; else move(to, true); });
  stage.addEventListener('keydown', (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    if (event.key === 'Enter') location.hash = codeLink(book, codes[patch]);
    if (!by) return;
    event.preventDefault();
    if (patch + by >= 0 && patch + by < patches) move(patch + by, true);
  });
  const modes = element('fieldset', { class: 'modes' }, element('legend', { class: 'soft' }, 'drawn over the image'));
  for (const [key, text] of Object.entries(MODES)) {
    if (!looks && ['similar', 'attention', 'cls', 'parts'].includes(key)) continue;
    modes.append(element('label', {}, element('input', { type: 'radio', name: 'mode', value: key, checked: state.mode === key, onchange: () => { state.mode = key; draw(); } }), ' ', text));
  }
  const neighbour = (to, text) => (to < 0 || to >= site.images ? null : element('a', { href: linkTo({ image: to }) }, text));
  main.append(element('div', { class: 'bar' }, element('a', { href: '#images' }, 'all images'), neighbour(image - 1, '← previous'), neighbour(image + 1, 'next →'),
    site.books.length > 1 ? choice('tokenizer', site.books.map((b) => [b.key, b.name]), book.key, (value) => { state.book = value; location.hash = linkTo({ image, patch, book: value }); }) : null),
  element('h1', {}, site.names[image], site.labels && className(site.labels[image]) ? element('span', { class: 'soft' }, ` ${className(site.labels[image])}`) : null),
  element('div', { class: 'looker' },
    element('div', {}, stage, modes, element('p', { class: 'soft' }, 'Point at a patch; click to hold it, and again to let it go.')),
    element('div', {}, panel, others)));
  draw(); tell(); elsewhere();
}

// ---------------------------------------------------------------- map

const DISTINCT = ['#1f77b4', '#d95f02', '#2ca02c', '#c22f2f', '#8a5cc2', '#8c564b', '#d14fa4', '#6b7077', '#98981f', '#1397a8'];

function viewMap(main) {
  const book = books[state.book], codes = book.order;
  const largest = Math.max(...codes.map((c) => book.counts[c])), mostPure = book.purity ? Math.max(...codes.map((c) => book.purity[c]), 1e-9) : 1;
  if (!state.color) state.color = codes.length <= 1500 ? 'patches' : 'usage';
  if (['purity', 'class'].includes(state.color) && !book.purity) state.color = 'usage';
  let classes = [];
  if (book.dominant) {
    const tally = new Map();
    codes.forEach((c) => tally.set(book.dominant[c], (tally.get(book.dominant[c]) || 0) + 1));
    classes = [...tally].sort((x, y) => y[1] - x[1]).slice(0, DISTINCT.length - 1).map(([c]) => c);
  }
  const colorOf = (code) => {
    if (state.color === 'usage') return heatColor(Math.log1p(book.counts[code]) / Math.log1p(largest));
    if (state.color === 'purity') return heatColor(book.purity[code] / mostPure);
    const place = classes.indexOf(book.dominant[code]);
    return place < 0 ? '#8b909b' : DISTINCT[place];
  };
  const canvas = element('canvas', { tabindex: 0, role: 'group', 'aria-label': `map of ${codes.length} codes: arrow keys go to the next code that way, Enter opens it` });
  const plot = element('div', { class: 'plot' }, canvas), legend = element('div', { class: 'legend' });
  const context = canvas.getContext('2d'), told = element('p', { class: 'soft', role: 'status' });
  let at = -1, loop = null, places = [];
  const radius = Math.max(2, Math.min(7, 160 / Math.sqrt(codes.length)));
  // The most typical patch of each code, cut out of the sheets of cards as they come.
  const sheets = new Map(), all = site.cells.card_count + book.faces, side = Math.max(12, Math.min(36, 900 / Math.sqrt(codes.length)));
  function sheet(block) {
    if (!sheets.has(block)) {
      const picture = new Image();
      picture.addEventListener('load', draw);
      picture.src = `${book.key}/cards/${padded(block, 3)}.jpg`;
      sheets.set(block, picture);
    }
    return sheets.get(block);
  }
  function drawPatch(code, x, y) {
    const picture = sheet(Math.floor(book.rank[code] / site.block));
    if (!picture.complete || !picture.naturalWidth) return;
    const cellSide = picture.naturalWidth / all, patch = cellSide / site.cells.card_window, edge = (cellSide - patch) / 2;
    context.drawImage(picture, edge, (book.rank[code] % site.block) * cellSide + edge, patch, patch, x - side / 2, y - side / 2, side, side);
  }
  function draw() {
    const scale = window.devicePixelRatio || 1, wide = plot.clientWidth, high = plot.clientHeight, margin = 14;
    if (canvas.width !== wide * scale || canvas.height !== high * scale) { canvas.width = wide * scale; canvas.height = high * scale; }
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, wide, high);
    places = book.map.map(([x, y]) => [margin + x * (wide - 2 * margin), margin + y * (high - 2 * margin)]);
    const inside = state.selection && state.selection.book === book.key ? state.selection.codes : null;
    codes.forEach((code, i) => {
      context.globalAlpha = inside && !inside.has(code) ? 0.2 : 1;
      if (state.color === 'patches') { drawPatch(code, ...places[i]); return; }
      context.fillStyle = colorOf(code);
      context.beginPath();
      context.arc(places[i][0], places[i][1], radius, 0, 7);
      context.fill();
    });
    context.globalAlpha = 1;
    context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue('--text');
    if (at >= 0) { context.lineWidth = 2; context.beginPath(); context.arc(places[at][0], places[at][1], state.color === 'patches' ? side * 0.8 : radius + 4, 0, 7); context.stroke(); }
    if (loop) { context.lineWidth = 1.5; context.beginPath(); loop.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y))); context.stroke(); }
  }
  function describe() {
    if (state.color === 'patches') { legend.replaceChildren('Each code is drawn as its most typical patch.'); return; }
    legend.replaceChildren(...(state.color === 'class' ? [...classes.map((c, i) => [DISTINCT[i], className(c)]), ['#8b909b', 'other classes']]
      : [0, 0.5, 1].map((x) => [heatColor(x), state.color === 'usage' ? number(Math.round(Math.expm1(x * Math.log1p(largest)))) + ' patches' : 'purity ' + (x * mostPure).toFixed(2)]))
      .map(([color, text]) => { const dot = element('b'); dot.style.background = color; return element('span', {}, dot, text); }));
  }
  function point(i) {
    at = i;
    plot.querySelector('.card')?.remove();
    if (i >= 0) {
      const made = card(book, codes[i]);
      made.tabIndex = -1;
      const [x, y] = places[i], width = cardWidth(book);
      made.style.left = `${Math.max(2, Math.min(x + 12, plot.clientWidth - width - 4))}px`;
      made.style.top = `${y + CARD_HEIGHT() + 16 > plot.clientHeight ? y - CARD_HEIGHT() - 12 : y + 12}px`;
      plot.append(made);
    }
    draw();
  }
  function near(event) {
    const box = canvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
    let best = -1, least = event.pointerType === 'touch' ? 900 : 300;
    places.forEach(([a, b], i) => { const d = (a - x) ** 2 + (b - y) ** 2; if (d < least) { least = d; best = i; } });
    return [best, x, y];
  }
  canvas.addEventListener('pointerdown', (event) => { const [, x, y] = near(event); loop = [[x, y]]; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener('pointermove', (event) => {
    const [best, x, y] = near(event);
    if (!loop) { if (best !== at) point(best); return; }
    loop.push([x, y]);
    draw();
  });
  canvas.addEventListener('pointerleave', () => { if (!loop && document.activeElement !== canvas) point(-1); });
  canvas.addEventListener('pointercancel', () => { loop = null; draw(); });
  canvas.addEventListener('pointerup', (event) => {
    const drawn = loop || [], [best] = near(event);
    loop = null;
    const span = drawn.length ? Math.max(...drawn.map(([x, y]) => Math.hypot(x - drawn[0][0], y - drawn[0][1]))) : 0;
    if (span < 8) { if (best >= 0) location.hash = codeLink(book, codes[best]); else { state.selection = null; tell(); draw(); } return; }
    const chosen = codes.filter((code, i) => within(places[i], drawn));
    state.selection = chosen.length ? { book: book.key, codes: new Set(chosen) } : null;
    tell();
    draw();
  });
  canvas.addEventListener('keydown', (event) => {
    const way = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] }[event.key];
    if (event.key === 'Enter' && at >= 0) location.hash = codeLink(book, codes[at]);
    if (!way) return;
    event.preventDefault();
    if (at < 0) { point(0); return; }
    let best = -1, least = Infinity;
    places.forEach(([x, y], i) => {
      const dx = x - places[at][0], dy = y - places[at][1], along = dx * way[0] + dy * way[1], across = Math.abs(dx * way[1] + dy * way[0]);
      if (i !== at && along > 0.5 && along + 3 * across < least) { least = along + 3 * across; best = i; }
    });
    if (best >= 0) { point(best); told.textContent = `code ${codes[best]}`; }
  });
  function tell() {
    const inside = state.selection && state.selection.book === book.key ? state.selection.codes.size : 0;
    told.replaceChildren(...(inside ? [element('a', { href: '#codes' }, `see the ${number(inside)} chosen codes`)] : ['Click a code to open it, or draw around several.']));
  }
  main.append(element('h1', {}, `Map of ${number(codes.length)} codes`), element('div', { class: 'bar' },
    choice('show', [['patches', 'patches'], ['usage', 'usage'], ...(book.purity ? [['purity', 'purity'], ['class', 'most frequent class']] : [])], state.color, (value) => { state.color = value; describe(); draw(); }),
    bookChoice(show), told), plot, legend, element('p', { class: 'soft' }, 'Codes whose vectors are near lie near each other (t-SNE); distances across the map mean little.'));
  listen(window, 'resize', draw);
  describe(); tell(); draw();
}
function within([x, y], loop) {
  let inside = false;
  for (let i = 0, j = loop.length - 1; i < loop.length; j = i++) {
    const [a, b] = loop[i], [c, d] = loop[j];
    if (b > y !== d > y && x < ((c - a) * (y - b)) / (d - b) + a) inside = !inside;
  }
  return inside;
}

// ---------------------------------------------------------------- comparison

async function viewCompare(main) {
  if (site.books.length < 2) {
    main.append(element('p', { class: 'empty' }, 'This explorer is of one tokenizer. Make it again with --compare DIR to see two side by side.'));
    return;
  }
  const data = await explorer.need('compare', 'data/compare.js'), { a, b } = books;
  const lines = [
    ['codes used', ...[a, b].map((x) => `${number(x.used)} of ${number(x.size)}`)],
    ['perplexity (codes, if all were used alike)', ...[a, b].map((x) => number(Math.round(x.perplexity)))],
    ['entropy of the codes, bits', data.entropy_a.toFixed(2), data.entropy_b.toFixed(2)],
    ...(a.mean_purity === undefined ? [] : [['mean purity of classes', ...[a, b].map((x) => x.mean_purity.toFixed(3))]]),
  ];
  main.append(element('h1', {}, 'Two tokenizers on the same patches'),
    element('table', {}, element('thead', {}, element('tr', {}, element('th', {}, ''), element('th', {}, a.name), element('th', {}, b.name))),
      element('tbody', {}, lines.map((line) => element('tr', {}, line.map((x) => element('td', {}, x)))))),
    element('p', {}, `Mutual information: ${data.information.toFixed(2)} bits, ${percent(data.normalized)} of the mean entropy. 100 % would mean that each code of one tells the code of the other.`));
  const host = element('div');
  const draw = () => {
    const [from, to] = state.book === 'a' ? [a, b] : [b, a], table = data[from.key];
    const codes = from.order.slice().sort((x, y) => table[y][0][1] - table[x][0][1] || from.counts[y] - from.counts[x]);
    const fresh = element('div'), width = cardWidth(from) + cardWidth(to) + 80;
    host.replaceChildren(element('h2', {}, `Codes of ${from.name}, and what ${to.name} calls most of their patches`), fresh);
    const stacked = host.clientWidth < width;
    new Grid(fresh, {
      count: codes.length, width: stacked ? Math.max(cardWidth(from), cardWidth(to)) : width, height: stacked ? 2 * CARD_HEIGHT() + 30 : CARD_HEIGHT(), label: 'codes that correspond',
      make: (i) => {
        const pair = element('div', { class: 'pair' }, card(from, codes[i]), element('span', {}, `${percent(table[codes[i]][0][1])} →`), card(to, table[codes[i]][0][0]));
        if (stacked) pair.style.flexDirection = 'column';
        return pair;
      },
    });
  };
  main.append(element('div', { class: 'bar' }, choice('from', site.books.map((x) => [x.key, x.name]), state.book, (value) => { state.book = value; draw(); })), host);
  draw();
}

function viewAbout(main) {
  const look = site.look;
  main.append(element('h1', {}, 'About these figures'));
  const say = (text) => main.append(element('p', {}, text));
  say(`Made ${site.made.replace('T', ' ')} from ${number(site.surveyed)} images of ${site.source}, prepared as for evaluation (${site.side} px, ${site.grid[0]} x ${site.grid[1]} patches). ` +
    (site.skipped ? `${number(site.skipped)} that do not decode were left out. ` : '') + `${number(site.images)} can be opened here; the figures of codes are of all.`);
  site.books.forEach((book) => say(`${book.name}: ${number(book.used)} of ${number(book.size)} codes occur; perplexity ${number(Math.round(book.perplexity))}.`));
  say('Typical patches are those whose vectors are nearest to the code, one an image, with what surrounds them; beyond the image all is grey. ' +
    'How near is 1 less half the squared distance: the cosine, where vectors have length 1.');
  say('Spread is the entropy of where in the image a code occurs, over the largest possible.');
  if (site.classes) say('Purity is 1 less the entropy of the classes of a code’s patches over that of all patches. A code that occurs a few times is pure by chance.');
  else say('These images have no labels: there are no classes, and no purity.');
  say('Codes of the same images are ranked by how far their number of common images exceeds chance.');
  if (look) say(`Similarity is the cosine of ${look.target}, made from ${look.dimensions} of their directions: off by ${look.error.toFixed(3)} on average.`);
  if (site.added) say(`${site.added.length} images were added to be looked at; no figure counts them.`);
}

// ---------------------------------------------------------------- the page

const VIEWS = { codes: ['Codes', viewCodes], images: ['Images', viewImages], map: ['Map', viewMap], compare: ['Compare', viewCompare], about: ['About', viewAbout] };

async function show() {
  const parameters = new URLSearchParams(location.hash.slice(1)), main = document.querySelector('main');
  if (location.hash === '#main') { main.focus(); return; }
  cleanup.forEach((f) => f());
  cleanup = [];
  const view = parameters.has('code') ? 'codes' : parameters.has('image') ? 'images' : Object.keys(VIEWS).find((key) => parameters.has(key)) || 'codes';
  const tabs = Object.entries(VIEWS).filter(([key]) => key !== 'compare' || site.books.length > 1);
  document.querySelector('#tabs').replaceChildren(...tabs.map(([key, [text]]) => element('a', { href: '#' + key, 'aria-current': key === view ? 'page' : null }, text)));
  const fresh = element('div');
  main.replaceChildren(fresh);
  window.scrollTo(0, 0);
  try {
    if (parameters.has('code')) await viewCode(fresh, parameters);
    else if (parameters.has('image')) await viewImage(fresh, parameters);
    else await VIEWS[view][1](fresh);
  } catch (error) {
    fresh.append(element('p', { class: 'note', role: 'alert' }, error.message));
    if (!/is missing/.test(error.message)) throw error;
  }
  main.dataset.ready = location.hash;
}

function start(summary) {
  site = summary;
  for (const book of site.books) {
    book.rank = new Int32Array(book.size).fill(-1);
    book.order.forEach((code, i) => { book.rank[code] = i; });
    book.faces = Number(book.faces);
    books[book.key] = book;
  }
  document.title = site.title;
  document.querySelector('#title').textContent = site.title;
  window.addEventListener('hashchange', () => { show().then(() => { if (location.hash !== '#main') document.querySelector('main').focus({ preventScroll: true }); }); });
  show();
}

(function theme() {
  const button = document.querySelector('#theme'), kept = (() => { try { return localStorage.getItem('theme'); } catch { return null; } })();
  const set = (dark) => {
    document.documentElement.dataset.theme = dark ? 'dark' : 'light';
    button.textContent = dark ? 'Light' : 'Dark';
    button.setAttribute('aria-label', `${dark ? 'light' : 'dark'} colours`);
  };
  set(kept ? kept === 'dark' : matchMedia('(prefers-color-scheme: dark)').matches);
  button.addEventListener('click', () => {
    const dark = document.documentElement.dataset.theme !== 'dark';
    set(dark);
    try { localStorage.setItem('theme', dark ? 'dark' : 'light'); } catch { /* a browser may refuse; then it lasts as long as the page */ }
    if (site) show();
  });
  setTimeout(() => { const waiting = document.querySelector('#loading'); if (!site && waiting) waiting.textContent = 'data/summary.js is missing: was the whole folder copied?'; }, 3000);
})();
