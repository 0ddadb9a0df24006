// Many images, one after the other: masks and a table in a zip that is made here. Knows nothing of the page.

const encoder = new TextEncoder();
const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n;
});

function crc(bytes) {
  let value = 0xffffffff;
  for (const byte of bytes) value = CRC[(value ^ byte) & 255] ^ (value >>> 8);
  return (value ^ 0xffffffff) >>> 0;
}

/** A zip of [name, Uint8Array] without compression: masks are compressed already. */
export function zip(files) {
  const parts = [], directory = [];
  let offset = 0;
  for (const [name, bytes] of files) {
    const called = encoder.encode(name), head = new DataView(new ArrayBuffer(30)), entry = new DataView(new ArrayBuffer(46));
    // Version 2.0, names in UTF-8, stored, 1 January 1980.
    const common = [[2, 20], [2, 0x0800], [2, 0], [2, 0], [2, 33], [4, crc(bytes)], [4, bytes.length], [4, bytes.length], [2, called.length]];
    fill(head, [[4, 0x04034b50], ...common]);
    fill(entry, [[4, 0x02014b50], [2, 20], ...common]);
    entry.setUint32(42, offset, true);
    parts.push(head, called, bytes);
    directory.push(entry, called);
    offset += 30 + called.length + bytes.length;
  }
  const length = directory.reduce((sum, part) => sum + part.byteLength, 0), end = new DataView(new ArrayBuffer(22));
  fill(end, [[4, 0x06054b50], [2, 0], [2, 0], [2, files.length], [2, files.length], [4, length], [4, offset]]);
  return new Blob([...parts, ...directory, end], { type: "application/zip" });
}

function fill(view, fields) {
  let at = 0;
  for (const [size, value] of fields) {
    if (size === 4) view.setUint32(at, value, true);
    else view.setUint16(at, value, true);
    at += size;
  }
}

/** A row of a CSV file; what a spreadsheet would take for a formula becomes text. */
export function row(cells) {
  return cells.map((cell) => {
    let text = String(cell);
    if (typeof cell !== "number" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }).join(",");
}

/** Names of masks in the zip: below their folder, each once, leading nowhere else. */
export function stems(files) {
  const taken = new Set();
  return files.map((file) => {
    const parts = (file.webkitRelativePath || file.name).split(/[/\\]/).filter((part) => part && part !== "." && part !== "..");
    const stem = parts.join("/").replace(/\.[^./]*$/, "") || "image";
    let name = stem;
    for (let n = 2; taken.has(name); n++) name = `${stem}-${n}`;
    taken.add(name);
    return name;
  });
}

/** The bytes behind a data URI in base64. */
export function bytes(uri) {
  return Uint8Array.from(atob(uri.slice(uri.indexOf(",") + 1)), (letter) => letter.charCodeAt(0));
}
