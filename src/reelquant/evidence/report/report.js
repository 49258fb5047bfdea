"use strict";
const report = (() => {
  const $ = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll("article.clip")];
  const state = { frame: 0, playing: false, speed: 1, large: null, mode: "wipe", blind: null, onDraw: () => {} };

  // ------------------------------------------------------------------------------------------------------------- one clip

  /* A clip is one video with its pictures in a row, drawn to a canvas each: they cannot drift apart. It is loaded when it comes
     near the window and released when it leaves, because browsers allow only some dozens of videos at a time. Frames of small clips
     are kept once they were decoded, so that playing does not wait for seeks after the first round. */
  const KEPT_BYTES = 24e6;

  class Clip {
    constructor(card, fps) {
      this.card = card;
      this.fps = fps;
      for (const key of ["frames", "width", "height", "stride", "count"]) this[key] = Number(card.dataset[key]);
      this.canvases = [...card.querySelectorAll("canvas")];
      this.cursors = [...card.querySelectorAll(".cursor")];
      this.figures = JSON.parse(card.dataset.figures);
      this.source = card.querySelector("script.video");
      this.video = this.picture = null;
      this.shown = this.wanted = -1;
      this.busy = false;
      this.kept = [];
      this.keeps = 4 * this.count * this.stride * this.height * this.frames <= KEPT_BYTES;
      this.still();
    }

    still() {
      const image = new Image();
      image.addEventListener("load", () => {
        if (this.shown < 0) this.draw(image);
      });
      image.src = this.card.dataset.still;
    }

    load() {
      if (this.video || !playable) return;
      const bytes = Uint8Array.from(atob(this.source.textContent), (c) => c.charCodeAt(0));
      const video = document.createElement("video");
      Object.assign(video, { muted: true, playsInline: true, preload: "auto" });
      video.addEventListener("loadeddata", () => {
        this.card.dataset.ready = "true";
        this.show(state.frame);
      });
      video.addEventListener("seeked", () => this.sought());
      video.addEventListener("error", () => {
        if (video === this.video) unplayable();
      });
      video.src = this.url = URL.createObjectURL(new Blob([bytes], { type: "video/mp4" }));
      this.video = video;
    }

    unload() {
      if (!this.video) return;
      const video = this.video;
      this.video = null;
      this.busy = false;
      this.shown = -1;
      this.kept = [];
      video.removeAttribute("src");
      video.load();
      URL.revokeObjectURL(this.url);
      delete this.card.dataset.ready;
      delete this.card.dataset.frame;
    }

    get late() {
      return this.video !== null && this.shown !== this.wanted;
    }

    show(frame) {
      this.wanted = Math.min(frame, this.frames - 1);
      if (!this.video || this.busy || this.shown === this.wanted || this.video.readyState < 2) return;
      if (this.kept[this.wanted]) {
        this.present(this.wanted, this.kept[this.wanted]);
        return;
      }
      this.busy = true;
      this.target = this.wanted;
      this.video.currentTime = (this.target + 0.5) / this.fps; // the middle of the frame: no rounding can reach its neighbour
      this.watch(this.video);
    }

    /* "seeked" may come before the frame does, so the frame itself is waited for where browsers tell of it, and checked by its time. */
    watch(video) {
      if (!video.requestVideoFrameCallback) return;
      video.requestVideoFrameCallback((now, { mediaTime }) => {
        if (video !== this.video || !this.busy) return;
        if (Math.round(mediaTime * this.fps) === this.target) this.arrived();
        else this.watch(video);
      });
    }

    /* A frame that is on show already is not told of again: after a moment the seek's word is taken. */
    sought() {
      const [video, target] = [this.video, this.target];
      const wait = video && video.requestVideoFrameCallback ? 120 : 0;
      setTimeout(() => {
        if (video === this.video && this.busy && target === this.target && !video.seeking) this.arrived();
      }, wait);
    }

    arrived() {
      if (!this.video) return;
      this.busy = false;
      this.present(this.target, this.keeps ? this.keep(this.target) : this.video);
      this.show(this.wanted);
    }

    keep(frame) {
      const copy = document.createElement("canvas");
      Object.assign(copy, { width: this.count * this.stride, height: this.height });
      copy.getContext("2d").drawImage(this.video, 0, 0);
      return (this.kept[frame] = copy);
    }

    present(frame, picture) {
      this.shown = frame;
      this.draw(picture);
      this.card.dataset.frame = this.shown;
      const x = this.frames > 1 ? (100 * this.shown) / (this.frames - 1) : 0;
      for (const cursor of this.cursors) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x);
    }

    draw(picture) {
      this.picture = picture;
      for (const canvas of this.canvases) this.piece(canvas.getContext("2d"), Number(canvas.dataset.k), 0);
      if (state.large === this) enlarge();
      if (state.blind === this) state.onDraw();
    }

    piece(context, k, x, from = 0, to = 1) {
      const [left, width] = [from * this.width, (to - from) * this.width];
      if (!this.picture || width <= 0) return;
      context.drawImage(this.picture, k * this.stride + left, 0, width, this.height, x + left, 0, width, this.height);
    }
  }

  // ------------------------------------------------------------------------------------------------------------- playback

  const playable = document.createElement("video").canPlayType('video/mp4; codecs="avc1.640028"') !== "";
  const transport = $("transport");
  const frames = transport ? Number(transport.dataset.frames) : 1;
  const fps = transport ? Number(transport.dataset.fps) : 8;
  const clips = cards.map((card) => new Clip(card, fps));

  function unplayable() {
    $("codec").hidden = false;
    pause();
  }

  function go(frame) {
    state.frame = (frame + frames) % frames;
    $("scrub").value = state.frame;
    $("where").textContent = `${state.frame + 1} / ${frames}`;
    for (const clip of clips) clip.show(state.frame);
  }

  function look(playing) {
    state.playing = playing;
    $("play").setAttribute("aria-pressed", String(playing));
    $("play").setAttribute("aria-label", playing ? "Pause" : "Play");
  }

  function pause() {
    look(false);
  }

  /* The next frame comes when it is due and every loaded clip shows this one; a clip that hangs is waited for half a second. */
  function play() {
    look(true);
    let since = performance.now();
    const tick = (now) => {
      if (!state.playing) return;
      const due = now - since >= 1000 / (fps * state.speed);
      const stuck = now - since > 500 + 1000 / (fps * state.speed);
      if ((due && !clips.some((clip) => clip.late)) || stuck) {
        since = now;
        go(state.frame + 1);
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  const toggle = () => (state.playing ? pause() : play());
  const step = (by) => {
    pause();
    go(state.frame + by);
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || !inSight()) return;
    const target = event.target;
    const typing = target.matches("input, select, textarea") && target.id !== "scrub";
    const pressing = target.matches("button, summary, a, canvas, circle, .scroll");
    if (event.key === " " && !typing && !pressing) {
      event.preventDefault();
      toggle();
    } else if (["ArrowLeft", "ArrowRight"].includes(event.key) && !typing && !target.matches(".scroll, circle")) {
      event.preventDefault();
      step(event.key === "ArrowLeft" ? -1 : 1);
    }
  }

  function inSight() {
    if (state.large || state.blind) return true;
    const box = $("clips").getBoundingClientRect();
    return box.top < innerHeight * 0.8 && box.bottom > innerHeight * 0.2;
  }

  // ----------------------------------------------------------------------------------------------------------- enlarged

  function open(clip, mode) {
    state.large = clip;
    $("large-title").textContent = clip.card.querySelector("h3").textContent;
    $("large-transport").append(transport);
    choose(mode);
    $("large").showModal();
    enlarge();
  }

  function closed() {
    state.large = null;
    document.querySelector("#clips .hint").before(transport);
  }

  function choose(mode) {
    state.mode = mode;
    for (const button of document.querySelectorAll(".modes button")) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    document.querySelector("#wipe").hidden = mode !== "wipe";
    document.querySelector(".wipe").hidden = mode === "difference";
    enlarge();
  }

  const draws = {
    wipe(clip, context, at) {
      clip.piece(context, chosen("left"), 0, 0, at);
      clip.piece(context, chosen("right"), 0, at, 1);
      context.fillStyle = "#000";
      context.fillRect(Math.round(at * clip.width) - 1, 0, 1, clip.height);
      context.fillStyle = "#fff";
      context.fillRect(Math.round(at * clip.width), 0, 1, clip.height);
    },
    side(clip, context) {
      clip.piece(context, chosen("left"), 0);
      clip.piece(context, chosen("right"), clip.width + 8);
    },
    difference(clip, context) {
      clip.piece(context, Number(document.querySelector('canvas[data-kind="difference"]').dataset.k), 0);
    },
  };
  const chosen = (side) => Number($(side).value);

  function enlarge() {
    const clip = state.large;
    if (!clip) return;
    const stage = $("stage");
    const width = state.mode === "side" ? 2 * clip.width + 8 : clip.width;
    if (stage.width !== width || stage.height !== clip.height) {
      Object.assign(stage, { width, height: clip.height });
      stage.style.width = `min(100%, ${(62 * width) / clip.height}vh)`;
    }
    const context = stage.getContext("2d");
    context.clearRect(0, 0, width, clip.height);
    draws[state.mode](clip, context, Number($("wipe").value) / 1000);
  }

  function drag(event) {
    if (state.mode !== "wipe" || !(event.buttons & 1)) return;
    const box = $("stage").getBoundingClientRect();
    $("wipe").value = Math.round((1000 * (event.clientX - box.left)) / box.width);
    enlarge();
  }

  // -------------------------------------------------------------------------------------------------------------- order

  const badness = { higher: (x) => -x, lower: (x) => x, zero: Math.abs, one: (x) => Math.abs(x - 1) };

  function reorder() {
    const option = $("order").selectedOptions[0];
    const bad = (clip) => badness[option.dataset.better](clip.figures[option.value]);
    const sorted = [...clips].sort((a, b) => bad(b) - bad(a));
    $("list").append(...sorted.map((clip) => clip.card));
    $("sorted").textContent = `, worst ${option.textContent} first`;
  }

  // ---------------------------------------------------------------------------------------------------------------- dots

  /* A dot of a strip leads to the card of its clip. One dot of a strip can be reached with the tab key, arrow keys lead to the others;
     dots of clips that this page does not show are pale. */
  function dots(strip) {
    const found = [...strip.querySelectorAll("circle[data-clip]")].sort((a, b) => a.dataset.value - b.dataset.value);
    const shown = found.filter((dot) => {
      const card = cards.find((one) => one.dataset.name === dot.dataset.clip);
      dot.classList.add(card ? "leads" : "pale");
      if (!card) dot.querySelector("title").textContent += " (not among the clips of this page)";
      else dot.addEventListener("click", () => visit(card));
      return card;
    });
    shown.forEach((dot, i) => {
      dot.setAttribute("role", "button");
      dot.setAttribute("tabindex", i ? "-1" : "0");
      dot.addEventListener("keydown", (event) => {
        const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (by) {
          const next = shown[(i + by + shown.length) % shown.length];
          for (const one of shown) one.setAttribute("tabindex", one === next ? "0" : "-1");
          next.focus();
        } else if (event.key === "Enter" || event.key === " ") visit(cards.find((one) => one.dataset.name === dot.dataset.clip));
        else return;
        event.preventDefault();
      });
    });
  }

  function visit(card) {
    for (const one of cards) one.classList.toggle("visited", one === card);
    card.scrollIntoView({ block: "center" });
    card.focus({ preventScroll: true });
  }

  for (const strip of document.querySelectorAll("svg.chart")) dots(strip);

  if (transport) {
    $("codec").hidden = playable;
    $("play").addEventListener("click", toggle);
    $("back").addEventListener("click", () => step(-1));
    $("forth").addEventListener("click", () => step(1));
    $("scrub").addEventListener("input", (event) => {
      pause();
      go(Number(event.target.value));
    });
    $("speed").addEventListener("change", (event) => (state.speed = Number(event.target.value)));
    $("order")?.addEventListener("change", reorder);
    $("floor")?.addEventListener("change", (event) => $("list").classList.toggle("floors", event.target.checked));
    for (const side of ["left", "right"]) $(side).addEventListener("change", enlarge);
    document.addEventListener("keydown", onKey);
    $("close").addEventListener("click", () => $("large").close());
    $("large").addEventListener("close", closed);
    $("large").addEventListener("click", (event) => event.target === $("large") && $("large").close());
    for (const button of document.querySelectorAll(".modes button")) button.addEventListener("click", () => choose(button.dataset.mode));
    $("wipe").addEventListener("input", enlarge);
    for (const kind of ["pointerdown", "pointermove"]) $("stage").addEventListener(kind, drag);
    for (const clip of clips) {
      for (const canvas of clip.canvases) {
        const enter = () => {
          const { k, kind } = canvas.dataset;
          if (kind === "test" || kind === "floor") $("right").value = k;
          open(clip, kind === "difference" ? "difference" : "wipe");
        };
        canvas.addEventListener("click", enter);
        canvas.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          enter();
        });
      }
      for (const curve of clip.card.querySelectorAll("svg.curve")) {
        curve.addEventListener("click", (event) => {
          const box = curve.getBoundingClientRect();
          step(Math.round(((event.clientX - box.left) / box.width) * (clip.frames - 1)) - state.frame);
        });
      }
    }
    const near = new IntersectionObserver(
      (entries) => {
        for (const entry of entries) {
          const clip = clips[cards.indexOf(entry.target)];
          if (entry.isIntersecting) clip.load();
          else if (clip !== state.large && clip !== state.blind) clip.unload();
        }
      },
      { rootMargin: "100% 0px" },
    );
    for (const card of cards) near.observe(card);
  }

  // --------------------------------------------------------------------------------------------------------------- tables

  const compare = {
    text: (a, b) => a.localeCompare(b, "en", { numeric: true }),
    number: (a, b) => Number(a) - Number(b),
  };
  const ends = { text: ["A to Z", "Z to A"], number: ["smallest first", "largest first"] };

  /* A table whose heads are buttons; the heading names the order. */
  function sortable(table, words) {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    const sort = (column) => {
      const head = heads[column];
      const kind = head.dataset.kind === "text" ? "text" : "number";
      const [first, second] = kind === "text" ? ["ascending", "descending"] : ["descending", "ascending"];
      const order = head.getAttribute("aria-sort") === first ? second : first;
      for (const other of heads) other.setAttribute("aria-sort", other === head ? order : "none");
      const value = (row) => row.cells[column].dataset.value;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === ""); // nothing known sorts last either way
        return sign * compare[kind](x, y);
      });
      body.append(...rows);
      words.textContent = `, by ${head.textContent.trim()}, ${ends[kind][order === "ascending" ? 0 : 1]}`;
    };
    heads.forEach((head, column) => head.querySelector("button")?.addEventListener("click", () => sort(column)));
  }

  for (const name of ["layers", "tests"]) if ($(name)) sortable($(name), $(`${name}-sorted`));
  if ($("layers")) {
    const body = $("layers").tBodies[0];
    $("filter").addEventListener("input", (event) => {
      const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
      let matches = 0;
      for (const row of body.rows) {
        const text = row.textContent.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        matches += !row.hidden;
      }
      $("matches").textContent = words.length ? `${matches} of ${body.rows.length}` : "";
    });
  }

  $("save").addEventListener("click", () => {
    const text = JSON.stringify(JSON.parse($("data").textContent), null, 2);
    const url = URL.createObjectURL(new Blob([`${text}\n`], { type: "application/json" }));
    Object.assign(document.createElement("a"), { href: url, download: "report.json" }).click();
    setTimeout(() => URL.revokeObjectURL(url), 1000);
  });

  return { $, clips, state, transport, play, pause, go };
})();
