"use strict";
/* <rq-jobs>: the queue, asked for once a second. Rows stay in place, so that a button does not move away under the pointer. */
import { STYLE, ask, duration, element, progressText } from "/reelquant/assets/page.js";

const PAUSE = 1000;
const WORDS = { quantize: "Quantize", compare: "Compare", evaluate: "Evaluate" };
const ACTS = [
  ["cancel", "Cancel", (job) => job.open],
  ["again", "Start again", (job) => job.again],
  ["forget", "Remove", (job) => !job.open],
];

class Row {
  constructor(number, act) {
    this.state = element("span", { className: "state" });
    this.title = element("b");
    this.bar = element("progress");
    this.words = element("p", { className: "quiet words" });
    this.buttons = ACTS.map(([name, words, when]) => {
      const button = element("button", { type: "button", textContent: words, onclick: () => act(number, name) });
      return { button, when };
    });
    const acts = element("span", { className: "acts" }, ...this.buttons.map((one) => one.button));
    this.root = element("li", {}, element("div", { className: "head" }, this.state, this.title), this.bar, this.words, acts);
    this.root.dataset.number = number;
  }

  show(job) {
    this.root.dataset.state = job.state;
    this.state.textContent = job.state;
    this.title.textContent = `${WORDS[job.kind]} ${job.title}`;
    this.bar.hidden = job.state !== "running";
    const whole = Math.max(job.total, 1) * job.parts;
    this.bar.max = whole;
    this.bar.value = Math.min(whole, job.part * Math.max(job.total, 1) + job.done);
    const took = job.took === null ? "" : ` (${duration(job.took)})`;
    const words = { running: progressText(job), waiting: "waits for the jobs before it" }[job.state] ?? job.said;
    if (this.words.textContent !== words + took) this.words.textContent = words + took;
    for (const { button, when } of this.buttons) button.hidden = !when(job);
  }
}

class Jobs extends HTMLElement {
  connectedCallback() {
    if (this.list) return this.poll();
    const root = this.attachShadow({ mode: "open" });
    const style = `${STYLE}
      ul { list-style: none; margin: 0; padding: 0; display: grid; gap: 10px; }
      li { padding: 12px 14px; border: 1px solid var(--border-color-primary); border-radius: 10px; background: var(--background-fill-primary); min-width: 0; }
      .head { display: flex; gap: 4px 10px; align-items: baseline; flex-wrap: wrap; }
      .head b { font-weight: 600; overflow-wrap: anywhere; }
      .state { font-size: 12px; padding: 0 9px; border-radius: 20px; background: var(--background-fill-secondary); color: var(--body-text-color-subdued); }
      [data-state="running"] .state { background: var(--color-accent-soft); color: var(--body-text-color); }
      [data-state="done"] .state { background: #1a7f4b22; color: var(--rq-good); }
      [data-state="failed"] .state { background: #b3261e22; color: var(--rq-bad); }
      [data-state="interrupted"] .state, [data-state="cancelled"] .state { background: #8a5a0022; color: var(--rq-warn); }
      progress { margin: 8px 0 4px; } progress[hidden], button[hidden] { display: none; }
      .words { overflow-wrap: anywhere; margin: 2px 0 8px; }
      .acts { display: flex; gap: 6px; flex-wrap: wrap; }
      .trouble { color: var(--rq-bad); }`;
    this.empty = element("p", { className: "quiet", textContent: "No jobs yet. They run one after the other and outlive a reload of this page." });
    this.trouble = element("p", { className: "trouble", hidden: true, role: "status" });
    this.list = element("ul");
    root.append(element("style", { textContent: style }), this.trouble, this.empty, this.list);
    this.rows = new Map();
    this.poll();
  }

  disconnectedCallback() {
    clearTimeout(this.timer);
  }

  async poll() {
    clearTimeout(this.timer);
    try {
      this.show(await ask("jobs"));
      this.say("");
    } catch {
      this.say("The server does not answer. Is it still running?");
    }
    if (this.isConnected) this.timer = setTimeout(() => this.poll(), PAUSE);
  }

  async act(number, name) {
    try {
      await ask(`jobs/${number}/${name}`, {});
      await this.poll();
    } catch (error) {
      this.say(error.message);
    }
  }

  say(words) {
    this.trouble.textContent = words;
    this.trouble.hidden = !words;
  }

  show(jobs) {
    this.empty.hidden = jobs.length > 0;
    const numbers = new Set(jobs.map((job) => job.number));
    for (const [number, row] of this.rows) {
      if (numbers.has(number)) continue;
      row.root.remove();
      this.rows.delete(number);
    }
    let ended = false;
    for (const job of jobs) {
      const known = this.rows.get(job.number);
      const row = known ?? new Row(job.number, (...what) => this.act(...what));
      ended ||= known !== undefined && ["waiting", "running"].includes(row.root.dataset.state) && !job.open;
      this.rows.set(job.number, row);
      row.show(job);
      if (!known) this.list.prepend(row.root); // the newest is on top
    }
    if (ended) document.getElementById("rq-refresh")?.click(); // what it made can be chosen now
  }
}

customElements.define("rq-jobs", Jobs);
