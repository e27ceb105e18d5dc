/** Sheets: the pictures of a sweep in labelled tables, drawn by requests of one picture each. */

import * as api from "./api.js";
import { announce, byId, h } from "./dom.js";
import { download } from "./sheet-picture.js";
import { keepLarge, recallAll, recallLarge } from "./store.js";
import { cellsOf, changedBody } from "./sweep.js";

const AT_ONCE = 4; // requests that wait or run: each has a connection, of the six that a browser has to a server
const RECORD = "record "; // before the id of a sheet: what it is kept by

/** All sheets of the page. */
export class Sheets {
  sheets = [];

  /**
   * @param {import("./jobs.js").Jobs} jobs
   * @param {(entry: import("./gallery.js").Entry) => void} open shows a picture large
   */
  constructor(jobs, open) {
    this.jobs = jobs;
    this.open = open;
    jobs.addEventListener("change", ({ detail }) => this.of(detail.job)?.show(detail.job));
    jobs.addEventListener("end", ({ detail }) => this.of(detail.job)?.end(detail.job));
  }

  /**
   * Draws a sheet.
   * @param {object} base the request that all cells change
   * @param {import("./sweep.js").Axis[]} axes
   */
  async start(base, axes) {
    const id = `sheet-${Date.now()}`;
    const record = { id, axes: axes.map(({ label, values }) => ({ label, values })), cells: cellsOf(axes) };
    await keepLarge(id, base);
    await keepLarge(RECORD + id, record);
    this.add(record, base);
  }

  /** Goes on with the sheets that were there when the page was left. */
  async resume() {
    for (const record of await recallAll(RECORD)) {
      const base = await recallLarge(record.id);
      if (base) this.add(record, base);
    }
  }

  add(record, base) {
    const sheet = new Sheet(record, base, this);
    this.sheets.unshift(sheet);
    byId("sheets").prepend(sheet.element);
    sheet.run();
  }

  remove(sheet) {
    this.sheets = this.sheets.filter((one) => one !== sheet);
    sheet.element.remove();
  }

  of(job) {
    return job.isOwn ? undefined : this.sheets.find((sheet) => sheet.cellOf(job));
  }

}

class Sheet {
  /** The record is kept whenever it changes; the base, which may have pictures, once. */
  constructor(record, base, sheets) {
    this.record = record;
    this.base = base;
    this.sheets = sheets;
    this.running = 0;
    this.isElsewhere = this.isClosed = false;
    this.progress = h("progress", { max: record.cells.length, value: 0, "aria-label": "Progress of the sheet" });
    this.state = h("span", { class: "state" });
    this.stop = h("button", { type: "button", class: "quiet", onclick: () => this.cancel() }, "Cancel");
    this.frames = record.cells.map((cell) => this.frame(cell));
    this.element = this.card();
    this.update();
  }

  get axes() {
    return this.record.axes;
  }

  /** Cells that are neither done, failed nor cancelled. */
  get open() {
    return this.record.cells.filter(({ url, error }) => !url && !error);
  }

  cellOf({ id }) {
    return this.record.cells.find(({ request }) => request === id);
  }

  /** Draws what is open, in one window at a time; another one that shows the sheet has its pictures afterwards. */
  async run() {
    if (!this.open.length || (await alone(this.record.id, () => this.draw(), true))) return;
    this.isElsewhere = true;
    this.update();
    await alone(this.record.id, () => this.takeOver());
  }

  async takeOver() {
    const record = await recallLarge(RECORD + this.record.id);
    if (!record) return this.sheets.remove(this);
    this.isElsewhere = false;
    this.record = record;
    record.cells.forEach((cell) => this.replaceFrame(cell));
    if (this.open.length) await this.draw();
  }

  async draw() {
    const done = new Promise((resolve) => (this.done = resolve));
    for (const cell of this.open.filter(({ request }) => request)) await this.pickUp(cell);
    for (let cell; (cell = this.open.find(({ request }) => !request)); ) {
      if (this.running >= AT_ONCE) await new Promise((resolve) => (this.freed = resolve));
      else await this.ask(cell);
    }
    await done;
  }

  /** Goes on with a request that was under way, or, where the server has forgotten it, asks again. */
  async pickUp(cell) {
    this.running++;
    if (await this.sheets.jobs.resumeOne({ id: cell.request, title: "", isOwn: false })) return;
    this.running--;
    delete cell.request;
  }

  async ask(cell) {
    this.running++;
    try {
      const job = await this.sheets.jobs.submit({ ...changedBody(this.base, cell.change), count: 1 }, false);
      cell.request = job.id;
      await this.keep();
    } catch (error) {
      this.running--;
      if (error.status === 429) await new Promise((resolve) => setTimeout(resolve, error.retryAfter * 1000));
      else this.fail(cell, error.message);
    }
  }

  show(job) {
    const cell = this.cellOf(job);
    const [picture] = job.pictures;
    const image = this.frames[this.record.cells.indexOf(cell)].querySelector("img");
    if (picture.preview && !cell.url) Object.assign(image, { src: picture.preview, hidden: false });
  }

  end(job) {
    this.running--;
    const cell = this.cellOf(job);
    const [{ url, settings, error }] = job.pictures;
    if (url) this.finish(cell, { url, settings });
    else this.fail(cell, error ?? job.error ?? "cancelled");
    this.freed?.();
  }

  finish(cell, entry) {
    Object.assign(cell, entry);
    this.replaceFrame(cell);
    if (!this.open.length) announce("The sheet is done");
  }

  fail(cell, error) {
    cell.error = error;
    this.replaceFrame(cell);
  }

  replaceFrame(cell) {
    const index = this.record.cells.indexOf(cell);
    const frame = this.frame(cell);
    this.frames[index].replaceWith(frame);
    this.frames[index] = frame;
    this.update();
    this.keep();
    if (!this.open.length) this.done?.();
  }

  keep() {
    return this.isClosed ? undefined : keepLarge(RECORD + this.record.id, this.record);
  }

  cancel() {
    for (const cell of this.open) {
      const job = this.sheets.jobs.jobs.get(cell.request);
      if (job) this.sheets.jobs.cancel(job);
      else this.fail(cell, "cancelled");
    }
  }

  frame(cell) {
    const { width, height } = this.base;
    const alt = this.axes.map(({ label, values }, i) => `${label}: ${values[cell.at[i]]}`).join(", ");
    if (cell.error) return h("span", { class: "cell-error" }, cell.error);
    const image = h("img", { alt, width, height, hidden: !cell.url });
    if (!cell.url) return waiting(image, width, height);
    api.pictureSource(cell.url).then((source) => (image.src = source));
    return h("button", { type: "button", class: "frame", onclick: () => this.sheets.open(cell) }, image);
  }

  card() {
    const heading = h("h2", {}, `Sheet: ${this.base.prompt}`);
    const title = h("div", { class: "title" }, heading, this.state, this.stop, this.saveButton(), this.closeButton());
    const deep = this.axes[2]?.values ?? [""];
    const scrolled = { class: "scroll", tabindex: 0, role: "group", "aria-label": "Table of the sheet" };
    const tables = deep.map((_, z) => h("div", scrolled, this.table(z)));
    return h("section", { class: "sheet" }, title, this.progress, ...tables);
  }

  saveButton() {
    const save = () => download({ axes: this.axes, images: this.frames.map((frame) => frame.querySelector?.("img")) });
    return h("button", { type: "button", class: "quiet", onclick: save }, "Save as PNG");
  }

  closeButton() {
    const close = () => {
      this.sheets.remove(this);
      if (this.isElsewhere) return;
      this.isClosed = true;
      this.cancel();
      for (const name of [this.record.id, RECORD + this.record.id]) keepLarge(name, undefined);
    };
    const title = "Its pictures stay in the gallery";
    return h("button", { type: "button", class: "quiet", onclick: close, title }, "Close");
  }

  table(z) {
    const [x, y, deep] = this.axes;
    const rows = y?.values ?? [""];
    const caption = deep && h("caption", {}, `${deep.label}: ${deep.values[z]}`);
    const corner = h("td", {}, y ? `${y.label} ↓ ${x.label} →` : `${x.label} →`);
    const head = h("tr", {}, corner, ...x.values.map((value) => h("th", { scope: "col" }, value)));
    const start = (row) => (z * rows.length + row) * x.values.length;
    const body = rows.map((value, row) => {
      const cells = x.values.map((_, i) => h("td", {}, this.frames[start(row) + i]));
      return h("tr", {}, h("th", { scope: "row" }, value), ...cells);
    });
    return h("table", {}, caption, h("thead", {}, head), h("tbody", {}, ...body));
  }

  update() {
    const left = this.open.length;
    const count = this.record.cells.length;
    this.progress.value = count - left;
    this.progress.hidden = this.stop.hidden = !left || this.isElsewhere;
    const state = left ? `${count - left} of ${count}` : `${count} pictures`;
    this.state.textContent = this.isElsewhere ? "Another window draws it" : state;
  }
}

/**
 * Does something that one window does at a time: when the others have done it, or, if it must be now, perhaps not.
 * @returns {Promise<boolean>} whether it was done
 */
async function alone(name, work, isNow = false) {
  if (!navigator.locks) return work().then(() => true); // of secure pages alone
  return navigator.locks.request(name, { ifAvailable: isNow }, async (lock) => {
    if (lock) await work();
    return Boolean(lock);
  });
}

function waiting(image, width, height) {
  const frame = h("span", { class: "frame" }, image);
  frame.style.aspectRatio = `${width} / ${height}`;
  return frame;
}
