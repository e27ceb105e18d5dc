/** What the server says of its APIs, openapi.json, as a page. */

import { byId, h } from "./dom.js";
import { recall } from "./store.js";

async function description() {
  const key = recall("key", "");
  const response = await fetch("openapi.json", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (response.status === 401) throw new Error("The key is needed: open the page of the server and enter it there");
  if (!response.ok) throw new Error(`The server answered ${response.status}`);
  return response.json();
}

/** A section for each tag, in the order in which they come. */
function sections({ paths }) {
  const tags = new Map();
  for (const [path, methods] of Object.entries(paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const [tag] = operation.tags ?? ["other"];
      tags.set(tag, [...(tags.get(tag) ?? []), operationOf(method.toUpperCase(), path, operation)]);
    }
  }
  return [...tags].map(([tag, operations]) => h("section", {}, h("h2", {}, tag), ...operations));
}

function operationOf(method, path, operation) {
  const [kind, { schema }] = Object.entries(operation.requestBody?.content ?? {})[0] ?? ["", {}];
  const title = h("code", {}, h("b", {}, method), ` ${path}`);
  const parts = [
    fieldsOf("Parameters", (operation.parameters ?? []).map((own) => [own.name, own.schema, own.required])),
    fieldsOf(kind, Object.entries(schema?.properties ?? {}).map(([name, own]) => [name, own, isNeeded(schema, name)])),
    h("pre", {}, commandOf(method, path, kind, schema)),
  ];
  const summary = h("summary", {}, title, h("span", { class: "help" }, operation.description ?? ""));
  return h("details", { class: "part", id: `${method}${path}` }, summary, ...parts);
}

function isNeeded(schema, name) {
  return schema.required?.includes(name);
}

/** A table of fields: [name, schema, whether it is needed]. */
function fieldsOf(caption, fields) {
  if (!fields.length) return null;
  const head = h("tr", {}, ...["Name", "Type", "Default", ""].map((text) => h("th", { scope: "col" }, text)));
  const rows = fields.map(([name, schema, isNeeded]) => {
    const initial = isNeeded ? "needed" : written(schema.default);
    const cells = [typeOf(schema), initial, schema.description ?? ""].map((text) => h("td", {}, text));
    return h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)), ...cells);
  });
  const table = h("table", {}, h("caption", {}, caption), h("thead", {}, head), h("tbody", {}, ...rows));
  return h("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": caption }, table);
}

function typeOf({ type, enum: choices, minimum, maximum, contentEncoding, anyOf }) {
  if (choices) return choices.filter((choice) => choice !== null).join(", ");
  const names = [type ?? (anyOf ?? []).map((own) => own.type)].flat().filter((name) => name && name !== "null");
  const range = [minimum, maximum].some((end) => end !== undefined) ? ` ${minimum ?? ""}…${maximum ?? ""}` : "";
  return names.join(" or ") + range + (contentEncoding ? `, ${contentEncoding}` : "");
}

function written(value) {
  return value === undefined ? "" : JSON.stringify(value);
}

/** How a shell asks for it, with what is needed. */
function commandOf(method, path, kind, schema) {
  const words = ["curl", ...(method === "GET" || kind ? [] : ["-X", method]), new URL(`.${path}`, document.baseURI).href];
  if (recall("key", "")) words.push("-H 'Authorization: Bearer …'");
  if (kind === "image/png") words.push("--data-binary @picture.png");
  if (kind === "multipart/form-data") words.push(...(schema.required ?? []).map((name) => `-F ${name}=${formValue(name)}`));
  if (kind === "application/json") words.push(`-d '${JSON.stringify(example(schema))}'`);
  return words.join(" ");
}

function formValue(name) {
  return name === "image" ? "@picture.png" : "'a goose'";
}

function example({ properties, required = [] }) {
  const names = required.length ? required : Object.keys(properties).slice(0, 1);
  return Object.fromEntries(names.map((name) => [name, properties[name].default ?? "a goose"]));
}

function filter() {
  const words = byId("filter").value.toLowerCase().split(/\s+/);
  for (const part of document.querySelectorAll("#apis details")) {
    const text = part.textContent.toLowerCase();
    part.hidden = !words.every((word) => text.includes(word));
  }
  for (const section of document.querySelectorAll("#apis section")) {
    section.hidden = !section.querySelector("details:not([hidden])");
  }
}

try {
  byId("apis").replaceChildren(...sections(await description()));
  byId("filter").addEventListener("input", filter);
} catch (error) {
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
}
