/** A sheet as one PNG. */

import { h } from "./dom.js";

const GAP = 8;
const LETTERS = 20; // pixels, of labels
const FONT = `${LETTERS}px system-ui, sans-serif`;
const LEAST = 96; // pixels, of a label's column

/**
 * Saves a sheet as a PNG.
 * @param {{axes: import("./sweep.js").Axis[], images: (HTMLImageElement|undefined)[]}} sheet
 */
export function download(sheet) {
  const link = h("a", { download: "sheet.png", href: drawn(sheet).toDataURL("image/png") });
  link.click();
}

function drawn({ axes: [x, y, z], images }) {
  const done = images.filter((image) => image?.complete && image.naturalWidth);
  const width = Math.max(LEAST, ...done.map((image) => image.naturalWidth));
  const height = Math.max(LEAST, ...done.map((image) => image.naturalHeight));
  const [rows, tables] = [y?.values ?? [""], z?.values ?? [""]];
  const context = h("canvas").getContext("2d");
  context.font = FONT;
  const left = y ? Math.max(...rows.map((value) => context.measureText(value).width)) + 2 * GAP : GAP;
  const line = LETTERS + 2 * GAP;
  const tableHeight = (z ? line : 0) + line + rows.length * (height + GAP);
  begin(context, left + x.values.length * (width + GAP), tables.length * tableHeight + GAP);
  tables.forEach((title, t) => {
    const top = t * tableHeight + (z ? line : 0);
    if (z) write(context, `${z.label}: ${title}`, GAP, top - GAP);
    x.values.forEach((value, i) => write(context, value, left + i * (width + GAP), top + line - GAP, width));
    rows.forEach((value, row) => {
      const at = top + line + row * (height + GAP);
      write(context, value, GAP, at + height / 2);
      x.values.forEach((_, i) => {
        const image = images[(t * rows.length + row) * x.values.length + i];
        if (done.includes(image)) context.drawImage(image, left + i * (width + GAP), at);
      });
    });
  });
  return context.canvas;
}

function begin(context, width, height) {
  Object.assign(context.canvas, { width, height });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#1d1c1a";
  context.font = FONT;
}

function write(context, text, x, y, width) {
  context.fillText(text, x, y, width);
}
