/** Fields that are pictures: chosen, dropped, or sent from the gallery. Their values are data URLs. */

import { announce, changed, h, iconButton } from "./dom.js";
import { labelOf } from "./layout.js";

const CHOOSE = "Choose or drop";

/**
 * The field of a picture.
 * @param {import("./fields.js").Spec} spec
 * @param {string} [id]
 * @param {string} [label]
 */
export function pictureField(spec, id = `field-${spec.name}`, label = labelOf(spec.name)) {
  const input = h("input", { type: "file", accept: "image/*", id, class: "sr-only", "aria-describedby": `${id}-help` });
  const image = h("img", { alt: `${label} chosen`, hidden: true });
  const remove = iconButton("close", `Remove: ${label}`, () => {
    set(null);
    changed(input);
    input.focus();
  });
  const choose = h("label", { for: id, class: "choose" }, CHOOSE);
  const well = h("div", { class: "well" }, input, choose, image, remove);
  let value = null;

  function set(url) {
    value = url ?? null;
    image.hidden = remove.hidden = !value;
    well.classList.toggle("filled", Boolean(value));
    if (value) image.src = value;
    else image.removeAttribute("src");
    input.value = "";
  }

  async function take(file) {
    const url = await dataUrl(file);
    const isPicture = await decoded(url).then(() => true, () => false);
    set(isPicture ? url : null);
    choose.textContent = isPicture ? CHOOSE : "That is no picture";
    changed(input);
    announce(`${label}: ${isPicture ? file.name : choose.textContent}`);
  }

  input.addEventListener("change", () => input.files[0] && take(input.files[0]));
  droppable(well, take);
  set(null);
  return {
    name: spec.name,
    element: h(
      "div",
      { class: "field picture" },
      h("span", { class: "label" }, label),
      well,
      h("p", { id: `${id}-help`, class: "sr-only" }, spec.help),
    ),
    input,
    get: () => value,
    set,
  };
}

/**
 * The field of so many pictures.
 * @param {import("./fields.js").Spec} spec
 * @param {number} count
 */
export function picturesField(spec, count) {
  const [id, label] = [`field-${spec.name}`, labelOf(spec.name)];
  const rest = Array.from({ length: count - 1 }, (_, i) => pictureField(spec, `${id}-${i + 2}`, `${label} ${i + 2}`));
  const fields = [pictureField(spec), ...rest];
  return {
    name: spec.name,
    element: h("div", { class: "wells" }, ...fields.map((field) => field.element)),
    get: () => {
      const found = fields.map((field) => field.get()).filter(Boolean);
      return found.length ? found : null;
    },
    set: (values) => fields.forEach((field, i) => field.set([values ?? []].flat()[i] ?? null)),
  };
}

/** Takes a picture that is dropped on an element, before the page does. */
function droppable(element, take) {
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    const file = pictureOf(event.dataTransfer);
    if (!file) return;
    event.preventDefault();
    event.stopPropagation();
    take(file);
  });
}

/**
 * The first picture among what is dropped or pasted.
 * @param {DataTransfer} transfer
 * @returns {File|undefined}
 */
export function pictureOf(transfer) {
  return [...(transfer?.files ?? [])].find((file) => file.type.startsWith("image/"));
}

/**
 * A file as a data URL.
 * @param {Blob} file
 * @returns {Promise<string>}
 */
export function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/**
 * The decoded picture of an address.
 * @param {string} url
 * @returns {Promise<HTMLImageElement>}
 */
export async function decoded(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}
