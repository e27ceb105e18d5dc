/** Elements, and what is said to screen readers. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element with properties and children. Functions named on… are listeners; true is an attribute without a value;
 * null, undefined and false are left out.
 * @param {string} tag
 * @param {Object<string, any>} [properties]
 * @param {...(Node|string|null|undefined|false)} children
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/**
 * A picture from the sprite of the page, for the eye alone.
 * @param {string} name
 * @returns {SVGElement}
 */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/**
 * A button with an icon, named for all.
 * @param {string} name of the icon
 * @param {string} label
 * @param {() => void} onclick
 * @returns {HTMLElement}
 */
export function iconButton(name, label, onclick) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick }, icon(name));
}

/**
 * The element of an id.
 * @param {string} id
 * @returns {HTMLElement}
 */
export function byId(id) {
  return document.getElementById(id);
}

/**
 * Says a text to screen readers, when they have said the last one.
 * @param {string} text
 */
export function announce(text) {
  byId("announcer").textContent = text;
}

/**
 * Tells the page that a value was changed by a program, as if it were typed.
 * @param {HTMLElement} element
 */
export function changed(element) {
  element.dispatchEvent(new Event("input", { bubbles: true }));
}

/**
 * A folded part of the form, whose title says, where it is so, that it is in use.
 * @param {string} id
 * @param {string} title
 * @param {...Node} children
 */
export function folded(id, title, ...children) {
  const used = h("span", { class: "used", hidden: true }, "in use");
  return h("details", { id, class: "part" }, h("summary", {}, title, used), ...children);
}
