/** The server's native API. Addresses are relative to the page, so that it works behind a proxy too. */

import { byId } from "./dom.js";
import { keep, recall } from "./store.js";

/** What the server said was wrong. */
export class ApiError extends Error {
  /**
   * @param {number} status
   * @param {string} detail
   * @param {number} retryAfter seconds, where the server is busy
   */
  constructor(status, detail, retryAfter = 1) {
    super(detail);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** @returns {Promise<object>} what the server and its model can do */
export const capabilities = () => json("GET", "capabilities");

/**
 * Asks for pictures.
 * @param {object} body the fields of a request, and how many
 * @returns {Promise<{id: string, seeds: number[]}>}
 */
export const submit = (body) => json("POST", "requests", JSON.stringify(body), "application/json");

/** @param {string} id */
export const state = (id) => json("GET", `requests/${id}`);

/** @param {string} id */
export const cancel = (id) => json("DELETE", `requests/${id}`);

/**
 * A page of the gallery, newest first.
 * @param {number} page
 * @param {number} size
 * @returns {Promise<{pictures: object[], total: number}>}
 */
export const pictures = (page, size) => json("GET", `pictures?page=${page}&size=${size}`);

/**
 * The settings that a picture file carries, as fields.
 * @param {Blob} file
 */
export const settings = (file) => json("POST", "settings", file, file.type || "image/png");

/**
 * What happens to a request, until it is done: {type, data}.
 * @param {string} id
 * @param {AbortSignal} signal
 */
export async function* events(id, signal) {
  const response = await call("GET", `requests/${id}/events?previews=1`, { signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const parts = (text + chunk.value).split(/\r?\n\r?\n/);
    text = parts.pop();
    for (const part of parts) {
      const event = parsed(part);
      if (event) yield event;
    }
  }
}

function parsed(part) {
  const lines = part.split(/\r?\n/);
  const values = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trim());
  const data = values("data:").join("\n");
  return data ? { type: values("event:")[0] ?? "message", data: read(data) } : null;
}

/** JSON; seeds that a number does not hold are texts. */
function read(text) {
  return JSON.parse(text, (_, value, context) => {
    const isLost = Number.isInteger(value) && !Number.isSafeInteger(value) && /^\d+$/.test(context?.source);
    return isLost ? context.source : value;
  });
}

/**
 * The file of a picture.
 * @param {string} url as the server gave it
 * @returns {Promise<Blob>}
 */
export async function pictureFile(url) {
  return (await call("GET", relative(url))).blob();
}

const objectUrls = new Map();

/**
 * An address of a picture for <img>, which cannot send the key.
 * @param {string} url as the server gave it
 * @returns {Promise<string>}
 */
export async function pictureSource(url) {
  if (!key()) return relative(url);
  if (!objectUrls.has(url)) objectUrls.set(url, pictureFile(url).then((file) => URL.createObjectURL(file)));
  return objectUrls.get(url);
}

function relative(url) {
  return url.replace(/^\//, "");
}

async function json(method, path, body, type) {
  const response = await call(method, path, { body, headers: type ? { "Content-Type": type } : {} });
  return response.status === 204 ? null : read(await response.text());
}

async function call(method, path, options = {}) {
  const sent = key();
  const headers = { ...options.headers, ...(sent ? { Authorization: `Bearer ${sent}` } : {}) };
  const response = await fetch(path, { ...options, method, headers });
  if (response.ok) return response;
  if (response.status === 401) {
    await askForKey(sent);
    return call(method, path, options);
  }
  throw new ApiError(response.status, await detail(response), Number(response.headers.get("Retry-After")) || 1);
}

async function detail(response) {
  try {
    const { detail } = await response.json();
    return typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    return `The server answered ${response.status} ${response.statusText}`;
  }
}

let typed = ""; // for browsers that keep nothing
const key = () => recall("key", typed);

let asking = null;

/** Opens the dialog, once for all calls that wait for it, unless the key has changed since it was sent. */
function askForKey(sent) {
  if (key() !== sent) return Promise.resolve();
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    const input = byId("key");
    input.value = "";
    byId("key-title").textContent = sent ? "This server has another key" : "This server asks for its key";
    dialog.oncancel = (event) => event.preventDefault();
    dialog.onclose = () => {
      typed = input.value;
      keep("key", typed);
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
