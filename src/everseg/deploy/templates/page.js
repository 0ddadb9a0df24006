// The page: takes an image, asks for masks, and keeps legend and canvases in step.
import { decode, difference, layer, paint } from "/draw.js";

const at = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const info = await (await fetch("/info")).json();
const letters = ["A", "B"];
const two = info.bundles.length > 1;
const titles = info.bundles.map((bundle, i) => (two ? `${letters[i]}: ${bundle.name}` : bundle.name));
const positions = info.bundles.map((_, i) => {
  const table = [];
  info.classes.forEach((row, position) => { if (row.ids[i] !== null) table[row.ids[i]] = position; });
  return table;
});
const visible = info.classes.map((row) => !row.background);
const VIEWS = { a: [0], b: [1], both: [0, 1], difference: [0, 1] };
const state = { view: "a", photo: null, file: null, results: [], layers: [], turn: 0 };
const shown = () => VIEWS[state.view];

function build() {
  at("bundles").textContent = titles.join("  ·  ");
  at("notes").append(...info.notes.map((text) => make("li", {}, text)));
  at("notes").hidden = !info.notes.length;
  document.title = `everseg: ${info.bundles.map((bundle) => bundle.name).join(", ")}`;
  at("file").accept = info.types.join(",");
  at("limits").textContent = `${info.types.map((type) => type.slice(6).toUpperCase()).join(", ")}; up to ${info.limits.bytes / 1e6} MB and ${Math.floor(info.limits.pixels / 1e5) / 10} megapixels`;
  at("views").hidden = !two;
  const names = { a: titles[0], b: titles[1], both: "Side by side", difference: "Difference" };
  for (const [value, name] of two ? Object.entries(names) : []) {
    const input = make("input", { type: "radio", name: "view", value, checked: value === "a" });
    input.addEventListener("change", () => { state.view = value; refresh(); });
    at("views").append(make("label", {}, input, name));
  }
  info.bundles.forEach((bundle, i) => {
    if (!bundle.branches.length) return;
    const select = make("select", { id: `branch${i}` }, ...bundle.branches.map((branch) => make("option", { value: branch }, branch)));
    select.addEventListener("change", () => { state.results[i] = undefined; refresh(); });
    at("branches").append(make("label", {}, `Domain of the image, ${titles[i]}`, select));
  });
  for (const i of info.bundles.keys()) at("columns").append(make("th", { scope: "col" }, two ? letters[i] : "area"));
  info.classes.forEach((row, position) => {
    const box = make("input", { type: "checkbox", checked: visible[position] });
    box.addEventListener("change", () => { visible[position] = box.checked; layers(); });
    const swatch = make("i");
    swatch.style.background = `rgb(${row.colour.join(" ")})`;
    const cells = info.bundles.map(() => make("td", {}, info.undefined));
    at("legend").append(make("tr", {}, make("th", { scope: "row" }, make("label", {}, box, swatch, row.name)), ...cells));
  });
}

/** Ask for the masks that the view needs and that are not here yet, one after the other. */
async function refresh() {
  if (!state.photo) return;
  const turn = ++state.turn;
  report("");
  try {
    for (const i of shown()) {
      if (state.results[i]) continue;
      at("status").textContent = `Predicting with ${titles[i]} …`;
      const result = await decode(await ask(i, turn), positions[i]);
      if (turn !== state.turn) return;
      state.results[i] = result;
    }
    at("status").textContent = "";
    layers();
  } catch (error) {
    if (turn !== state.turn) return;
    at("status").textContent = "";
    at("pictures").hidden = true;
    report(error.message);
  }
}

async function ask(i, turn) {
  const query = new URLSearchParams({ bundle: i });
  if (info.bundles[i].branches.length) query.set("domain", at(`branch${i}`).value);
  let response;
  try {
    response = await fetch(`/predict?${query}`, { method: "POST", body: state.file, headers: { "Content-Type": state.file.type } });
  } catch {
    throw new Error("The program does not answer: is everseg serve still running?");
  }
  if (response.status === 503 && turn === state.turn) {  // busy with images dropped before
    await new Promise((done) => setTimeout(done, 1000));
    return ask(i, turn);
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function take(file) {
  const turn = ++state.turn;
  Object.assign(state, { photo: null, file, results: [], layers: [] });
  at("pictures").hidden = true;
  at("pointed").textContent = at("status").textContent = "";
  legend();
  const problem = !info.types.includes(file.type) ? `${file.name}: use ${info.types.map((type) => type.slice(6).toUpperCase()).join(", ")}.`
    : file.size > info.limits.bytes ? `${file.name} is larger than ${info.limits.bytes / 1e6} MB.` : "";
  if (problem) return report(problem);
  let photo = null;
  try {
    photo = await createImageBitmap(file);
  } catch {
    if (turn === state.turn) report(`${file.name} is damaged, or no picture.`);
    return;
  }
  if (turn !== state.turn) return;
  state.photo = photo;
  at("drop").classList.add("done");
  refresh();
}

/** The server formats every number, so that the page and the command line show the same text. */
async function shareText(part, whole) {
  const answer = await (await fetch(`/share?${new URLSearchParams({ part, whole })}`)).json();
  return answer.text;
}

/** New layers after a new result, view or choice of classes. */
function layers() {
  const results = shown().map((i) => state.results[i]);
  if (!state.photo || results.some((result) => !result)) return;
  const captions = shown().map((i) => `${titles[i]}, ${state.results[i].seconds.toFixed(2)} s`);
  if (state.view === "difference") {
    const { canvas, differing } = difference(results[0], results[1], info.classes, visible);
    state.layers = [canvas];
    captions.splice(0, 2, "");
    caption(differing, results[1].classes.length);
  } else {
    state.layers = results.map((result) => layer(result, info.classes, visible));
  }
  captions.forEach((text, place) => { at(`caption${place}`).textContent = text; });
  at("canvas1").parentElement.hidden = state.layers.length < 2;
  at("pictures").hidden = false;
  legend();
  draw();
}

/** Say under the picture how many pixels differ, unless something else is shown by then. */
async function caption(differing, whole) {
  const { turn } = state;
  let text = "";
  try {
    text = await shareText(differing, whole);
  } catch {
    report("The program does not answer: is everseg serve still running?");
    return;
  }
  if (turn !== state.turn || state.view !== "difference") return;
  at("caption0").textContent = `${text} of the pixels differ; in the colours of ${titles[1]}`;
  draw();
}

function draw() {
  const opacity = at("opacity").value / 100;
  at("percent").textContent = `${at("opacity").value} %`;
  state.layers.forEach((over, place) => {
    paint(at(`canvas${place}`), state.photo, over, opacity, state.view === "difference");
    at(`canvas${place}`).setAttribute("aria-label", `The image with its classes in colour. ${at(`caption${place}`).textContent}`);
  });
}

function legend() {
  [...at("legend").rows].forEach((row, position) => {
    const known = state.results.filter(Boolean);
    row.classList.toggle("absent", known.length > 0 && known.every((result) => !result.pixels[position]));
    info.bundles.forEach((_, i) => {
      const result = state.results[i];
      const missing = info.classes[position].ids[i] === null;
      // A branch of the bundle may not know the class: then there is no share.
      row.cells[i + 1].textContent = (!missing && result?.shares[position]) || info.undefined;
    });
  });
}

function point(event, place) {
  const canvas = at(`canvas${place}`);
  const box = canvas.getBoundingClientRect();
  const scale = Math.min(box.width / canvas.width, box.height / canvas.height);  // object-fit: contain, left top
  const x = Math.floor((event.clientX - box.left) / scale), y = Math.floor((event.clientY - box.top) / scale);
  const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
  const named = shown().map((i) => {
    const name = inside && state.results[i] ? info.classes[state.results[i].classes[y * canvas.width + x]].name : "";
    return two ? `${letters[i]}: ${name}` : name;
  });
  at("pointed").textContent = inside ? named.join("  ·  ") : "";
}

function report(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function choose(every) {
  visible.fill(every);
  for (const box of at("legend").querySelectorAll("input")) box.checked = every;
  layers();
}

function listen() {
  at("file").addEventListener("change", () => { if (at("file").files.length) take(at("file").files[0]); at("file").value = ""; });
  at("opacity").addEventListener("input", draw);
  at("all").addEventListener("click", () => choose(true));
  at("none").addEventListener("click", () => choose(false));
  for (const place of [0, 1]) {
    at(`canvas${place}`).addEventListener("pointermove", (event) => point(event, place));
    at(`canvas${place}`).addEventListener("pointerleave", () => { at("pointed").textContent = ""; });
  }
  document.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
}

build();
listen();
document.body.dataset.ready = "yes";
