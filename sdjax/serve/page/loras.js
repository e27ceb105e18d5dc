/** The LoRAs there are: each is put into the prompt by a click, where its weight is written. */

import { h } from "./dom.js";
import { promptInput, replaceText } from "./prompt.js";

/**
 * A button for each LoRA.
 * @param {string[]} loras
 */
export function loraPanel(loras) {
  const buttons = loras.map(toggle);
  document.addEventListener("input", () => buttons.forEach(follow));
  return h("div", { class: "loras", role: "group", "aria-label": "LoRAs" }, ...buttons);
}

function toggle(name) {
  const button = h("button", { type: "button", class: "chip", "data-name": name, "aria-pressed": "false" }, name);
  button.addEventListener("click", () => {
    const input = promptInput();
    const found = input.value.match(pattern(name));
    if (found) replaceText(input, found.index, found.index + found[0].length, "");
    else replaceText(input, input.value.length, input.value.length, `${input.value && " "}<lora:${name}:1>`);
    button.focus();
  });
  return button;
}

function follow(button) {
  const isUsed = pattern(button.dataset.name).test(promptInput().value);
  button.setAttribute("aria-pressed", String(isUsed));
}

function pattern(name) {
  return new RegExp(` ?<lora:${name.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}(:[^<>]*)?>`);
}

/**
 * A prompt with the LoRAs of a picture's settings.
 * @param {string} prompt
 * @param {Object<string, number>} used weights by file
 * @param {string[]} known what the server has
 */
export function withLoras(prompt, used, known) {
  const nameFor = (file) => known.find((name) => file === name || file.startsWith(`${name}.`)) ?? file;
  return [prompt, ...Object.entries(used).map(([file, weight]) => `<lora:${nameFor(file)}:${weight}>`)].join(" ");
}
