// The page: takes an image, asks for masks, and keeps legend and canvases in step.
import { bytes, row as csv, stems, zip } from "/batch.js";
import { cross, decode, difference, layer, paint } from "/draw.js";

const at = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};

const SILENT = "The program does not answer: is everseg serve still running?";

/** What the server says to a question without an upload; its own words where it refuses. */
async function told(path, kind = "json") {
  let response, answer;
  try {
    response = await fetch(path);
    answer = await response[response.ok ? kind : "json"]();
  } catch {
    throw new Error(SILENT);
  }
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

const info = await told("/info").catch((error) => { report(error.message); throw error; });
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
const PAIRS = 8;  // rows of the table of differences
const state = { view: "a", photo: null, file: null, results: [], layers: [], times: info.bundles.map(() => []), turn: 0, at: null };
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
  about();
  for (const i of info.bundles.keys()) at("columns").append(make("th", { scope: "col" }, two ? letters[i] : "area"));
  info.classes.forEach((row, position) => {
    const box = make("input", { type: "checkbox", checked: visible[position] });
    box.addEventListener("change", () => { visible[position] = box.checked; layers(); });
    const swatch = make("i");
    swatch.style.background = `rgb(${row.colour.join(" ")})`;
    const cells = info.bundles.map(() => make("td", {}, info.undefined));
    const line = make("tr", {}, make("th", { scope: "row" }, make("label", {}, box, swatch, row.name)), ...cells);
    line.dataset.position = position;
    at("legend").append(line);
  });
}

/** What the bundles are, and how long they took so far. */
function about() {
  at("about").replaceChildren(...info.bundles.flatMap((bundle, i) => {
    const rows = [...bundle.about];
    const times = [...state.times[i]].sort((a, b) => a - b);
    if (times.length) rows.push(["Time", `${times[times.length >> 1].toFixed(2)} s for an image on this machine` + (times.length > 1 ? ` (median of ${times.length})` : "")]);
    const list = make("dl", {}, ...rows.flatMap(([what, text]) => [make("dt", {}, what), make("dd", {}, text)]));
    return [make("div", {}, make("h2", {}, titles[i]), list)];
  }));
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
      const result = await decode(await ask(i, state.file, () => turn === state.turn), positions[i]);
      if (turn !== state.turn) return;
      state.results[i] = result;
      state.times[i].push(result.seconds);
      about();
    }
    at("status").textContent = state.results.flatMap((found, i) => info.bundles[i].branches.length && at(`branch${i}`).value === "auto" ? [`Domain, ${titles[i]}: ${found.domain}`] : []).join("; ");
    layers();
  } catch (error) {
    if (turn !== state.turn) return;
    at("status").textContent = "";
    for (const id of ["pictures", "downloads", "changes"]) at(id).hidden = true;
    report(error.message);
  }
}

/** Ask for the mask of an image until it is here, or nobody waits for it. */
async function ask(i, file, wanted) {
  const query = new URLSearchParams({ bundle: i });
  if (info.bundles[i].branches.length) query.set("domain", at(`branch${i}`).value);
  let response;
  try {
    response = await fetch(`/predict?${query}`, { method: "POST", body: file, headers: { "Content-Type": file.type } });
  } catch {
    throw new Error(SILENT);
  }
  if (response.status === 503 && wanted()) {  // busy with images dropped before
    await new Promise((done) => setTimeout(done, 1000));
    return ask(i, file, wanted);
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** Why a file is not sent; "" if it is. */
function unfit(file) {
  if (!info.types.includes(file.type)) return `${file.name}: use ${info.types.map((type) => type.slice(6).toUpperCase()).join(", ")}.`;
  return file.size > info.limits.bytes ? `${file.name} is larger than ${info.limits.bytes / 1e6} MB.` : "";
}

/** Predict many images with every bundle, one after the other, and offer masks and a table as a zip. */
async function batch(files) {
  const turn = ++state.turn, wanted = () => turn === state.turn;
  const names = stems(files), parts = [], problems = [], differing = [];
  const table = [csv(["image", "bundle", "class id", "class", "pixels", "share"])];
  report("");
  at("status").textContent = "";
  for (const id of ["zip", "problems", "differing"]) at(id).hidden = true;
  at("batch").hidden = at("stop").hidden = false;
  at("bar").max = files.length;
  let done = 0;
  for (const [place, file] of files.entries()) {
    at("bar").value = place;
    at("doing").textContent = `${place + 1} of ${files.length}: ${names[place]}`;
    const problem = unfit(file);
    if (problem) { problems.push(problem); continue; }
    try {
      const results = [];
      for (const i of info.bundles.keys()) {
        const answer = await ask(i, file, wanted);
        if (!wanted()) return;
        results.push(await decode(answer, positions[i]));
        const folder = two ? `masks-${letters[i].toLowerCase()}` : "masks";
        parts.push([`${folder}/${names[place]}.png`, bytes(answer.mask)]);
        for (const [id, pixels] of Object.entries(answer.pixels)) {
          const called = info.classes[positions[i][id]].name;
          table.push(csv([names[place], info.bundles[i].name, Number(id), called, pixels, answer.shares[id]]));
        }
      }
      if (two) {
        const [a, b] = results, part = a.classes.reduce((sum, one, pixel) => sum + (one !== b.classes[pixel]), 0);
        differing.push({ name: names[place], part, whole: a.classes.length });
      }
      done += 1;
    } catch (error) {
      if (!wanted()) return;
      problems.push(`${names[place]}: ${error.message}`);
      if (error.message === SILENT) break;
    }
  }
  at("bar").value = files.length;
  await offer(turn, { parts, table, problems, differing, done, whole: files.length });
}

async function offer(turn, { parts, table, problems, differing, done, whole }) {
  const most = differing.sort((one, other) => other.part / other.whole - one.part / one.whole);
  let texts = [];
  try {
    texts = await Promise.all(most.map((one) => shareText(one.part, one.whole)));
  } catch (error) {
    problems.push(error.message);
  }
  if (turn !== state.turn) return;
  const files = [...parts, ["shares.csv", text([...table])]];
  if (two) files.push(["differences.csv", text([csv(["image", "pixels that differ", "pixels", "share"]), ...most.map((one, place) => csv([one.name, one.part, one.whole, texts[place]]))])]);
  if (problems.length) files.push(["problems.txt", text(problems)]);
  URL.revokeObjectURL(at("zip").href);
  Object.assign(at("zip"), { href: URL.createObjectURL(zip(files)), download: "everseg-results.zip", hidden: !done });
  at("stop").hidden = true;
  const apart = most.filter((one) => one.part).length; // the first of `most`
  const same = most.length && !apart ? "; A and B agree everywhere" : "";
  at("doing").textContent = `${done} of ${whole} images are done${same}`;
  at("problems").replaceChildren(...problems.map((one) => make("li", {}, one)));
  at("problems").hidden = !problems.length;
  at("images").replaceChildren(...most.slice(0, Math.min(PAIRS, apart)).map((one, place) => make("tr", {}, make("td", {}, one.name), make("td", {}, texts[place]))));
  at("differing").hidden = !apart;
}

const text = (lines) => new TextEncoder().encode(`${lines.join("\n")}\n`);

/** One image is shown, several become a zip. */
function given(files) {
  const every = [...files];
  if (every.length === 1) { at("batch").hidden = true; take(every[0]); }
  if (every.length > 1) batch(every);
}

async function take(file) {
  const turn = ++state.turn;
  Object.assign(state, { photo: null, file, results: [], layers: [], at: null });
  for (const id of ["pictures", "downloads", "changes"]) at(id).hidden = true;
  at("pointed").textContent = at("status").textContent = "";
  legend();
  const problem = unfit(file);
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
  return (await told(`/share?${new URLSearchParams({ part, whole })}`)).text;
}

/** New layers after a new result, view or choice of classes. */
function layers() {
  const results = shown().map((i) => state.results[i]);
  if (!state.photo || results.some((result) => !result)) return;
  const captions = shown().map((i) => `${titles[i]}, ${state.results[i].seconds.toFixed(2)} s`);
  at("changes").hidden = true;
  if (state.view === "difference") {
    const found = difference(results[0], results[1], info.classes, visible);
    state.layers = found.layers;
    captions.splice(0, 2, "", titles[1]);
    caption(found, results[1].classes.length);
  } else {
    state.layers = results.map((result) => layer(result, info.classes, visible));
  }
  captions.forEach((text, place) => { at(`caption${place}`).textContent = text; });
  at("canvas1").parentElement.hidden = state.layers.length < 2;
  at("pictures").hidden = false;
  downloads();
  legend();
  draw();
}

/** A link to the mask of every result that is here. */
function downloads() {
  const stem = state.file.name.replace(/\.[^.]*$/, "");
  const links = state.results.map((result, i) => result && make("a", {
    href: result.mask, download: `${stem}-mask${two ? `-${letters[i].toLowerCase()}` : ""}.png`,
  }, two ? `Download the mask of ${letters[i]}` : "Download the mask"));
  at("downloads").replaceChildren(...links.filter(Boolean), "(PNG; the grey value of a pixel is the id of its class, as in the masks of everseg predict)");
  at("downloads").hidden = false;
}

/** Say under the pictures how many pixels differ and which classes they are, unless something else is shown by then. */
async function caption({ differing, pairs }, whole) {
  const { turn } = state;
  let text = "", rows = [];
  try {
    text = await shareText(differing, whole);
    rows = await Promise.all(pairs.slice(0, PAIRS).map(async (pair) => [pair, await shareText(pair.number, whole)]));
  } catch (error) {
    if (turn === state.turn) report(error.message);
    return;
  }
  if (turn !== state.turn || state.view !== "difference") return;
  at("caption0").textContent = `${titles[0]}: ${text} of the pixels differ`;
  const named = (position) => {
    const swatch = make("i");
    swatch.style.background = `rgb(${info.classes[position].colour.join(" ")})`;
    return make("td", {}, swatch, info.classes[position].name);
  };
  at("pairs").replaceChildren(...rows.map(([pair, area]) => make("tr", {}, named(pair.one), named(pair.other), make("td", {}, area))));
  at("changes").hidden = !rows.length;
  draw();
}

function draw() {
  const opacity = at("opacity").value / 100;
  at("percent").textContent = `${at("opacity").value} %`;
  state.layers.forEach((over, place) => {
    paint(at(`canvas${place}`), state.photo, over, opacity, state.view === "difference");
    if (state.at) cross(at(`canvas${place}`), ...state.at);
    at(`canvas${place}`).setAttribute("aria-label", `The image with its classes in colour. ${at(`caption${place}`).textContent}`);
  });
}

function legend() {
  const known = state.results.filter(Boolean);
  // Classes that are found stand first, the largest area on top. The order changes with the results only, so that a row
  // stays where it is while somebody ticks boxes.
  const area = (position) => Math.max(0, ...known.map((result) => result.pixels[position] || 0));
  const wanted = info.classes.map((_, position) => position).sort((a, b) => area(b) - area(a) || a - b);
  const rows = new Map([...at("legend").rows].map((row) => [Number(row.dataset.position), row]));
  const focused = document.activeElement;
  if ([...at("legend").rows].some((row, place) => Number(row.dataset.position) !== wanted[place])) {
    at("legend").append(...wanted.map((position) => rows.get(position)));
    if (at("legend").contains(focused)) focused.focus();
  }
  rows.forEach((row, position) => {
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
  tell(canvas, Math.floor((event.clientX - box.left) / scale), Math.floor((event.clientY - box.top) / scale));
}

/** Arrow keys move the place whose class is named, a fortieth of the picture at a time. */
function step(event, place) {
  const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!way) return;
  event.preventDefault();
  const canvas = at(`canvas${place}`);
  const by = Math.max(1, Math.round(Math.max(canvas.width, canvas.height) / 40));
  const [x, y] = state.at || [canvas.width >> 1, canvas.height >> 1];
  const kept = (value, most) => Math.min(most - 1, Math.max(0, value));
  state.at = [kept(x + by * way[0], canvas.width), kept(y + by * way[1], canvas.height)];
  draw();
  tell(canvas, ...state.at);
}

function tell(canvas, x, y) {
  const inside = x >= 0 && y >= 0 && x < canvas.width && y < canvas.height;
  const named = (two && VIEWS.both.every((i) => state.results[i]) ? VIEWS.both : shown()).map((i) => {
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

/** Fetch the example picture and take it as if somebody had chosen it. */
async function example() {
  try {
    take(new File([await told("/example.png", "blob")], "example.png", { type: "image/png" }));
  } catch (error) {
    report(error.message);
  }
}

function listen() {
  at("example").addEventListener("click", example);
  for (const id of ["file", "folder"]) {
    // A copy, because the list is emptied with the field.
    at(id).addEventListener("change", () => { given([...at(id).files]); at(id).value = ""; });
  }
  at("pick").addEventListener("click", () => at("folder").click());
  at("stop").addEventListener("click", () => { state.turn++; at("batch").hidden = true; });
  at("opacity").addEventListener("input", draw);
  at("all").addEventListener("click", () => choose(true));
  at("none").addEventListener("click", () => choose(false));
  for (const place of [0, 1]) {
    at(`canvas${place}`).addEventListener("pointermove", (event) => point(event, place));
    at(`canvas${place}`).addEventListener("pointerleave", () => { at("pointed").textContent = ""; });
    at(`canvas${place}`).addEventListener("keydown", (event) => step(event, place));
    at(`canvas${place}`).addEventListener("blur", () => { state.at = null; at("pointed").textContent = ""; draw(); });
  }
  document.addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
  document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    at("drop").classList.remove("over");
    given(event.dataTransfer.files);
  });
}

build();
listen();
document.body.dataset.ready = "yes";
