// Masks and canvases: from a mask's ids to colours over a photo. Knows nothing of the page.

/** Decode a mask of ids (a grey PNG) to class positions, one byte per pixel. */
export async function decode(answer, positions) {
  const image = new Image();
  image.src = answer.mask;
  await image.decode();
  const { width, height } = answer;
  const context = surface(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  const classes = new Uint8Array(width * height);
  const counts = {};
  for (let i = 0; i < classes.length; i++) {
    const id = data[4 * i];
    classes[i] = positions[id];
    counts[id] = (counts[id] || 0) + 1;
  }
  const ids = Object.keys(answer.pixels);
  if (ids.some((id) => counts[id] !== answer.pixels[id])) {
    throw new Error("This browser changes what pages read from a canvas (a protection against fingerprinting): allow it for this page.");
  }
  const pixels = {}, shares = {};
  for (const id of ids) pixels[positions[id]] = answer.pixels[id];
  for (const [id, text] of Object.entries(answer.shares)) shares[positions[id]] = text;
  return { width, height, classes, pixels, shares, seconds: answer.seconds, mask: answer.mask };
}

/** A layer with the colour of every visible class, transparent elsewhere. */
export function layer(result, classes, visible) {
  return fill(result, (pixel) => {
    const position = result.classes[pixel];
    return visible[position] ? classes[position].colour : null;
  });
}

/** Where two results differ: a layer with each one's colours there, and the pairs of classes with their pixels. */
export function difference(a, b, classes, visible) {
  const pixels = new Map();
  const side = (own) => fill(own, (pixel) => {
    const one = a.classes[pixel], other = b.classes[pixel];
    return one !== other && (visible[one] || visible[other]) ? classes[own.classes[pixel]].colour : null;
  });
  for (let pixel = 0; pixel < a.classes.length; pixel++) {
    const one = a.classes[pixel], other = b.classes[pixel];
    if (one !== other) pixels.set(256 * one + other, (pixels.get(256 * one + other) || 0) + 1);
  }
  const pairs = [...pixels].map(([key, number]) => ({ one: Math.floor(key / 256), other: key % 256, number }));
  pairs.sort((left, right) => right.number - left.number);
  return { layers: [side(a), side(b)], pairs, differing: pairs.reduce((sum, pair) => sum + pair.number, 0) };
}

/** The photo with a layer over it; in grey where the layer alone should speak. */
export function paint(canvas, photo, over, opacity, grey) {
  const { width, height } = over;
  if (canvas.width !== width || canvas.height !== height) {
    canvas.width = width;
    canvas.height = height;
  }
  const context = canvas.getContext("2d");
  context.globalAlpha = 1;
  context.filter = grey ? "grayscale(1)" : "none";
  context.drawImage(photo, 0, 0, width, height);
  context.filter = "none";
  context.globalAlpha = opacity;
  context.drawImage(over, 0, 0);
}

/** A cross at the place that the arrow keys have reached. */
export function cross(canvas, x, y) {
  const context = canvas.getContext("2d");
  const reach = Math.max(6, Math.max(canvas.width, canvas.height) / 40), unit = reach / 6;
  for (const [colour, wide] of [["#000", 3 * unit], ["#fff", unit]]) {
    context.strokeStyle = colour;
    context.lineWidth = wide;
    context.globalAlpha = 1;
    context.beginPath();
    context.moveTo(x - reach, y + 0.5);
    context.lineTo(x + reach, y + 0.5);
    context.moveTo(x + 0.5, y - reach);
    context.lineTo(x + 0.5, y + reach);
    context.stroke();
  }
}

function surface(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function fill({ width, height }, colourOf) {
  const canvas = surface(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let pixel = 0, at = 0; pixel < width * height; pixel++, at += 4) {
    const colour = colourOf(pixel);
    if (!colour) continue;
    image.data[at] = colour[0];
    image.data[at + 1] = colour[1];
    image.data[at + 2] = colour[2];
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas;
}
