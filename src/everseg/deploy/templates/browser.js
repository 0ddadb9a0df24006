// A bundle's ONNX files in the browser, by onnxruntime-web. Nothing is fetched from elsewhere, and nothing is sent.
import * as ort from "./ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that plain web servers do not send
ort.env.wasm.wasmPaths = new URL("./", import.meta.url).href;

const $ = (id) => document.getElementById(id);
const read = async (name) => (await fetch(name)).json();
const [about, how, page] = await Promise.all([read("classes.json"), read("preprocessing.json"), read("page.json")]);
const colours = Object.fromEntries(about.classes.map((one) => [one.id, one.colour]));
const sessions = new Map();
const ONE = 2 ** 22;
let shown = null; // { photo, mask, width, height }

async function session(branch) {
  if (!sessions.has(branch)) sessions.set(branch, await ort.InferenceSession.create(page.files[branch]));
  return sessions.get(branch);
}

/** The pixels of a picture, upright as its EXIF data say unless the model learnt otherwise: RGB, one byte each. */
export async function pixels(blob) {
  const turn = how.form && how.form.exif === "ignore" ? "none" : "from-image";
  const photo = await createImageBitmap(blob, { imageOrientation: turn, colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const { width, height } = photo;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(photo, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const rgb = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    rgb[to++] = data[from];
    rgb[to++] = data[from + 1];
    rgb[to++] = data[from + 2];
  }
  return { photo, width, height, rgb };
}

/** Resize along one axis as Pillow does (bilinear, antialiased), to the bit: each pixel a weighted mean of what it covers. */
function along(source, count, length, size, step, stride) {
  const target = new Uint8Array((source.length / length) * size);
  const scale = length / size, support = Math.max(scale, 1);
  for (let place = 0; place < size; place++) {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.floor(centre - support + 0.5)), last = Math.min(length, Math.floor(centre + support + 0.5));
    const weights = [];
    for (let i = first; i < last; i++) weights.push(Math.max(0, 1 - Math.abs((i + 0.5 - centre) / support)));
    const total = weights.reduce((a, b) => a + b, 0);
    const whole = weights.map((weight) => Math.floor((weight / total) * ONE + 0.5)); // as whole numbers, as there
    for (let line = 0; line < count; line++) {
      for (let channel = 0; channel < 3; channel++) {
        const base = step(line) + channel;
        let sum = ONE / 2;
        whole.forEach((weight, i) => { sum += weight * source[base + stride.from * (first + i)]; });
        target[stride.base(line) + channel + stride.to * place] = Math.min(255, Math.floor(sum / ONE));
      }
    }
  }
  return target;
}

function resized(rgb, width, height, [high, wide]) {
  if (width !== wide) {
    rgb = along(rgb, height, width, wide, (line) => 3 * width * line, { from: 3, to: 3, base: (line) => 3 * wide * line });
  }
  if (height !== high) {
    rgb = along(rgb, wide, height, high, (line) => 3 * line, { from: 3 * wide, to: 3 * wide, base: (line) => 3 * line });
  }
  return rgb;
}

/** Predict a picture: the class id of every pixel, row by row. */
export async function predict(blob, branch = page.branches[0]) {
  const { photo, width, height, rgb } = await pixels(blob);
  const [high, wide] = how.size || [height, width];
  const input = new ort.Tensor("uint8", how.size ? resized(rgb, width, height, how.size) : rgb, [1, high, wide, 3]);
  const { mask: { data } } = await (await session(branch)).run({ image: input }, ["mask"]);
  const mask = new Uint16Array(width * height);
  for (let y = 0, at = 0; y < height; y++) {
    const row = Math.floor((y + 0.5) * high / height) * wide; // the nearest
    for (let x = 0; x < width; x++) mask[at++] = data[row + Math.floor((x + 0.5) * wide / width)];
  }
  return { photo, mask, width, height };
}

function paint() {
  const { photo, mask, width, height } = shown;
  const layer = new ImageData(width, height), counts = {};
  mask.forEach((id, at) => {
    counts[id] = (counts[id] || 0) + 1;
    layer.data.set([...colours[id], 255], 4 * at);
  });
  const over = new OffscreenCanvas(width, height);
  over.getContext("2d").putImageData(layer, 0, 0);
  const canvas = $("canvas");
  Object.assign(canvas, { width, height, hidden: false });
  const context = canvas.getContext("2d");
  context.drawImage(photo, 0, 0);
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage(over, 0, 0);
  const found = about.classes.filter((one) => counts[one.id]).sort((a, b) => counts[b.id] - counts[a.id]);
  $("legend").replaceChildren(...found.map((one) => {
    const row = document.createElement("tr"), colour = document.createElement("i");
    colour.style.background = `rgb(${one.colour})`;
    const share = `${(100 * counts[one.id] / mask.length).toFixed(1)} %`;
    const name = document.createElement("th"), cell = document.createElement("td");
    name.scope = "row";
    name.append(colour, one.name);
    cell.append(share);
    row.append(name, cell);
    return row;
  }));
}

async function take(blob) {
  $("error").hidden = true;
  $("status").textContent = "Predicting";
  const begun = performance.now();
  try {
    shown = await predict(blob, $("branch")?.value);
    $("status").textContent = `${shown.width} x ${shown.height} pixels in ${((performance.now() - begun) / 1000).toFixed(2)} s`;
    const wide = shown.mask.some((id) => id > 255); // more than a grey picture of a canvas holds
    $("save").disabled = wide;
    if (wide) $("status").textContent += "; ids above 255 cannot be saved here: everseg predict writes them";
    paint();
  } catch (error) {
    $("status").textContent = "";
    $("error").textContent = `This picture cannot be predicted: ${error.message}`;
    $("error").hidden = false;
  }
}

/** A grey picture of the ids, up to 255. */
async function save() {
  const { mask, width, height } = shown;
  const grey = new ImageData(width, height);
  mask.forEach((id, at) => grey.data.set([id, id, id, 255], 4 * at));
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(grey, 0, 0);
  const link = Object.assign(document.createElement("a"), { download: "mask.png" });
  link.href = URL.createObjectURL(await canvas.convertToBlob());
  link.click();
  URL.revokeObjectURL(link.href);
}

$("name").textContent = page.name;
if (page.branches.length > 1) {
  const select = Object.assign(document.createElement("select"), { id: "branch" });
  select.append(...page.branches.map((name) => new Option(name)));
  $("branches").append(select);
}
$("file").addEventListener("change", () => $("file").files[0] && take($("file").files[0]));
$("opacity").addEventListener("input", () => shown && paint());
$("save").addEventListener("click", save);
for (const kind of ["dragover", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    if (kind === "drop" && event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
  });
}
try {
  await session(page.branches[0]);
  $("status").textContent = "";
  document.body.dataset.ready = "yes";
} catch (error) {
  $("status").textContent = "";
  $("error").textContent = `The model cannot be loaded: ${error.message}`;
  $("error").hidden = false;
}
