/** A picture, large, with its settings and what can be made of it. */

import * as api from "./api.js";
import { byId, h, iconButton } from "./dom.js";
import { FIRST, labelOf } from "./layout.js";

/** The dialog. */
export class Viewer {
  /**
   * @param {() => import("./gallery.js").Entry[]} entries those of the gallery, in order
   * @param {[string, string, (entry: import("./gallery.js").Entry) => void][]} actions label, title, what is done
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
    const { prompt = "", width, height } = entry.settings;
    const source = await api.pictureSource(entry.url);
    const image = h("img", { alt: prompt, src: source, width, height });
    this.dialog.replaceChildren(
      h("div", { class: "large" }, image, this.step("left", "Newer", -1), this.step("right", "Older", 1)),
      h("div", { class: "beside" }, this.buttons(source), settingsList(entry.settings)),
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
    const place = entries.findIndex(({ url }) => url === this.entry.url);
    return place < 0 ? undefined : entries[place + by];
  }

  /** Shows the one beside; the focus stays, though its button is a new one. */
  async go(by) {
    const entry = this.beside(by);
    if (!entry) return;
    await this.open(entry);
    (this.dialog.querySelector(by < 0 ? ".left:enabled" : ".right:enabled") ?? this.dialog).focus();
  }

  buttons(source) {
    const name = this.entry.url.split("/").pop();
    return h(
      "div",
      { class: "actions" },
      ...this.actions.map(([label, title, action]) => {
        return h("button", { type: "button", title, onclick: () => this.run(action) }, label);
      }),
      h("a", { class: "button", href: source, download: name }, "Download"),
      iconButton("close", "Close", () => this.dialog.close()),
    );
  }

  run(action) {
    this.dialog.close();
    action(this.entry);
  }
}

/** The settings as a list of names and values, in the order of the form. */
function settingsList(settings) {
  const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);
  const names = Object.keys(settings).filter((name) => settings[name] !== null);
  names.sort((a, b) => place(a) - place(b));
  return h(
    "dl",
    { class: "settings" },
    ...names.map((name) => {
      const isLong = name.includes("prompt");
      return h("div", { class: isLong && "wide" }, h("dt", {}, labelOf(name)), h("dd", {}, written(settings[name])));
    }),
  );
}

function written(value) {
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
