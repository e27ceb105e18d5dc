/** Requests that wait or run: asked for, followed, cancelled, and picked up again after a reload. */

import * as api from "./api.js";
import { keep, recall } from "./store.js";

const ENDED = ["done", "failed", "cancelled"];
const PAUSE = 1000; // milliseconds before a broken stream is opened again

/**
 * @typedef {object} Job
 * @property {string} id
 * @property {string} title the prompt
 * @property {number} width
 * @property {number} height
 * @property {boolean} isOwn whether it is shown by itself, not as a part of a sheet
 * @property {"queued"|"running"|"done"|"failed"|"cancelled"} state
 * @property {number} position how many pictures wait before it
 * @property {Array<object>} pictures as the server describes them, with `preview`, a data URL
 * @property {string} [error]
 * @property {boolean} [isLost] whether the server does not answer now
 */

/** Events: `change` and `end` of a job, `picture` of one that is done; detail: {job, index?}. */
export class Jobs extends EventTarget {
  jobs = new Map();

  /**
   * Asks for pictures, and follows them.
   * @param {object} body
   * @param {boolean} isOwn whether it is shown by itself, not as a part of a sheet
   * @returns {Promise<Job>}
   */
  async submit(body, isOwn = true) {
    const { id, seeds } = await api.submit(body);
    const { prompt: title, width = 1, height = 1 } = body;
    const kept = { id, title, width, height, isOwn };
    if (isOwn) this.remember(kept);
    return this.start(kept, seeds);
  }

  /** Goes on with what was under way when the page was left. */
  async resume() {
    for (const kept of recall("jobs", [])) await this.resumeOne(kept);
  }

  /**
   * Follows a request that was asked for earlier.
   * @param {{id: string, title: string, isOwn: boolean}} kept
   * @returns {Promise<boolean>} whether the server still knows it
   */
  async resumeOne(kept) {
    try {
      const { pictures } = await api.state(kept.id);
      this.start(kept, pictures.map(({ seed }) => seed));
      return true;
    } catch {
      this.forget(kept.id);
      return false;
    }
  }

  /** @param {Job} job */
  async cancel(job) {
    job.state = "cancelled";
    this.tell("change", job);
    await api.cancel(job.id).catch(() => {}); // it may have ended by itself
  }

  start(kept, seeds) {
    const job = { ...kept, state: "queued", position: 0, pictures: seeds.map((seed) => ({ seed })) };
    this.jobs.set(job.id, job);
    this.tell("change", job);
    this.follow(job);
    return job;
  }

  async follow(job) {
    while (!ENDED.includes(job.state)) {
      try {
        for await (const event of api.events(job.id)) this.apply(job, event);
        if (!ENDED.includes(job.state)) await this.ask(job);
      } catch (error) {
        if (error.status < 500) Object.assign(job, { state: "failed", error: error.message });
        else await this.lost(job); // also where there was no answer
      }
    }
    this.forget(job.id);
    this.tell("end", job);
  }

  async lost(job) {
    job.isLost = true;
    this.tell("change", job);
    await pause();
  }

  /** Asks for the state, where a stream has ended without saying how. */
  async ask(job) {
    this.update(job, await api.state(job.id));
    if (!ENDED.includes(job.state)) await pause();
  }

  apply(job, { type, data }) {
    job.isLost = false;
    if (type === "progress" || type === "done") this.update(job, data);
    if (type === "preview") job.pictures[data.index].preview = data.image;
    if (type === "picture") this.finish(job, data);
    this.tell("change", job);
  }

  update(job, { state, position, pictures = [] }) {
    if (job.state !== "cancelled") Object.assign(job, { state: state ?? job.state, position });
    pictures.forEach((picture, index) => {
      if (picture.url) this.finish(job, { index, ...picture });
      Object.assign(job.pictures[index], picture);
    });
  }

  /** A picture is done; said once. */
  finish(job, { index, url, settings }) {
    const picture = job.pictures[index];
    if (picture.isTold) return;
    Object.assign(picture, { url, settings, state: "done", isTold: true });
    this.tell("picture", job, index);
  }

  /** What a reload needs of a job; other windows keep theirs in the same list. */
  remember(kept) {
    keep("jobs", [...recall("jobs", []), kept]);
  }

  forget(id) {
    this.jobs.delete(id);
    keep("jobs", recall("jobs", []).filter((kept) => kept.id !== id));
  }

  tell(type, job, index) {
    this.dispatchEvent(new CustomEvent(type, { detail: { job, index } }));
  }
}

function pause() {
  return new Promise((resolve) => setTimeout(resolve, PAUSE));
}
