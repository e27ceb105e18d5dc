/** Where a prompt is written: it grows with its text, and knows weights and completions. */

import { byId, h } from "./dom.js";
import { completing } from "./complete.js";
import { labelOf } from "./layout.js";
import { weighed } from "./weights.js";

const BY_KEYS = "Ctrl and up or down gives a word more or less weight.";

/**
 * The field of a prompt.
 * @param {import("./fields.js").Spec} spec
 * @param {import("./complete.js").Completion[]} completions
 */
export function promptField(spec, completions) {
  const id = `field-${spec.name}`;
  const input = h("textarea", { id, spellcheck: "false", placeholder: spec.help, "aria-describedby": `${id}-help` });
  const list = h("ul", { id: `${id}-list`, role: "listbox", "aria-label": "Suggestions", class: "suggestions" });
  list.hidden = true;
  completing(input, list, completions);
  input.addEventListener("keydown", (event) => weighByKey(event, input));
  const element = h(
    "div",
    { class: "field prompt" },
    h("label", { for: id }, labelOf(spec.name)),
    input,
    list,
    h("p", { id: `${id}-help`, class: "sr-only" }, `${spec.help}. ${BY_KEYS}`),
  );
  const [get, set] = [() => input.value.trim() || null, (value) => (input.value = value ?? "")];
  return { name: spec.name, element, get, set };
}

function weighByKey(event, input) {
  const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (!direction || !(event.ctrlKey || event.metaKey) || event.altKey || event.shiftKey) return;
  event.preventDefault();
  const change = weighed(input.value, input.selectionStart, input.selectionEnd, direction);
  if (!change) return;
  replaceText(input, change.start, change.end, change.text);
  input.setSelectionRange(...change.select);
}

/**
 * Puts a text in place of a part of what is written, as if it were typed: Ctrl+Z takes it back.
 * @param {HTMLTextAreaElement} input
 * @param {number} start
 * @param {number} end
 * @param {string} text
 */
export function replaceText(input, start, end, text) {
  input.focus();
  input.setSelectionRange(start, end);
  const command = text ? "insertText" : "delete";
  if (!document.execCommand(command, false, text)) input.setRangeText(text, start, end, "end");
}

/** @returns {HTMLTextAreaElement} where the prompt is written */
export const promptInput = () => byId("field-prompt");
