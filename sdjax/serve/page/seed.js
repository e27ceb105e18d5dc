/** The seed: a new one for each request, or one that is locked. */

import { changed, h, icon, iconButton } from "./dom.js";

/** @returns {number} a seed at random */
export const drawn = () => crypto.getRandomValues(new Uint32Array(1))[0];

/**
 * A seed as it is typed: a text where a number does not hold it.
 * @param {string} text
 * @returns {number|string}
 */
export function seedOf(text) {
  const value = Number(text);
  return Number.isSafeInteger(value) ? value : text;
}

/**
 * The field of the seed, with `show`: the seed that the server drew, which stays to be locked.
 * @param {{name: string, help: string}} spec
 */
export function seedField(spec) {
  const input = h("input", {
    type: "number",
    id: "field-seed",
    min: 0,
    step: 1,
    inputmode: "numeric",
    placeholder: "random",
    "aria-describedby": "field-seed-help",
  });
  const lock = h("button", { type: "button", class: "icon-button lock" });
  const dice = iconButton("dice", "Draw a seed and lock it", () => {
    input.value = drawn();
    setLocked(true);
    changed(input);
  });
  let locked = false;

  function setLocked(value) {
    locked = value && input.value !== "";
    const label = locked ? "The seed is locked; unlock it" : "A new seed each time; lock this one";
    lock.setAttribute("aria-pressed", String(locked));
    lock.setAttribute("aria-label", label);
    lock.title = label;
    lock.replaceChildren(icon(locked ? "locked" : "unlocked"));
  }

  lock.addEventListener("click", () => {
    setLocked(!locked);
    changed(lock);
  });
  input.addEventListener("input", () => setLocked(input.value !== ""));
  setLocked(false);

  return {
    name: "seed",
    element: h(
      "div",
      { class: "field seed" },
      h("label", { for: input.id }, "Seed"),
      h("div", { class: "with-buttons" }, input, dice, lock),
      h("p", { id: "field-seed-help", class: "sr-only" }, "One number is one picture. Random unless it is locked."),
    ),
    get: () => (locked ? seedOf(input.value) : null),
    set: (value) => {
      input.value = value ?? "";
      setLocked(value !== null && value !== undefined);
    },
    show: (seed) => {
      if (!locked) input.value = seed;
    },
  };
}
