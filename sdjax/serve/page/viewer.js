/** A picture, large, with its settings and what can be made of it. */

import * as api from "./api.js";
import { byId, h, icon, iconButton } from "./dom.js";
import { FIRST, labelOf } from "./layout.js";

const HIDDEN = ["scheduler", "id"];
const MODEL = ["model", "revision", "variant", "dtype"];

/** The dialog. */
export class Viewer {
  /**
   * @param {() => import("./gallery.js").Entry[]} entries those of the gallery, in order
   * @param {{label: string, title: string, run: (entry: import("./gallery.js").Entry) => void}[]} actions
   */
  constructor(entries, actions) {
    this.entries = entries;
    this.actions = actions;
    this.dialog = byId("viewer");
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.go(-1);
      if (event.key === "ArrowRight") this.go(1);
    });
    this.dialog.addEventListener("click", (event) => event.target === this.dialog && this.dialog.close());
  }

  /** @param {import("./gallery.js").Entry} entry */
  async open(entry) {
    this.entry = entry;
    const { prompt = "", width, height } = entry.settings ?? {};
    const source = await api.pictureSource(entry.url);
    this.dialog.replaceChildren(
      h("div", { class: "large" }, h("img", { alt: prompt, src: source, width, height }), this.step("left", "Newer picture", -1), this.step("right", "Older picture", 1)),
      h("div", { class: "beside" }, this.buttons(source), settingsList(entry.settings ?? {})),
    );
    if (!this.dialog.open) this.dialog.showModal();
  }

  step(name, label, by) {
    const button = iconButton(name, label, () => this.go(by));
    button.classList.add(name);
    button.disabled = !this.beside(by);
    return button;
  }

  beside(by) {
    const entries = this.entries();
    return entries[entries.findIndex(({ url }) => url === this.entry.url) + by];
  }

  go(by) {
    const entry = this.beside(by);
    if (entry) this.open(entry);
  }

  buttons(source) {
    const name = this.entry.url.split("/").pop();
    return h(
      "div",
      { class: "actions" },
      ...this.actions.map(({ label, title, run }) => h("button", { type: "button", title, onclick: () => this.run(run) }, label)),
      h("a", { class: "button", href: source, download: name }, "Download"),
      h("button", { type: "button", class: "icon-button close", "aria-label": "Close", title: "Close", onclick: () => this.dialog.close() }, icon("close")),
    );
  }

  run(action) {
    this.dialog.close();
    action(this.entry);
  }
}

/** The settings as a list of names and values, in the order of the form. */
function settingsList(settings) {
  const names = Object.keys(settings).filter((name) => !HIDDEN.includes(name) && settings[name] !== null);
  const order = [...FIRST, "sampler"];
  const place = (name) => (order.includes(name) ? order.indexOf(name) : order.length + MODEL.indexOf(name));
  names.sort((a, b) => place(a) - place(b));
  return h(
    "dl",
    { class: "settings" },
    ...names.map((name) => h("div", { class: name.includes("prompt") ? "wide" : null }, h("dt", {}, labelOf(name)), h("dd", {}, written(settings[name])))),
  );
}

function written(value) {
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
