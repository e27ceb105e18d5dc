/** X/Y/Z sweeps: the axes, their values, and the requests of a sheet. */

import { changed, folded, h } from "./dom.js";
import { labelOf } from "./layout.js";
import { seedOf } from "./seed.js";

const WORDS = "words of the prompt";
const NAMES = ["X", "Y", "Z"];
const UNSWEPT = ["picture", "pictures", "picture lists", "loras"];
const WHOLE = ["integer", "seed"];
const MOST_CELLS = 400;
const HELP = {
  words: "The first is what the prompt says now, and is replaced by each: goose, swan, duck",
  whole: "Such as 5, 10, 20, or 0:4 for 0, 1, 2, 3",
  number: "Such as 1.5, 3, 7",
  choice: "Separated by commas",
  flag: "Such as no, yes",
  text: "Separated by |",
};

/**
 * @typedef {object} Axis
 * @property {string} label
 * @property {string[]} values as they are written beside the pictures
 * @property {Array<(body: object) => object>} changes what each makes of a request
 */

/** The part of the form where axes are chosen. */
export class Sweep {
  /** @param {object} capabilities */
  constructor({ fields, samplers }) {
    const choices = { scheduler: samplers.map(({ name }) => name) };
    const swept = fields.filter(({ type }) => !UNSWEPT.includes(type));
    this.specs = swept.map((spec) => ({ ...spec, choices: choices[spec.name] ?? spec.choices }));
    this.rows = NAMES.map((name) => this.row(name));
    const intro = h("p", { class: "help" }, "A sheet of pictures, one for each value of each axis.");
    const rows = this.rows.map(({ element }) => element);
    this.element = folded("sweep", "Sweep", h("div", { class: "sweep" }, intro, ...rows));
  }

  row(name) {
    const id = `sweep-${name.toLowerCase()}`;
    const names = [WORDS, ...this.specs.map((spec) => spec.name)];
    const options = names.map((value) => h("option", { value }, labelOf(value)));
    const none = h("option", { value: "" }, "none");
    const select = h("select", { id, "aria-label": `Field of axis ${name}` }, none, ...options);
    const described = { "aria-label": `Values of axis ${name}`, "aria-describedby": `${id}-help` };
    const values = h("input", { type: "text", id: `${id}-values`, ...described });
    const help = h("p", { class: "help", id: `${id}-help` });
    const all = h("button", { type: "button", class: "quiet", hidden: true }, "All");
    const row = { select, values, update: () => this.explain(select.value, values, help, all) };
    select.addEventListener("input", row.update);
    all.addEventListener("click", () => {
      values.value = this.spec(select.value).choices.join(", ");
      changed(values);
    });
    row.element = h("div", { class: "axis" }, h("label", { for: id }, name), select, all, values, help);
    return row;
  }

  explain(name, values, help, all) {
    values.hidden = !name;
    help.textContent = name ? HELP[kindOf(name, this.spec(name))] : "";
    all.hidden = !this.spec(name)?.choices;
  }

  spec(name) {
    return this.specs.find((spec) => spec.name === name);
  }

  /** Whether an axis is chosen. */
  get isUsed() {
    return this.get().some(([name, text]) => name && text.trim());
  }

  /** What is chosen, to be kept: [field, values] of each axis. */
  get() {
    return this.rows.map(({ select, values }) => [select.value, values.value]);
  }

  /** @param {string[][]} kept as `get` gave it */
  set(kept) {
    this.rows.forEach((row, i) => {
      [row.select.value, row.values.value] = kept[i] ?? ["", ""];
      row.update();
    });
  }

  /**
   * The axes that are chosen. Throws an Error that says what is wrong with one.
   * @param {string} prompt whose words may be swept
   * @returns {Axis[]}
   */
  axes(prompt) {
    const chosen = this.get().filter(([name, text]) => name && text.trim());
    const axes = chosen.map(([name, text]) => axisOf(name, this.spec(name), text, prompt));
    const count = axes.reduce((product, { values }) => product * values.length, 1);
    if (count > MOST_CELLS) throw new Error(`The sheet would have ${count} pictures; ${MOST_CELLS} at most`);
    return axes;
  }
}

function kindOf(name, spec) {
  if (name === WORDS) return "words";
  if (spec.choices) return "choice";
  if (WHOLE.includes(spec.type)) return "whole";
  return HELP[spec.type] ? spec.type : "text";
}

/**
 * An axis of a field and its values as they are typed.
 * @param {string} name
 * @param {import("./fields.js").Spec|undefined} spec undefined for the words of the prompt
 * @param {string} text
 * @param {string} prompt
 * @returns {Axis}
 */
export function axisOf(name, spec, text, prompt) {
  const kind = kindOf(name, spec);
  const texts = text.split(kind === "text" ? "|" : ",").map((part) => part.trim()).filter(Boolean);
  if (kind === "words") return wordsAxis(texts, prompt);
  const values = texts.flatMap((part) => READERS[kind](part, spec));
  return { label: labelOf(name), values: values.map(String), changes: values.map((value) => ({ [name]: value })) };
}

function wordsAxis(texts, prompt) {
  if (!prompt.includes(texts[0])) throw new Error(`The prompt does not say ${texts[0]}`);
  return { label: "Words", values: texts, changes: texts.map((text) => ({ [WORDS]: [texts[0], text] })) };
}

const READERS = {
  whole: (text, { name }) => (text.includes(":") ? range(text, name) : [number(text, name)]),
  number: (text, { name }) => [number(text, name)],
  choice: (text, { name, choices }) => {
    if (!choices.includes(text)) throw new Error(`${labelOf(name)}: there is no ${text}`);
    return [text];
  },
  flag: (text) => [/^(yes|true|1|on)$/i.test(text)],
  text: (text) => [text],
};

function number(text, name) {
  const value = Number(text);
  if (text === "" || !Number.isFinite(value)) throw new Error(`${labelOf(name)}: ${text} is no number`);
  return name === "seed" ? seedOf(text) : value;
}

/** "0:4" -> 0, 1, 2, 3; "0:10:5" -> 0, 5 */
function range(text, name) {
  const [start, stop, step = 1] = text.split(":").map((part) => number(part, name));
  const count = Math.ceil((stop - start) / step);
  if (!(count > 0 && count <= MOST_CELLS)) throw new Error(`${labelOf(name)}: ${text} has no values, or too many`);
  return Array.from({ length: count }, (_, i) => start + i * step);
}

/**
 * The cells of a sheet, row by row: where they are, and what they change in the request.
 * @param {Axis[]} axes
 * @returns {{at: number[], change: object}[]}
 */
export function cellsOf(axes) {
  return axes.reduceRight(
    (cells, { changes }) =>
      cells.flatMap(({ at, change }) => changes.map((own, i) => ({ at: [i, ...at], change: { ...change, ...own } }))),
    [{ at: [], change: {} }],
  );
}

/**
 * The request of a cell.
 * @param {object} base
 * @param {object} change
 */
export function changedBody(base, { [WORDS]: words, ...change }) {
  const body = { ...base, ...change };
  return words ? { ...body, prompt: body.prompt.replaceAll(words[0], words[1]) } : body;
}
