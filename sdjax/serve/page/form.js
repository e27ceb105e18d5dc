/** The form, made from what the server can do; its values are the fields of a request. */

import { completionsOf } from "./complete.js";
import { byId, changed, folded, h } from "./dom.js";
import { choiceField, fieldOf, numberField, sizeFields } from "./fields.js";
import { FIRST, GROUPS, SECTIONS, labelOf } from "./layout.js";
import { loraPanel } from "./loras.js";
import { paintMask } from "./mask.js";
import { decoded, pictureField, picturesField } from "./picture.js";
import { promptField } from "./prompt.js";
import { seedField } from "./seed.js";
import { keep, keepLarge, recall, recallLarge } from "./store.js";

const PICTURES = ["picture", "pictures", "picture lists"];
const SIDES_OF = 8; // pixels
const TIMES_THE_MODELS = 2; // size: what larger pictures are brought to

/** The fields of the form by name, and what is done with all of them. */
export class Form {
  /**
   * @param {HTMLFormElement} element
   * @param {HTMLElement} container of the fields
   * @param {object} capabilities of the server
   */
  constructor(element, container, capabilities) {
    this.element = element;
    this.capabilities = capabilities;
    this.fields = new Map();
    this.saved = {};
    this.specs = new Map(capabilities.fields.map((spec) => [spec.name, spec]));
    this.spec("hires_upscaler").choices = capabilities.hires_upscalers;
    container.replaceChildren(...this.firstFields(), ...this.sections(), this.moreFields());
    byId("count-slot").replaceChildren(this.countField());
    element.addEventListener("input", () => {
      this.save();
      this.markUsed();
    });
    element.addEventListener("toggle", () => this.save(), true);
  }

  /**
   * The values that differ from the defaults, and those that a picture always has.
   * @returns {Object<string, any>}
   */
  values() {
    const all = [...this.fields].map(([name, field]) => [name, field.get()]);
    return Object.fromEntries(all.filter(([, value]) => value !== null && value !== ""));
  }

  /**
   * Sets all fields: those that are not given, to their defaults. Unknown ones are left out.
   * @param {Object<string, any>} values
   */
  fill(values) {
    const given = { ...this.defaults(), count: this.fields.get("count").get() ?? 1, ...values };
    for (const [name, field] of this.fields) field.set(given[name] ?? null);
    this.unfold(values);
    changed(this.element);
  }

  /** The values of the model, for those fields that show them. */
  defaults() {
    const { width, height, guidance_scale, steps } = this.capabilities;
    return { width, height, guidance_scale, num_inference_steps: steps };
  }

  /**
   * Starts from a picture, at its size.
   * @param {string} url its data URL
   */
  async startFrom(url) {
    this.fields.get("image").set(url);
    this.fields.get("mask_image")?.set(null);
    await this.sizeByPicture();
    this.unfold({ image: url });
    changed(this.element);
  }

  /** The size of the picture to start from, as near as the model makes pictures. */
  async sizeByPicture() {
    const image = await decoded(this.fields.get("image").get());
    const pixels = TIMES_THE_MODELS * this.capabilities.width * this.capabilities.height;
    const [width, height] = fitted(image.naturalWidth, image.naturalHeight, pixels);
    this.fields.get("width").set(width);
    this.fields.get("height").set(height);
  }

  /** Keeps all values: pictures apart from the rest. */
  save() {
    const values = this.values();
    const large = Object.fromEntries(Object.entries(values).filter(([name]) => this.isPicture(name)));
    const small = Object.fromEntries(Object.entries(values).filter(([name]) => !this.isPicture(name)));
    keep("form", small);
    keep("unfolded", this.details().filter((part) => part.open).map(({ id }) => id));
    this.savePictures(large);
  }

  /** Keeps the pictures where they have changed: they are large. */
  savePictures(pictures) {
    const isSame = (name) => String(pictures[name]) === String(this.saved[name]);
    if (Object.keys({ ...pictures, ...this.saved }).every(isSame)) return;
    this.saved = pictures;
    keepLarge("form", pictures);
  }

  /** Fills in what was kept; the model's own values at the first visit. */
  async restore() {
    const open = recall("unfolded", []);
    const seed = recall("drawn", null);
    this.saved = (await recallLarge("form")) ?? {};
    this.fill({ ...recall("form", this.defaults()), ...this.saved });
    for (const part of this.details()) part.open = open.includes(part.id);
    if (seed !== null) this.showSeed(seed);
  }

  /**
   * Shows the seed that was drawn last, to be locked.
   * @param {number} seed
   */
  showSeed(seed) {
    this.fields.get("seed").show(seed);
    keep("drawn", seed);
  }

  /** Whether all that is typed can be read; says so at the first field that cannot. */
  isValid() {
    const input = this.element.querySelector("input:invalid");
    if (input) this.show(input);
    return input?.reportValidity() ?? true;
  }

  /**
   * Marks the field that a message of the server names; without one, none.
   * @param {string} [message] "field: what is wrong"
   */
  mark(message = "") {
    for (const input of this.element.querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
    const name = message.match(/^(\w+)/)?.[1];
    const input = name && this.element.querySelector(`#field-${name}`);
    if (!input) return;
    input.setAttribute("aria-invalid", "true");
    this.show(input);
    input.focus();
  }

  show(input) {
    const part = input.closest("details");
    if (part) part.open = true;
  }

  firstFields() {
    const completions = completionsOf(this.capabilities);
    const prompts = ["prompt", "negative_prompt"].map((name) => promptField(this.spec(name), completions));
    const numbers = ["num_inference_steps", "guidance_scale"].map((name) => numberField(this.spec(name)));
    const seed = seedField(this.spec("seed"));
    const [size, ...sides] = sizeFields(this.spec("width"), this.spec("height"));
    for (const field of [...prompts, ...numbers, ...sides, seed]) this.add(field);
    const elements = [this.add(this.samplerField()), ...numbers.map(({ element }) => element), size, seed.element];
    const loras = this.capabilities.loras.length ? [loraPanel(this.capabilities.loras)] : [];
    return [...prompts.map(({ element }) => element), ...loras, h("div", { class: "grid" }, ...elements)];
  }

  samplerField() {
    const { samplers } = this.capabilities;
    const known = samplers.filter(({ web_ui: theirs }) => theirs);
    const shown = Object.fromEntries(known.map(({ name, web_ui: theirs }) => [name, `${name} (${theirs})`]));
    const field = choiceField({ ...this.spec("scheduler"), choices: samplers.map(({ name }) => name) }, shown);
    field.element.classList.add("sampler");
    return field;
  }

  /** How many pictures, which stands beside the button. */
  countField() {
    const help = "Pictures, whose seeds count up";
    const { count: maximum } = this.capabilities.limits;
    return this.add(numberField({ name: "count", type: "integer", help, minimum: 1, maximum, default: 1 }));
  }

  sections() {
    const isThere = ({ needs }) => !needs || this.capabilities[needs];
    return SECTIONS.filter(isThere).map(({ id, title, fields }) => folded(id, title, this.grid(fields)));
  }

  moreFields() {
    const placed = [...FIRST, ...SECTIONS.flatMap(({ fields }) => fields), ...Object.values(GROUPS).flat()];
    const rest = [...this.specs.values()].filter(({ name, type }) => !placed.includes(name) && type !== "loras");
    const groups = { ...GROUPS, "Other models": rest.map(({ name }) => name) };
    const parts = Object.entries(groups).map(([title, names]) => [h("h3", {}, title), this.grid(names)]);
    return folded("more-fields", "More", ...parts.flat());
  }

  /** The fields of these names that the server has, pictures first. */
  grid(names) {
    const specs = names.filter((name) => this.specs.has(name)).map((name) => this.spec(name));
    const elements = specs.map((spec) => this.add(this.fieldOf(spec)));
    const pictures = elements.filter((_, i) => this.isPicture(specs[i].name));
    const wells = pictures.length > 0 && h("div", { class: "wells" }, ...pictures);
    return h("div", { class: "grid" }, wells, ...elements.filter((element) => !pictures.includes(element)));
  }

  fieldOf(spec) {
    if (spec.name === "mask_image") return this.maskField(spec);
    if (spec.name === "image") return this.imageField(spec);
    if (spec.type === "picture") return pictureField(spec);
    if (!this.isPicture(spec.name)) return fieldOf(spec);
    return picturesField(spec, spec.name === "control_image" ? this.capabilities.controls : 1);
  }

  imageField(spec) {
    const field = pictureField(spec);
    field.input.addEventListener("input", async () => {
      if (field.get()) await this.sizeByPicture();
      else this.fields.get("mask_image").set(null); // it is of that picture alone
      this.save();
    });
    return field;
  }

  maskField(spec) {
    const paint = h("button", { type: "button", class: "quiet", id: "paint" }, "Paint…");
    const field = pictureField(spec);
    field.element.append(paint);
    paint.addEventListener("click", async () => {
      const mask = await paintMask(this.fields.get("image").get(), field.get());
      if (mask === undefined) return;
      field.set(mask);
      changed(field.input);
    });
    this.element.addEventListener("input", () => (paint.disabled = !this.fields.get("image").get()));
    return field;
  }

  /** Takes a field into the form. Gives its element. */
  add(field) {
    this.fields.set(field.name, field);
    return field.element;
  }

  spec(name) {
    return this.specs.get(name);
  }

  isPicture(name) {
    return PICTURES.includes(this.specs.get(name)?.type);
  }

  details() {
    return [...this.element.querySelectorAll("details")];
  }

  /** Says of each folded part whether it has values. */
  markUsed() {
    for (const part of this.details()) {
      const inputs = [...part.querySelectorAll("[id^=field-]")].map(({ id }) => id.slice("field-".length));
      const isUsed = inputs.some((name) => (this.fields.get(name)?.get() ?? null) !== null);
      part.querySelector(".used").hidden = !isUsed;
    }
  }

  /** Opens the parts that have some of these values. */
  unfold(values) {
    for (const { id, fields } of SECTIONS) {
      const part = this.element.querySelector(`#${id}`);
      if (part && fields.some((name) => values[name] !== undefined)) part.open = true;
    }
  }
}

/** The size that is nearest to one, with sides that models can have and at most so many pixels. */
function fitted(width, height, pixels) {
  const scale = Math.min(1, Math.sqrt(pixels / (width * height)));
  return [width, height].map((side) => Math.max(SIDES_OF, Math.floor((side * scale) / SIDES_OF) * SIDES_OF));
}
