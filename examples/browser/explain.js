// Runs a file that `model.export('model.onnx')` wrote: pixels in, prediction and map out. Needs onnxruntime-web (`ort`).
'use strict';

const element = id => document.getElementById(id);
const INFERNO = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85],
                 [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];

let network = null;  // { session, facts }
let photo = null;    // ImageBitmap
let found = null;    // { prediction, map }, of the photograph and the target class
let latest = 0;      // counts what was asked for, so that a late answer is not shown for a newer question

function say(text, isError = false) {
  element('status').textContent = text;
  element('status').className = isError ? 'error' : '';
}

// The metadata of an ONNX file, which onnxruntime-web does not hand on: field 14 of the protobuf message `ModelProto`,
// a list of messages with the fields 1 (key) and 2 (value).
function fields(bytes) {
  const list = [];
  let at = 0;
  const number = () => {
    let value = 0, scale = 1, byte;
    do { byte = bytes[at++]; value += (byte & 127) * scale; scale *= 128; } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tag = number(), kind = tag % 8;
    let value = null;
    if (kind === 0) number();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) { const length = number(); value = bytes.subarray(at, at + length); at += length; }
    else throw new Error('this is no ONNX file');
    list.push([Math.floor(tag / 8), value]);
  }
  return list;
}

function readFacts(bytes) {
  const text = new TextDecoder(), facts = {};
  for (const [field, value] of fields(bytes)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries(fields(value).map(([key, part]) => [key, text.decode(part)]));
    facts[entry[1]] = entry[2];
  }
  if (facts.format !== 'antehoc_nb') throw new Error("this file was not written by model.export('model.onnx')");
  delete facts.format;
  for (const name in facts) facts[name] = JSON.parse(facts[name]);
  if (facts.format_version !== 1) throw new Error(`this page reads format 1, the file is of ${facts.format_version}`);
  return facts;
}

async function useNetwork(buffer) {
  const facts = readFacts(new Uint8Array(buffer));
  const session = await ort.InferenceSession.create(buffer, { executionProviders: ['wasm'] });
  network = { session, facts };
  const target = element('target');
  target.length = 1;
  target.disabled = facts.classes === null;
  for (let i = 0; i < (facts.classes ?? 0); i++) target.add(new Option(facts.labels[i] ?? `class ${i}`, i));
  element('photo').disabled = false;
  say(`The network is ready. It takes images of ${facts.size[1]} x ${facts.size[0]} pixels.`);
  await explain();
}

// The part of the photograph that the network gets, [left, top, width, height]: all of it, unless the file says that
// its middle was taken in training
function seenPart() {
  const { size: [height, width], resize = 'squish', crop_pct: share = 1 } = network.facts;
  let sides = [photo.width, photo.height];
  if (resize === 'crop') {
    const scale = Math.min(photo.width / width, photo.height / height);
    sides = [Math.floor(scale * width), Math.floor(scale * height)];
  }
  sides = sides.map(side => Math.max(1, Math.round(side * share)));
  return [Math.floor((photo.width - sides[0]) / 2), Math.floor((photo.height - sides[1]) / 2), ...sides];
}

// That part at the network's size: channels first, uint8
function pixels() {
  const { size: [height, width], channels } = network.facts;
  const small = new OffscreenCanvas(width, height).getContext('2d', { willReadFrequently: true });
  small.fillStyle = 'white';
  small.fillRect(0, 0, width, height);
  small.imageSmoothingQuality = 'high';
  small.drawImage(photo, ...seenPart(), 0, 0, width, height);
  const rgba = small.getImageData(0, 0, width, height).data, n = width * height;
  const values = new Uint8Array(channels * n);
  for (let i = 0; i < n; i++) {
    const [red, green, blue] = rgba.subarray(4 * i, 4 * i + 3);
    if (channels === 1) values[i] = Math.round(.299 * red + .587 * green + .114 * blue);
    else { values[i] = red; values[n + i] = green; values[2 * n + i] = blue; }
  }
  return new ort.Tensor('uint8', values, [1, channels, height, width]);
}

async function explain() {
  if (!network || !photo) return;
  const mine = ++latest, { session, facts } = network;
  say('Computing ...');
  const inputs = { images: pixels() };
  if (facts.classes !== null) {
    inputs.target = new ort.Tensor('int64', BigInt64Array.of(BigInt(element('target').value)), [1]);
  }
  const start = performance.now();
  const results = await session.run(inputs);
  if (mine !== latest) return;
  found = { prediction: results.prediction?.data, map: results.map.data };
  describe(Math.round(performance.now() - start));
  draw();
}

function describe(milliseconds) {
  const { facts } = network, { prediction } = found;
  if (facts.activation !== 'softmax') { say(`Done in ${milliseconds} ms.`); return; }
  const best = prediction.indexOf(Math.max(...prediction));
  const name = facts.labels[best] ?? `class ${best}`;
  say(`${name}, ${(100 * prediction[best]).toFixed(1)} % (${milliseconds} ms)`);
}

function colour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (INFERNO.length - 1), i = Math.min(Math.floor(at), INFERNO.length - 2);
  return INFERNO[i].map((low, channel) => low + (INFERNO[i + 1][channel] - low) * (at - i));
}

function draw() {
  if (!found) return;
  const [height, width] = network.facts.size, coloured = new ImageData(width, height);
  found.map.forEach((value, i) => coloured.data.set([...colour(value), 255], 4 * i));
  const small = new OffscreenCanvas(width, height);
  small.getContext('2d').putImageData(coloured, 0, 0);
  const canvas = element('overlay'), context = canvas.getContext('2d');
  canvas.width = photo.width;
  canvas.height = photo.height;
  context.imageSmoothingQuality = 'high';
  context.drawImage(photo, 0, 0);
  context.globalAlpha = Number(element('alpha').value);
  context.drawImage(small, ...seenPart());
}

const complaining = action => async event => {
  try { await action(event); } catch (error) { say(`That did not work: ${error.message}`, true); }
};

element('photo').addEventListener('change', complaining(async event => {
  const [file] = event.target.files;
  if (!file) return;
  photo = await createImageBitmap(file, { imageOrientation: 'from-image' });
  await explain();
}));
element('model').addEventListener('change', complaining(async event => {
  const [file] = event.target.files;
  if (file) await useNetwork(await file.arrayBuffer());
}));
element('target').addEventListener('change', complaining(explain));
element('alpha').addEventListener('input', draw);

complaining(async () => {
  ort.env.wasm.numThreads = 1;  // several need headers that a simple web server does not send
  const answer = await fetch('model.onnx').catch(() => null);
  if (answer?.ok) await useNetwork(await answer.arrayBuffer());
  else say('There is no model.onnx beside this page; choose a file below.');
})();
