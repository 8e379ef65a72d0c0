const data = JSON.parse(document.getElementById('data').textContent);
const { pictures, colours } = data;

// Pictures: a photograph, and its map as a grey picture; the three views are drawn from the two.
function load(source) {
  return new Promise((resolve) => {
    if (!source) return resolve(null);
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => resolve(null);
    image.src = source;
  });
}

function pixels(image, width, height) {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext('2d', { willReadFrequently: true });
  if (image) context.drawImage(image, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

function blend(view, photo, map, hasPhoto) {
  const out = new ImageData(photo.width, photo.height);
  for (let i = 0; i < out.data.length; i += 4) {
    const level = map.data[i];
    for (let c = 0; c < 3; c++) {
      const under = photo.data[i + c];
      const colour = colours[3 * level + c];
      if (view === 'photo') out.data[i + c] = under;
      else if (view === 'energy') out.data[i + c] = under * level / 255;
      else out.data[i + c] = hasPhoto ? (under + colour) / 2 : colour;
    }
    out.data[i + 3] = 255;
  }
  return out;
}

async function draw(canvas, picture, view, scale = 1) {
  const [photo, map] = await Promise.all([load(picture.photo), load(picture.map)]);
  const [width, height] = picture.size.map((length) => Math.max(1, Math.round(length * scale)));
  const shown = map ? view : 'photo';
  const blended = blend(shown, pixels(photo, width, height), pixels(map, width, height), photo !== null);
  canvas.width = width;
  canvas.height = height;
  canvas.getContext('2d').putImageData(blended, 0, 0);
}

// Boxes of the regions, white with a dark edge.
function outline(canvas, regions) {
  const context = canvas.getContext('2d');
  for (const [x0, y0, x1, y1] of regions) {
    const box = [x0 * canvas.width, y0 * canvas.height, (x1 - x0) * canvas.width, (y1 - y0) * canvas.height];
    for (const [colour, width] of [['#000', 4], ['#fff', 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(...box);
    }
  }
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    const picture = pictures[target.dataset.picture];
    draw(target.querySelector('canvas'), picture, 'map', Math.min(1, 112 / Math.max(...picture.size)));
  }
}, { rootMargin: '400px' });
const thumbs = [...document.querySelectorAll('.thumb')];
thumbs.forEach((thumb) => seen.observe(thumb));

// The viewer: image, map and energy map of a thumbnail, and those beside it in its list.
const viewer = document.getElementById('viewer');
let list = [];
let place = 0;

function percent(value) { return value === null ? '' : ` (${(100 * value).toFixed(1)}\u00a0%)`; }

function show(step = 0) {
  place = (place + step + list.length) % list.length;
  const picture = pictures[list[place].dataset.picture];
  document.getElementById('viewer-title').textContent = picture.image;
  document.getElementById('place').textContent = `${place + 1} of ${list.length}`;
  const facts = { predicted: picture.prediction + percent(picture.probability), group: picture.group };
  if (picture.label) facts.label = picture.label + percent(picture.label_probability);
  if (picture.corners !== null) facts['energy in the corners'] = `${(100 * picture.corners).toFixed(0)}\u00a0%`;
  facts.regions = picture.regions.length;
  if (picture.unlike !== null) facts['distance from its class'] = `${picture.unlike.toFixed(1)} times the median`;
  const terms = Object.entries(facts).filter(([, value]) => value !== '').flatMap(([name, value]) => {
    const term = document.createElement('dt');
    const text = document.createElement('dd');
    term.textContent = name;
    text.textContent = value;
    return [term, text];
  });
  document.getElementById('viewer-facts').replaceChildren(...terms);
  for (const figure of viewer.querySelectorAll('figure')) {
    figure.hidden = (!picture.photo && figure.matches('.of-photo')) || (!picture.map && figure.matches('.of-map'));
  }
  for (const canvas of viewer.querySelectorAll('canvas')) {
    const regions = canvas.dataset.view === 'map' ? picture.regions : [];
    draw(canvas, picture, canvas.dataset.view, 2).then(() => outline(canvas, regions));
  }
}

function open(thumb) {
  list = [...thumb.closest('.thumbs').querySelectorAll('.thumb')];
  place = list.indexOf(thumb);
  show();
  viewer.showModal();
}

thumbs.forEach((thumb) => thumb.addEventListener('click', () => open(thumb)));
document.getElementById('close').addEventListener('click', () => viewer.close());
document.getElementById('previous').addEventListener('click', () => show(-1));
document.getElementById('next').addEventListener('click', () => show(1));
viewer.addEventListener('keydown', (event) => {
  if (event.key === 'ArrowLeft') show(-1);
  if (event.key === 'ArrowRight') show(1);
});
viewer.addEventListener('click', (event) => { if (event.target === viewer) viewer.close(); });
viewer.addEventListener('close', () => list[place].focus());

// Tables: a click on a heading sorts, the field above filters.
function sort(heading) {
  const table = heading.closest('table');
  const column = [...heading.parentNode.children].indexOf(heading);
  const isNumber = heading.dataset.kind === 'number';
  const now = heading.getAttribute('aria-sort');
  const down = now ? now === 'ascending' : isNumber;
  const value = (row) => row.cells[column].dataset.sort;
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((one, two) => {
    const [a, b] = [value(one), value(two)];
    if (a === '' || b === '') return (a === '') - (b === '');
    const order = isNumber ? a - b : a.localeCompare(b);
    return down ? -order : order;
  });
  body.append(...rows);
  for (const other of heading.parentNode.children) other.removeAttribute('aria-sort');
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
}

function filter(field) {
  const table = document.getElementById(field.dataset.table);
  const wanted = field.value.trim().toLowerCase().split(/\s+/);
  let count = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every((word) => text.includes(word));
    count += !row.hidden;
  }
  document.getElementById(table.id.replace('table-', 'count-')).textContent = `${count} row${count === 1 ? '' : 's'}`;
}

document.querySelectorAll('th').forEach((heading) => heading.firstChild.addEventListener('click', () => sort(heading)));
document.querySelectorAll('input[data-table]').forEach((field) => field.addEventListener('input', () => filter(field)));

// Plots: Vega draws them as SVG.
for (const place of document.querySelectorAll('.vega')) {
  window.vegaEmbed(place, data.plots[place.dataset.plot].spec, { mode: 'vega-lite', actions: false, renderer: 'svg' });
}
