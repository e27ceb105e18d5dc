/** Puts the page together. */

import * as api from "./api.js";
import { announce, byId, changed, h } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { Jobs } from "./jobs.js";
import { withLoras } from "./loras.js";
import { dataUrl, pictureOf } from "./picture.js";
import { Queue } from "./queue.js";
import { drawn } from "./seed.js";
import { Sheets } from "./sheet.js";
import { keep, recall } from "./store.js";
import { Sweep } from "./sweep.js";
import { Viewer } from "./viewer.js";

const VARIED = 0.6; // strength of a variation
const ONE_COLUMN = "(max-width: 800px)";

class Page {
  constructor(capabilities) {
    this.capabilities = capabilities;
    this.jobs = new Jobs();
    this.form = new Form(byId("form"), byId("fields"), capabilities);
    this.sweep = new Sweep(capabilities);
    byId("more-fields").before(this.sweep.element);
    this.viewer = new Viewer(() => this.gallery.entries, this.actions());
    this.gallery = new Gallery(this.jobs, (entry) => this.viewer.open(entry));
    this.queue = new Queue(this.jobs);
    this.sheets = new Sheets(this.jobs, (entry) => this.viewer.open(entry));
  }

  async start() {
    this.showModels();
    this.sweep.set(recall("sweep", []));
    await this.form.restore();
    this.listen();
    this.nameButton();
    await this.gallery.load();
    await this.jobs.resume();
    await this.sheets.resume();
    byId("generate").disabled = false;
  }

  showModels() {
    const { model, models } = this.capabilities;
    const select = byId("model");
    select.replaceChildren(...models.map((name) => h("option", { value: name }, name)));
    select.value = models.includes(recall("model", null)) ? recall("model", null) : model;
    select.disabled = models.length < 2;
    select.addEventListener("input", () => keep("model", select.value));
  }

  listen() {
    const form = byId("form");
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.generate();
    });
    form.addEventListener("input", () => {
      keep("sweep", this.sweep.get());
      this.nameButton();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      if (!document.querySelector("dialog[open]")) form.requestSubmit();
    });
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.gallery.refresh().catch(() => {}); // else the next time
    });
    this.listenForFiles();
  }

  /** Pictures that are dropped on the page, pasted, or chosen. */
  listenForFiles() {
    const overlay = byId("drop-overlay");
    const input = byId("settings-file");
    const show = (isShown) => (overlay.hidden = !isShown);
    document.addEventListener("dragover", (event) => {
      event.preventDefault();
      show(event.dataTransfer.types.includes("Files") && !event.target.closest?.(".well"));
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget ?? show(false));
    document.addEventListener("drop", () => show(false), true);
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      this.takeFile(pictureOf(event.dataTransfer));
    });
    document.addEventListener("paste", (event) => this.takeFile(pictureOf(event.clipboardData)));
    byId("read-settings").addEventListener("click", () => input.click());
    input.addEventListener("change", () => {
      this.takeFile(input.files[0]);
      input.value = "";
    });
  }

  /** Uses the settings of a picture file; one without any is what to start from. */
  async takeFile(file) {
    if (!file) return;
    try {
      this.use({ settings: await api.settings(file) });
      announce("The settings of the picture are in the form");
    } catch (error) {
      if (error.status === 422) await this.takePicture(file);
      else this.complain(error.message);
    }
  }

  async takePicture(file) {
    try {
      await this.form.startFrom(await dataUrl(file));
      announce("The picture has no settings; it is what to start from");
    } catch {
      this.complain(`${file.name} is no picture that this browser can read`);
    }
  }

  fill({ model, loras = {}, ...fields }) {
    if (this.capabilities.models.includes(model)) changeTo(byId("model"), model);
    this.complain("");
    this.form.fill({ ...fields, prompt: withLoras(fields.prompt ?? "", loras, this.capabilities.loras) });
  }

  /** The request of the form. */
  body() {
    const model = byId("model").disabled ? {} : { model: byId("model").value };
    return { prompt: "", ...this.form.values(), ...model };
  }

  async generate() {
    this.complain("");
    if (!this.form.isValid()) return;
    const body = this.body();
    try {
      const axes = this.sweep.axes(body.prompt);
      if (axes.length) await this.sheets.start({ ...body, seed: body.seed ?? drawn() }, axes);
      else await this.draw(body);
    } catch (error) {
      this.complain(error.message);
    }
    if (matchMedia(ONE_COLUMN).matches && byId("problem").hidden) byId("pictures").scrollIntoView();
  }

  async draw(body) {
    const job = await this.jobs.submit(body);
    this.form.showSeed(job.pictures[0].seed);
    announce(`${job.pictures.length === 1 ? "A picture is" : `${job.pictures.length} pictures are`} on the way`);
  }

  /** Says what is wrong; "" nothing. */
  complain(message) {
    const problem = byId("problem");
    problem.textContent = message;
    problem.hidden = !message;
    this.form.mark(message);
  }

  /** Says on the button how many pictures there will be. */
  nameButton() {
    const count = this.count();
    byId("generate").firstElementChild.textContent = count === 1 ? "Generate" : `Generate ${count}`;
    this.sweep.element.querySelector(".used").hidden = !this.sweep.isUsed;
  }

  count() {
    try {
      const axes = this.sweep.axes(this.body().prompt);
      if (axes.length) return axes.reduce((product, { values }) => product * values.length, 1);
    } catch {
      return 1; // what is wrong is said when it is asked for
    }
    return this.form.fields.get("count").get() ?? 1;
  }

  /** What can be made of a picture of the gallery. */
  actions() {
    return [
      ["Use these settings", "Fill the form with them, seed included", (entry) => this.use(entry)],
      ["Vary", "Draw others like it now", (entry) => this.vary(entry)],
      ["Send to image to image", "Start from it, with its settings", (entry) => this.startFrom(entry)],
    ];
  }

  use({ settings }) {
    if (settings.prompt === undefined) this.complain("This picture carries no settings");
    else this.fill(settings);
    if (settings.had_image) this.complain("It was made from a picture, which is not in its settings: choose that again");
  }

  async vary({ url, settings }) {
    const image = await dataUrl(await api.pictureFile(url));
    const count = this.form.fields.get("count").get() ?? 1;
    try {
      await this.draw({ ...settings, image, strength: VARIED, seed: null, count });
    } catch (error) {
      this.complain(error.message);
    }
  }

  async startFrom({ url, settings }) {
    if (settings.prompt !== undefined) this.fill({ ...settings, seed: null });
    await this.form.startFrom(await dataUrl(await api.pictureFile(url)));
    byId("picture").scrollIntoView({ block: "nearest" });
  }
}

function changeTo(select, value) {
  select.value = value;
  changed(select);
}

async function begin() {
  try {
    await new Page(await api.capabilities()).start();
  } catch (error) {
    byId("problem").textContent = `The server does not answer: ${error.message}`;
    byId("problem").hidden = false;
  }
}

begin();
