"use strict";
/* <rq-player number="...">: a float and a quantized clip, frame by frame on one canvas, so that they cannot drift apart. */
import { STYLE, ask, element, progressText } from "/reelquant/assets/page.js";

const PAUSE = 700;
const GAP = 12; // pixels between two pictures, of a clip of 192 pixels
const SHORT = 256; // clips below are drawn with hard pixels
const SIDES = ["float", "quantized"];
const MODES = { side: "Side by side", wipe: "Wipe", blind: "Blind test" };
const CHOICES = { left: "Left looks better", same: "No difference", right: "Right looks better" };
const PLAY = "▶", PAUSED = "❚❚";

function picture(address) {
  return new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("a frame cannot be read; make the clips again"));
    image.src = address;
  });
}

class Player extends HTMLElement {
  static observedAttributes = ["number"];

  connectedCallback() {
    if (!this.root) this.build();
    this.open();
  }

  attributeChangedCallback() {
    if (this.root && this.isConnected) this.open();
  }

  disconnectedCallback() {
    clearTimeout(this.timer);
    this.playing = false;
  }

  // ----------------------------------------------------------------------------------------------------------- elements

  build() {
    this.root = this.attachShadow({ mode: "open" });
    const style = `${STYLE}
      .box { border: 1px solid var(--border-color-primary); border-radius: 12px; padding: 16px; background: var(--background-fill-primary); }
      [hidden] { display: none !important; }
      h3 { margin: 0 0 2px; font-size: 16px; font-weight: 600; overflow-wrap: anywhere; }
      .modes, .choices { display: flex; flex-wrap: wrap; gap: 6px; margin: 12px 0; }
      .choices { justify-content: center; }
      .stage { display: grid; place-items: center; background: var(--background-fill-secondary); border-radius: 8px; overflow: hidden; }
      canvas { display: block; width: 100%; height: auto; touch-action: pan-y; }
      canvas.sharp { image-rendering: pixelated; }
      .names { display: grid; grid-template-columns: 1fr 1fr; text-align: center; margin-top: 6px; }
      .line { display: flex; align-items: center; gap: 10px; margin-top: 10px; }
      .line input { flex: 1; min-width: 60px; } .line output { min-width: 6ch; text-align: right; font-variant-numeric: tabular-nums; }
      .line button { width: 38px; height: 34px; padding: 0; }
      .line .play { background: var(--color-accent); color: #fff; border-color: var(--color-accent); }
      .verdict { text-align: center; margin-top: 8px; min-height: 3em; }
      .trouble { color: var(--rq-bad); } progress { margin: 10px 0 6px; }`;
    this.head = element("h3");
    this.about = element("p", { className: "quiet" });
    this.wait = element("div", {}, (this.bar = element("progress")), (this.words = element("p", { className: "quiet", role: "status" })));
    this.trouble = element("p", { className: "trouble", role: "alert" });
    this.ready = element("div", { hidden: true }, this.modes(), this.view(), this.transport(), this.wiper(), this.test());
    const box = element("div", { className: "box", tabIndex: 0, onkeydown: (event) => this.key(event) }, this.head, this.about, this.trouble);
    box.append(this.wait, this.ready);
    this.root.append(element("style", { textContent: style }), box);
  }

  modes() {
    this.buttons = Object.entries(MODES).map(([mode, words]) => {
      const button = element("button", { type: "button", textContent: words, onclick: () => this.choose(mode) });
      button.dataset.mode = mode;
      return button;
    });
    return element("div", { className: "modes", role: "group", ariaLabel: "How to look" }, ...this.buttons);
  }

  view() {
    const drag = (event) => this.drag(event);
    this.canvas = element("canvas", { onpointerdown: drag, onpointermove: drag });
    this.names = ["", ""].map(() => element("span", { className: "quiet" }));
    this.named = element("div", { className: "names" }, ...this.names);
    return element("div", {}, element("div", { className: "stage" }, this.canvas), this.named);
  }

  transport() {
    this.play = element("button", { type: "button", className: "play", ariaLabel: "Play", textContent: PLAY, onclick: () => this.toggle() });
    this.scrub = element("input", { type: "range", min: 0, value: 0, ariaLabel: "Frame of both clips", oninput: () => this.step(Number(this.scrub.value) - this.frame) });
    this.scrub.id = "scrub";
    this.where = element("output");
    const back = element("button", { type: "button", ariaLabel: "One frame back", textContent: "‹", onclick: () => this.step(-1) });
    const forth = element("button", { type: "button", ariaLabel: "One frame on", textContent: "›", onclick: () => this.step(1) });
    return element("div", { className: "line" }, back, this.play, forth, this.scrub, this.where);
  }

  wiper() {
    this.wipe = element("input", { type: "range", min: 0, max: 1000, value: 500, ariaLabel: "Where float ends and quantized begins", oninput: () => this.draw() });
    this.wipe.id = "wipe";
    return (this.wiping = element("label", { className: "line" }, "float", this.wipe, "quantized"));
  }

  test() {
    this.choices = Object.entries(CHOICES).map(([side, words]) => {
      const button = element("button", { type: "button", textContent: words, onclick: () => this.vote(side) });
      button.dataset.choice = side;
      return button;
    });
    this.next = element("button", { type: "button", textContent: "Next round", hidden: true, onclick: () => this.shuffle() });
    this.next.dataset.choice = "next";
    this.verdict = element("p", { className: "verdict quiet", role: "status" });
    return (this.testing = element("div", {}, element("div", { className: "choices" }, ...this.choices, this.next), this.verdict));
  }

  // --------------------------------------------------------------------------------------------------------------- clips

  async open() {
    clearTimeout(this.timer);
    const number = this.getAttribute("number");
    if (this.number !== number) {
      Object.assign(this, { number, pictures: null, frame: 0, playing: false });
      this.ready.hidden = true;
      this.wait.hidden = false;
    }
    if (!number || this.pictures) return;
    try {
      const found = await ask(`comparisons/${number}`);
      if (number !== this.number) return;
      this.tell(found);
      if (found.job?.open) this.timer = setTimeout(() => this.open(), PAUSE);
      else if (found.job && found.job.state !== "done") throw new Error(`${found.job.state}: ${found.job.said}`);
      else await this.load(found);
    } catch (error) {
      this.wait.hidden = true;
      this.trouble.textContent = error.message;
    }
  }

  tell(found) {
    this.found = found;
    this.trouble.textContent = "";
    this.head.textContent = found.prompt || "no text";
    const steps = found.steps ? `, ${found.steps} steps` : "";
    this.about.textContent = `${found.float} and ${found.quantized}, seed ${found.seed}${steps}`.replaceAll("./", "");
    if (!found.job?.open) return;
    this.words.textContent = found.job.state === "waiting" ? "waits for the jobs before it" : progressText(found.job);
    const whole = Math.max(found.job.total, 1);
    Object.assign(this.bar, { max: whole * found.job.parts, value: found.job.part * whole + found.job.done });
  }

  async load(found) {
    if (!found.frames) throw new Error("the clips have no frames; make them again");
    this.words.textContent = "loading frames";
    const places = [...Array(found.frames).keys()];
    const clips = SIDES.map((side) => Promise.all(places.map((place) => picture(`/reelquant/comparisons/${found.number}/${side}/${place}`))));
    const pictures = await Promise.all(clips);
    if (found.number !== this.number) return;
    Object.assign(this, { pictures, frame: 0 });
    this.scrub.max = found.frames - 1;
    this.canvas.classList.toggle("sharp", pictures[0][0].width < SHORT);
    this.wait.hidden = true;
    this.ready.hidden = false;
    this.choose("side");
  }

  // --------------------------------------------------------------------------------------------------------------- looks

  choose(mode) {
    this.mode = mode;
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    this.wiping.hidden = mode !== "wipe";
    this.testing.hidden = mode !== "blind";
    this.named.hidden = mode === "wipe";
    this.order = [0, 1];
    if (mode === "blind") this.shuffle();
    else this.draw();
  }

  draw() {
    if (!this.pictures) return;
    const [one, two] = this.order.map((side) => this.pictures[side][this.frame]);
    const scale = one.width < SHORT ? Math.ceil(SHORT / one.width) : 1; // whole pixels
    const [width, height] = [one.width * scale, one.height * scale];
    const gap = Math.round((GAP * width) / 192);
    const whole = this.mode === "wipe" ? width : 2 * width + gap;
    if (this.canvas.width !== whole || this.canvas.height !== height) Object.assign(this.canvas, { width: whole, height });
    this.canvas.style.maxWidth = `${(64 * whole) / height}vh`;
    const context = this.canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, whole, height);
    if (this.mode === "wipe") this.drawWipe(context, one, two, width, height);
    else {
      context.drawImage(one, 0, 0, width, height);
      context.drawImage(two, width + gap, 0, width, height);
    }
    this.names.forEach((name, place) => (name.textContent = this.name(place)));
    this.scrub.value = this.frame;
    this.where.textContent = `${this.frame + 1} / ${this.found.frames}`;
    this.dataset.frame = this.frame;
  }

  drawWipe(context, one, two, width, height) {
    const at = Math.round((width * Number(this.wipe.value)) / 1000);
    context.drawImage(two, 0, 0, width, height);
    context.save();
    context.beginPath();
    context.rect(0, 0, at, height);
    context.clip();
    context.drawImage(one, 0, 0, width, height);
    context.restore();
    const line = Math.max(1, Math.round(width / 256)); // dark and light: seen on every picture
    context.fillStyle = "#000";
    context.fillRect(at - line, 0, line, height);
    context.fillStyle = "#fff";
    context.fillRect(at, 0, line, height);
  }

  name(place) {
    if (this.mode === "blind" && !this.revealed) return place ? "right" : "left";
    return SIDES[this.order[place]];
  }

  drag(event) {
    if (this.mode !== "wipe" || !(event.buttons & 1)) return;
    const box = this.canvas.getBoundingClientRect();
    this.wipe.value = Math.round((1000 * (event.clientX - box.left)) / box.width);
    this.draw();
  }

  // ------------------------------------------------------------------------------------------------------------ playback

  step(by) {
    this.stop();
    this.go(this.frame + by);
  }

  go(frame) {
    const count = this.found.frames;
    this.frame = (frame + count) % count;
    this.draw();
  }

  stop() {
    this.playing = false;
    this.play.textContent = PLAY;
    this.play.ariaLabel = "Play";
  }

  toggle() {
    if (this.playing) return this.stop();
    this.playing = true;
    this.play.textContent = PAUSED;
    this.play.ariaLabel = "Pause";
    let since = performance.now();
    const tick = (now) => {
      if (!this.playing || !this.pictures) return;
      if (now - since >= 1000 / this.found.fps) {
        since = now;
        this.go(this.frame + 1);
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  key(event) {
    if (!this.pictures || event.target.matches("input, button") || event.ctrlKey || event.metaKey || event.altKey) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) this.step(by);
    else if (event.key === " ") this.toggle();
    else return;
    event.preventDefault();
  }

  // ---------------------------------------------------------------------------------------------------------- blind test

  shuffle() {
    this.revealed = false;
    const [coin] = crypto.getRandomValues(new Uint8Array(1));
    this.order = coin & 1 ? [1, 0] : [0, 1];
    this.verdict.textContent = "One of these is float, the other quantized. Which looks better?";
    this.offer(true);
    this.draw();
  }

  offer(open) {
    for (const button of this.choices) button.hidden = !open;
    this.next.hidden = open;
  }

  async vote(side) {
    const picked = side === "same" ? "same" : SIDES[this.order[side === "left" ? 0 : 1]];
    try {
      const tally = await ask(`comparisons/${this.number}/votes`, { picked });
      this.revealed = true;
      this.offer(false);
      this.draw();
      this.verdict.textContent = `${{ float: "You picked float.", quantized: "You picked quantized.", same: "You saw no difference." }[picked]} ${this.sum(tally)}`;
    } catch (error) {
      this.verdict.textContent = error.message;
    }
  }

  sum(tally) {
    const counts = `So far, on all clips of these two models: float ${tally.float}, quantized ${tally.quantized}, no difference ${tally.same}.`;
    if (tally.chance === null) return counts;
    return `${counts} Chance alone splits votes so unevenly in ${Math.max(1, Math.round(100 * tally.chance))} % of cases.`;
  }
}

customElements.define("rq-player", Player);
