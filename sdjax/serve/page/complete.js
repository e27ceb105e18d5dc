/** Suggestions while a prompt is written: LoRAs and learned words. */

import { announce, h } from "./dom.js";
import { replaceText } from "./prompt.js";

/**
 * @typedef {object} Completion
 * @property {string} name what is typed to find it
 * @property {string} text what is written
 * @property {string} kind what it is, in a word
 */

const MOST = 8;
const LEAST_TYPED = 2;
const TOKEN = /[^\s,()[\]|]+$/;

/**
 * What can be completed with these capabilities.
 * @param {{loras: string[], embeddings: string[]}} capabilities
 * @returns {Completion[]}
 */
export function completionsOf({ loras, embeddings }) {
  return [
    ...loras.map((name) => ({ name, text: `<lora:${name}:1>`, kind: "LoRA" })),
    ...embeddings.map((name) => ({ name, text: name, kind: "learned word" })),
  ];
}

/**
 * Those that begin as what is typed before the caret.
 * @param {Completion[]} completions
 * @param {string} before
 * @returns {{start: number, found: Completion[]}}
 */
export function matching(completions, before) {
  const token = (before.match(TOKEN)?.[0] ?? "").toLowerCase();
  const begins = (text) => text.toLowerCase().startsWith(token);
  const isTyped = token.length >= LEAST_TYPED || token === "<";
  const found = isTyped ? completions.filter(({ name, text }) => begins(name) || begins(text)) : [];
  return { start: before.length - token.length, found: found.slice(0, MOST) };
}

/**
 * Shows suggestions in a list under a text area; arrows choose, Enter or Tab takes, Escape closes.
 * @param {HTMLTextAreaElement} input
 * @param {HTMLElement} list
 * @param {Completion[]} completions
 */
export function completing(input, list, completions) {
  let shown = [];
  let chosen = 0;
  let start = 0;

  input.setAttribute("aria-autocomplete", "list");
  input.setAttribute("aria-controls", list.id);

  function close() {
    shown = [];
    list.hidden = true;
    input.removeAttribute("aria-activedescendant");
  }

  function choose(index) {
    chosen = (index + shown.length) % shown.length;
    [...list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === chosen)));
    input.setAttribute("aria-activedescendant", list.children[chosen].id);
  }

  function take(index) {
    const { text } = shown[index];
    replaceText(input, start, input.selectionEnd, text);
    close();
  }

  function suggest() {
    const { start: from, found } = matching(completions, input.value.slice(0, input.selectionEnd));
    if (!found.length || found.some(({ text }) => text === input.value.slice(from, input.selectionEnd))) return close();
    [shown, start] = [found, from];
    list.replaceChildren(...found.map((completion, i) => option(completion, `${list.id}-${i}`, () => take(i))));
    list.hidden = false;
    choose(0);
    announce(`${found.length} suggestions, the first is ${found[0].name}`);
  }

  const keys = {
    ArrowDown: () => choose(chosen + 1),
    ArrowUp: () => choose(chosen - 1),
    Enter: () => take(chosen),
    Tab: () => take(chosen),
    Escape: close,
  };
  input.addEventListener("input", suggest);
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    if (!shown.length || !keys[event.key] || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopImmediatePropagation();
    keys[event.key]();
  });
}

function option({ name, kind }, id, onclick) {
  return h(
    "li",
    { id, role: "option", onmousedown: (event) => event.preventDefault(), onclick },
    h("span", {}, name),
    h("span", { class: "kind" }, kind),
  );
}
