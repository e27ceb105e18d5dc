/**
 * Controls for the fields of a request, by type. Each field is {name, element, get, set}: get gives the value as the
 * server takes it, null for the default; set takes one, null for the default.
 */

import { changed, h, iconButton } from "./dom.js";
import { SLIDERS, labelOf } from "./layout.js";

/**
 * @typedef {object} Spec
 * @property {string} name
 * @property {string} type
 * @property {any} default
 * @property {string} help
 * @property {string[]} [choices]
 * @property {number} [minimum]
 * @property {number} [maximum]
 */

const NUMBERS = ["integer", "number"];

/**
 * The control of a field that is no prompt, seed or picture.
 * @param {Spec} spec
 */
export function fieldOf(spec) {
  if (spec.choices?.length) return choiceField(spec);
  if (NUMBERS.includes(spec.type)) return numberField(spec);
  return spec.type === "flag" ? flagField(spec) : textField(spec);
}

/** A text, or what is written as one: "0.8,0.5". */
function textField(spec) {
  const input = h("input", { type: "text", ...named(spec), placeholder: placeholder(spec) });
  return {
    name: spec.name,
    element: described(spec, input),
    get: () => input.value.trim() || null,
    set: (value) => (input.value = value === null || value === undefined ? "" : shown(value)),
  };
}

/** A number, with a slider where its range is known. */
export function numberField(spec) {
  const [least, most, step, unset] = SLIDERS[spec.name] ?? rangeOf(spec);
  const input = h("input", {
    type: "number",
    ...named(spec),
    min: spec.minimum,
    max: spec.maximum,
    step: spec.type === "integer" ? 1 : "any",
    placeholder: placeholder(spec),
    inputmode: spec.type === "integer" ? "numeric" : "decimal",
  });
  const range = { type: "range", min: least, max: most, step, "aria-label": labelOf(spec.name), tabindex: -1 };
  const slider = most === undefined ? null : h("input", range);
  const follow = () => slider && (slider.value = input.value || (spec.default ?? unset ?? least));
  slider?.addEventListener("input", () => (input.value = slider.value));
  input.addEventListener("input", follow);
  follow();
  return {
    name: spec.name,
    element: described(spec, input, slider),
    input,
    get: () => (input.value === "" ? null : Number(input.value)),
    set: (value) => {
      input.value = value ?? "";
      follow();
    },
  };
}

function rangeOf({ type, minimum, maximum }) {
  const isShort = minimum !== undefined && minimum !== null && maximum - minimum <= 16;
  return isShort ? [minimum, maximum, type === "integer" ? 1 : 0.01] : [];
}

/**
 * One of several; where the field has no default, also that of the model.
 * @param {Spec} spec
 * @param {Object<string, string>} [names] how choices are shown, where not as they are
 */
export function choiceField(spec, names = {}) {
  const hasDefault = spec.choices.includes(spec.default);
  const texts = hasDefault ? spec.choices : ["", ...spec.choices];
  const options = texts.map((text) => h("option", { value: text }, names[text] ?? (text || "the model's own")));
  const select = h("select", named(spec), ...options);
  const initial = hasDefault ? spec.default : "";
  select.value = initial;
  return {
    name: spec.name,
    element: described(spec, select),
    get: () => (select.value === initial ? null : select.value),
    set: (value) => (select.value = spec.choices.includes(value) ? value : initial),
  };
}

function flagField(spec) {
  const input = h("input", { type: "checkbox", ...named(spec) });
  input.checked = spec.default;
  const element = h("div", { class: "field flag" }, h("label", {}, input, labelOf(spec.name)), help(spec));
  return {
    name: spec.name,
    element,
    get: () => (input.checked === spec.default ? null : input.checked),
    set: (value) => (input.checked = value ?? spec.default),
  };
}

/** Width and height, side by side, with a button that swaps them. */
export function sizeFields(width, height) {
  const [first, second] = [numberField(width), numberField(height)];
  const swap = iconButton("swap", "Swap width and height", () => {
    const before = first.get();
    first.set(second.get());
    second.set(before);
    changed(first.input);
  });
  return [h("div", { class: "size" }, first.element, swap, second.element), first, second];
}

function named({ name }) {
  return { id: `field-${name}`, "aria-describedby": `field-${name}-help` };
}

function described(spec, input, slider) {
  const label = h("label", { for: input.id }, labelOf(spec.name));
  return h("div", { class: slider ? "field with-slider" : "field" }, label, input, slider, help(spec));
}

function help({ name, help }) {
  return h("p", { id: `field-${name}-help`, class: "help" }, help);
}

/** What an empty field stands for. */
function placeholder({ default: value, help }) {
  if (value === null || value === undefined) return help.includes("default:") ? "auto" : "none";
  return shown(value);
}

function shown(value) {
  return Array.isArray(value) ? value.join(",") : String(value);
}
