/** Painting a mask over a picture: what is painted is made anew. */

import { byId, h } from "./dom.js";
import { decoded } from "./picture.js";

const STRIPES = ["#ff2d78", "#ffffff"];
const SNAPSHOT_PIXELS = 2 ** 24; // of all that can be undone
const SNAPSHOTS = 12;
const LABEL =
  "Mask. Arrows move the brush, with Shift they paint, Space paints a dot, E erases, brackets change the size.";
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Opens the painter.
 * @param {string} picture its data URL
 * @param {string|null} mask to go on with: white on black
 * @returns {Promise<string|null|undefined>} the data URL of the mask; null for an empty one, undefined where the
 *     painter was left without an answer
 */
export async function paintMask(picture, mask) {
  const image = await decoded(picture);
  const painter = new Painter(image);
  if (mask) painter.load(await decoded(mask));
  return painter.open();
}

class Painter {
  constructor(image) {
    this.canvas = h("canvas", {
      width: image.naturalWidth,
      height: image.naturalHeight,
      tabindex: 0,
      role: "application",
      "aria-label": LABEL,
    });
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.paint = striped(this.context, Math.max(2, Math.min(image.naturalWidth, image.naturalHeight) / 64));
    this.snapshots = [];
    this.at = [image.naturalWidth / 2, image.naturalHeight / 2];
    this.ring = h("div", { class: "ring", "aria-hidden": "true" });
    this.dialog = byId("painter");
    const layers = h("div", { class: "layers" }, image, this.canvas, this.ring);
    this.dialog.replaceChildren(this.toolbar(), h("div", { class: "stage" }, layers), this.footer());
    this.listen();
  }

  /** The tools, which the fields of this painter are. */
  toolbar() {
    this.brush = h("input", { type: "radio", name: "tool", checked: true });
    this.eraser = h("input", { type: "radio", name: "tool" });
    this.size = h("input", { type: "range", min: 1, max: 60, value: 14, oninput: () => this.placeRing() });
    return h(
      "div",
      { class: "tools", role: "toolbar", "aria-label": "Tools" },
      h("div", { class: "segments" }, tool(this.brush, "Brush"), tool(this.eraser, "Erase")),
      h("label", { class: "brush-size" }, "Brush size", this.size),
      quietButton("Undo", () => this.undo()),
      quietButton("Invert", () => this.invert()),
      quietButton("Clear", () => this.clear()),
    );
  }

  footer() {
    return h(
      "div",
      { class: "footer" },
      h("p", { class: "help" }, "What you paint is made anew; the rest stays."),
      quietButton("Cancel", () => this.dialog.close("")),
      h("button", { type: "button", class: "primary", onclick: () => this.dialog.close("done") }, "Use this mask"),
    );
  }

  open() {
    this.dialog.returnValue = "";
    this.dialog.showModal();
    this.canvas.focus();
    this.placeRing();
    return new Promise((resolve) => {
      this.dialog.onclose = () => resolve(this.dialog.returnValue === "done" ? this.exported() : undefined);
    });
  }

  listen() {
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.snapshot();
      this.at = this.point(event);
      this.lineTo(this.at);
    });
    this.canvas.addEventListener("pointermove", (event) => {
      const moves = event.getCoalescedEvents?.() ?? [];
      for (const move of moves.length ? moves : [event]) {
        const point = this.point(move);
        if (event.buttons) this.lineTo(point);
        this.at = point;
      }
      this.placeRing();
    });
    this.canvas.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const step = this.radius;
    const actions = {
      " ": () => this.dab(),
      e: () => (this.eraser.checked = !this.eraser.checked) || (this.brush.checked = true),
      "[": () => this.size.stepDown(2),
      "]": () => this.size.stepUp(2),
      z: () => (event.ctrlKey || event.metaKey) && this.undo(),
    };
    if (ARROWS[event.key]) this.move(ARROWS[event.key].map((by) => by * step), event.shiftKey);
    else if (actions[event.key]) actions[event.key]();
    else return;
    event.preventDefault();
    this.placeRing();
  }

  move([x, y], paints) {
    const limit = (value, most) => Math.min(Math.max(value, 0), most);
    const to = [limit(this.at[0] + x, this.canvas.width), limit(this.at[1] + y, this.canvas.height)];
    if (paints) {
      this.snapshot();
      this.lineTo(to);
    }
    this.at = to;
  }

  dab() {
    this.snapshot();
    this.lineTo(this.at);
  }

  /** In pixels of the picture. */
  get radius() {
    return Math.max((Number(this.size.value) / 200) * Math.min(this.canvas.width, this.canvas.height), 0.5);
  }

  point({ clientX, clientY }) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.canvas.width / box.width;
    return [(clientX - box.left) * scale, (clientY - box.top) * scale];
  }

  lineTo(point) {
    const { context } = this;
    context.globalCompositeOperation = this.eraser.checked ? "destination-out" : "source-over";
    context.strokeStyle = this.paint;
    context.lineCap = context.lineJoin = "round";
    context.lineWidth = 2 * this.radius;
    context.beginPath();
    context.moveTo(...this.at);
    context.lineTo(point[0] + 0.01, point[1]);
    context.stroke();
  }

  placeRing() {
    const scale = this.canvas.clientWidth / this.canvas.width;
    const size = 2 * this.radius * scale;
    Object.assign(this.ring.style, {
      width: `${size}px`,
      height: `${size}px`,
      left: `${this.at[0] * scale - size / 2}px`,
      top: `${this.at[1] * scale - size / 2}px`,
    });
  }

  get pixels() {
    return this.context.getImageData(0, 0, this.canvas.width, this.canvas.height);
  }

  snapshot() {
    this.snapshots.push(this.pixels);
    const most = Math.min(SNAPSHOTS, Math.ceil(SNAPSHOT_PIXELS / (this.canvas.width * this.canvas.height)));
    if (this.snapshots.length > most) this.snapshots.shift();
  }

  undo() {
    const last = this.snapshots.pop();
    if (last) this.context.putImageData(last, 0, 0);
  }

  clear() {
    this.snapshot();
    this.context.clearRect(0, 0, this.canvas.width, this.canvas.height);
  }

  /** Goes on with a mask: what is white is painted. */
  load(mask) {
    const { canvas, context } = this;
    context.globalCompositeOperation = "source-over";
    context.drawImage(mask, 0, 0, canvas.width, canvas.height);
    this.repaint((pixel) => pixel[0]);
  }

  invert() {
    this.snapshot();
    this.repaint((pixel) => 255 - pixel[3]);
  }

  repaint(alpha) {
    const { canvas, context, pixels } = this;
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = alpha(pixels.data.subarray(i, i + 4));
    context.putImageData(pixels, 0, 0);
    context.globalCompositeOperation = "source-in";
    context.fillStyle = this.paint;
    context.fillRect(0, 0, canvas.width, canvas.height);
  }

  /** White where it is painted, on black. */
  exported() {
    const pixels = this.pixels;
    let painted = 0;
    for (let i = 0; i < pixels.data.length; i += 4) {
      const value = pixels.data[i + 3];
      painted |= value;
      pixels.data.set([value, value, value, 255], i);
    }
    this.context.putImageData(pixels, 0, 0);
    return painted ? this.canvas.toDataURL("image/png") : null;
  }
}

function tool(input, label) {
  return h("label", {}, input, h("span", {}, label));
}

function quietButton(label, onclick) {
  return h("button", { type: "button", class: "quiet", onclick }, label);
}

/** Stripes of this width, which are seen on any picture. */
function striped(context, width) {
  const tile = h("canvas", { width: 4, height: 4 });
  const pen = tile.getContext("2d");
  for (let y = 0; y < 4; y++) {
    for (let x = 0; x < 4; x++) {
      pen.fillStyle = STRIPES[(x + y) % 4 === 0 ? 1 : 0];
      pen.fillRect(x, y, 1, 1);
    }
  }
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(width));
  return pattern;
}
