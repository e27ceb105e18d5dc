/** The gallery: pictures that are being drawn, with previews, then those that are done, newest first. */

import * as api from "./api.js";
import { byId, h } from "./dom.js";
import { decoded } from "./picture.js";

const SIZE = 48; // pictures of a page

/**
 * @typedef {object} Entry a picture that is done
 * @property {string} url
 * @property {object} settings
 */

/** Shows what the server has, and what the jobs give. */
export class Gallery {
  tiles = new Map();
  drawing = new Map();
  pages = 0;

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {(entry: Entry) => void} open shows a picture large
   */
  constructor(jobs, open) {
    this.open = open;
    this.list = byId("gallery");
    jobs.addEventListener("change", ({ detail }) => detail.job.isOwn && this.show(detail.job));
    jobs.addEventListener("picture", ({ detail }) => this.finish(detail.job, detail.index));
    jobs.addEventListener("end", ({ detail }) => this.end(detail.job));
    byId("more").addEventListener("click", () => this.load());
  }

  /** The entries that are shown, in order. */
  get entries() {
    return [...this.list.children].map((tile) => tile.entry).filter(Boolean);
  }

  /** Loads the next page of older pictures. */
  async load() {
    const { pictures, total } = await api.pictures(this.pages++, SIZE);
    for (const entry of pictures) if (!this.tiles.has(entry.url)) this.list.append(this.tile(entry));
    byId("more").hidden = this.pages * SIZE >= total;
    this.update();
  }

  /** Shows what others have drawn meanwhile. */
  async refresh() {
    const { pictures } = await api.pictures(0, SIZE);
    const fresh = pictures.filter(({ url }) => !this.tiles.has(url));
    this.list.prepend(...fresh.map((entry) => this.tile(entry)));
    this.update();
  }

  /** Tiles for the pictures of a job, with their previews. */
  show(job) {
    if (job.state === "cancelled" || job.pictures.every(({ url }) => url)) return;
    if (!this.drawing.has(job.id)) this.begin(job);
    this.drawing.get(job.id).forEach((tile, i) => showProgress(tile, job.pictures[i]));
  }

  begin(job) {
    const tiles = job.pictures.map((picture) => drawingTile(job, picture));
    this.drawing.set(job.id, tiles);
    this.list.prepend(...tiles);
    this.update();
  }

  finish(job, index) {
    const { url, settings } = job.pictures[index];
    const drawing = this.drawing.get(job.id)?.[index];
    const isShown = this.tiles.has(url);
    const done = isShown ? [] : [this.tile({ url, settings }, job.pictures[index].preview)];
    if (drawing) drawing.replaceWith(...done);
    else this.list.prepend(...done);
    this.update();
  }

  end(job) {
    for (const tile of this.drawing.get(job.id) ?? []) tile.remove();
    this.drawing.delete(job.id);
    this.update();
  }

  /** The tile of a picture, which shows the preview until it has loaded. */
  tile(entry, preview) {
    const { width, height } = entry.settings;
    const image = h("img", { alt: described(entry), width, height, loading: "lazy", decoding: "async", src: preview });
    show(image, entry.url, Boolean(preview));
    const button = h("button", { type: "button", class: "frame", onclick: () => this.open(entry) }, image);
    const tile = h("li", { class: "tile" }, button, h("p", { class: "caption", "aria-hidden": "true" }, titled(entry)));
    tile.entry = entry;
    this.tiles.set(entry.url, tile);
    return tile;
  }

  update() {
    byId("empty").hidden = this.list.childElementCount > 0;
  }
}

/** Shows a picture: in place of a preview when it has loaded, else as it comes into view. */
async function show(image, url, hasPreview) {
  const source = await api.pictureSource(url);
  if (hasPreview) await decoded(source);
  image.src = source;
}

function titled({ url, settings }) {
  return settings.prompt ?? url.split("/").pop();
}

function described(entry) {
  const { seed } = entry.settings;
  return seed === undefined ? titled(entry) : `${titled(entry)}, seed ${seed}`;
}

function drawingTile({ title, width, height }, { seed }) {
  const image = h("img", { alt: `Preview: ${title}, seed ${seed}`, width, height, class: "preview", hidden: true });
  const frame = h("div", { class: "frame" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  const progress = h("progress", { max: 1, value: 0, "aria-label": `Seed ${seed}` });
  return h("li", { class: "tile drawing" }, frame, progress, h("p", { class: "caption" }, "Waiting"));
}

function showProgress(tile, { preview, row, rows }) {
  const [image, progress, caption] = ["img", "progress", ".caption"].map((selector) => tile.querySelector(selector));
  if (preview && image.src !== preview) image.src = preview;
  image.hidden = !preview;
  progress.max = rows || 1;
  progress.value = row ?? 0;
  caption.textContent = row ? `Step ${row} of ${rows}` : "Waiting";
}
