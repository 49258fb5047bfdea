"use strict";
/* Shared by the elements of the page. */

export async function ask(path, body) {
  const options = body === undefined ? {} : { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(`/reelquant/${path}`, options);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error ?? `the server answered ${answer.status}`);
  return found;
}

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds >= 7200) return `${(seconds / 3600).toFixed(1)} h`;
  if (seconds >= 120) return `${Math.round(seconds / 60)} min`;
  return `${Math.max(1, Math.round(seconds))} s`;
}

export function progressText(job) {
  const part = job.parts > 1 ? `part ${job.part + 1} of ${job.parts}: ` : "";
  const steps = job.total > 1 ? `, ${job.done} of ${job.total}` : "";
  const left = job.left ? `, about ${duration(job.left)} left in this phase` : "";
  return `${part}${job.phase || "starting"}${steps}${left}`;
}

export const STYLE = `
  :host { display: block; contain: inline-size; font-family: inherit; color: var(--body-text-color); font-size: 14px; line-height: 1.5; }
  * { box-sizing: border-box; }
  p { margin: 0; }
  .quiet { color: var(--body-text-color-subdued); font-size: 13px; }
  button { font: inherit; font-size: 13px; padding: 4px 12px; border: 1px solid var(--border-color-primary); border-radius: 8px; cursor: pointer;
    background: var(--background-fill-primary); color: var(--body-text-color); }
  button:hover { border-color: var(--color-accent); }
  button[aria-pressed="true"] { background: var(--color-accent-soft); border-color: var(--color-accent); }
  button:disabled { opacity: 0.5; cursor: default; }
  :focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
  progress { width: 100%; height: 8px; accent-color: var(--color-accent); display: block; }
  input[type="range"] { accent-color: var(--color-accent); cursor: pointer; margin: 0; height: 28px; }
`;
