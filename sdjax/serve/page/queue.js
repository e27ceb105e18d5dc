/** The queue: a line for each request that waits or runs, with what went wrong. */

import { announce, byId, h, iconButton } from "./dom.js";

/** Shows the jobs, those of sheets apart. */
export class Queue {
  lines = new Map();

  /** @param {import("./jobs.js").Jobs} jobs */
  constructor(jobs) {
    this.jobs = jobs;
    jobs.addEventListener("change", ({ detail }) => detail.job.isOwn && this.show(detail.job));
    jobs.addEventListener("end", ({ detail }) => detail.job.isOwn && this.end(detail.job));
    byId("cancel-all").addEventListener("click", () => {
      for (const { job } of this.lines.values()) jobs.cancel(job);
    });
  }

  show(job) {
    if (!this.lines.has(job.id)) this.add(job);
    const line = this.lines.get(job.id);
    const { progress, state } = line;
    const { done, rows } = counted(job);
    const quarter = Math.floor((4 * done) / rows);
    if (quarter > line.quarter && quarter < 4) announce(`${25 * quarter} % of ${job.title}`);
    line.quarter = quarter;
    progress.value = done;
    progress.max = rows;
    state.textContent = described(job);
  }

  add(job) {
    const progress = h("progress", { max: 1, value: 0, "aria-label": `Progress: ${job.title}` });
    const state = h("span", { class: "state" });
    const close = iconButton("close", `Cancel: ${job.title}`, () => this.jobs.cancel(job));
    const title = h("span", { class: "prompt-text" }, job.title || "no prompt");
    const line = h("li", { class: "job" }, title, state, progress, close);
    this.lines.set(job.id, { job, line, progress, state, quarter: 0 });
    byId("jobs").append(line);
    this.update();
  }

  end(job) {
    const { line, state, progress } = this.lines.get(job.id) ?? {};
    if (!line) return;
    this.lines.delete(job.id);
    announce(said(job));
    if (line.contains(document.activeElement)) byId("pictures").focus();
    const problem = problemOf(job);
    if (!problem) line.remove();
    else {
      progress.remove();
      state.textContent = problem;
      line.classList.add("problem-line");
      line.lastChild.replaceWith(iconButton("close", "Dismiss", () => this.dismiss(line)));
    }
    this.update();
  }

  dismiss(line) {
    line.remove();
    this.update();
  }

  update() {
    byId("queue").hidden = !byId("jobs").childElementCount;
    byId("cancel-all").hidden = this.lines.size < 2;
  }
}

/** Rows that are done, and all of them. */
function counted({ pictures }) {
  const rows = pictures.map((picture) => picture.rows || 1);
  const done = pictures.map((picture, i) => (picture.url ? rows[i] : (picture.row ?? 0)));
  const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
  return { done: sum(done), rows: sum(rows) };
}

function described(job) {
  const { state, position, pictures, isLost } = job;
  if (isLost) return "The server does not answer; trying again";
  if (state === "cancelled") return "Cancelling";
  const isStarted = pictures.some(({ row, url }) => row || url);
  if (!isStarted) return position ? `Waiting behind ${counting(position)}` : "Waiting";
  const { done, rows } = counted(job);
  const count = pictures.length > 1 ? `, ${pictures.filter(({ url }) => url).length} of ${pictures.length} done` : "";
  return `${Math.floor((100 * done) / rows)} %${count}`;
}

function problemOf({ error, pictures }) {
  const found = error ?? pictures.find((picture) => picture.error)?.error;
  return found ? `Failed: ${found}` : (pictures.find(({ warning }) => warning)?.warning ?? null);
}

function said(job) {
  const count = job.pictures.filter(({ url }) => url).length;
  if (job.state === "cancelled") return "Cancelled";
  return problemOf(job) ?? `${counting(count)} done: ${job.title}`;
}

function counting(pictures) {
  return pictures === 1 ? "1 picture" : `${pictures} pictures`;
}
