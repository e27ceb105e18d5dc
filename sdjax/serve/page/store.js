/** What outlives a reload: small values in localStorage, pictures and sheets in IndexedDB. */

const PREFIX = "sdjax.";
const SHELF = "values";

/**
 * A small value, or the fallback where there is none.
 * @param {string} name
 * @param {any} fallback
 */
export function recall(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name)) ?? fallback;
  } catch {
    return fallback;
  }
}

/**
 * Keeps a small value; null forgets it. A browser that keeps nothing is no error.
 * @param {string} name
 * @param {any} value
 */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // private windows, or a full disk
  }
}

/**
 * A large value, or undefined.
 * @param {string} name
 * @returns {Promise<any>}
 */
export async function recallLarge(name) {
  return request("readonly", (shelf) => shelf.get(name));
}

/**
 * Keeps a large value; undefined forgets it.
 * @param {string} name
 * @param {any} value
 */
export async function keepLarge(name, value) {
  await request("readwrite", (shelf) => (value === undefined ? shelf.delete(name) : shelf.put(value, name)));
}

/**
 * All large values whose names begin so, in the order of their names.
 * @param {string} start
 * @returns {Promise<any[]>}
 */
export async function recallAll(start) {
  return (await request("readonly", (shelf) => shelf.getAll(IDBKeyRange.bound(start, `${start}\uffff`)))) ?? [];
}

async function request(mode, ask) {
  try {
    const database = await opened();
    return await promised(ask(database.transaction(SHELF, mode).objectStore(SHELF)));
  } catch {
    return undefined; // private windows of some browsers
  }
}

let database = null;

function opened() {
  if (!database) {
    const opening = indexedDB.open("sdjax", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore(SHELF);
    database = promised(opening);
  }
  return database;
}

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
