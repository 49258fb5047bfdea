/* Blind A/B: two clips of one pair, sides drawn anew for every clip, a choice for each, then what was what. */
(() => {
  const { $, clips, state, transport, play, pause, go } = report;
  if (!transport) return;
  const names = new Map([...$("blind-first").options].map((option) => [option.value, option.textContent]));
  let rounds = [];
  let at = 0;

  function shuffled(list) {
    const found = [...list];
    for (let i = found.length - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [found[i], found[j]] = [found[j], found[i]];
    }
    return found;
  }

  function start() {
    const second = $("blind-second");
    if (second.value === $("blind-first").value) second.value = [...names.keys()].find((k) => k !== $("blind-first").value); // no clip against itself
    const pair = [$("blind-first").value, second.value];
    rounds = shuffled(clips).map((clip) => ({ clip, sides: Math.random() < 0.5 ? pair : [...pair].reverse(), vote: null }));
    at = 0;
    $("blind-vote").hidden = false;
    $("blind-result").hidden = true;
    $("blind-transport").append(transport);
    show();
    $("blind-title").focus(); // keys vote from here
    if (!state.playing && !matchMedia("(prefers-reduced-motion: reduce)").matches) play();
  }

  function show() {
    const { clip } = rounds[at];
    const before = state.blind;
    state.blind = clip;
    if (before && before !== clip) before.unload();
    clip.load();
    $("blind-where").textContent = `Clip ${at + 1} of ${rounds.length}`;
    $("blind-prompt").textContent = clip.card.querySelector("h3").textContent;
    for (const side of ["a", "b"]) Object.assign($(`blind-${side}`), { width: clip.width, height: clip.height });
    draw();
    go(0);
  }

  function draw() {
    if (at >= rounds.length) return; // a frame that was asked for before the last vote
    const { clip, sides } = rounds[at];
    ["a", "b"].forEach((side, i) => clip.piece($(`blind-${side}`).getContext("2d"), Number(sides[i]), 0));
  }

  function vote(choice) {
    if ($("blind-vote").hidden) return;
    rounds[at].vote = choice;
    at += 1;
    if (at < rounds.length) show();
    else reveal();
  }

  /* How often chance alone splits so many choices at least so unevenly: the two-sided sign test. */
  function chance(first, second) {
    const n = first + second;
    let [term, tail] = [0.5 ** n, 0];
    for (let i = 0; i <= Math.min(first, second); i++) {
      tail += term;
      term *= (n - i) / (i + 1);
    }
    return Math.min(1, 2 * tail);
  }

  function reveal() {
    pause();
    const voted = rounds.filter((round) => round.vote);
    const won = (k) => voted.filter(({ vote, sides }) => vote !== "same" && sides[vote === "a" ? 0 : 1] === k).length;
    const [first, second] = [$("blind-first").value, $("blind-second").value];
    const [one, other] = [won(first), won(second)];
    const same = voted.length - one - other;
    const words = [`${names.get(first)} better: ${one}`, `${names.get(second)} better: ${other}`, `no difference: ${same}`];
    const split = `Chance alone splits ${one + other} choices at least so unevenly in ${Math.round(100 * chance(one, other))} of 100 cases.`;
    $("blind-tally").textContent = `${words.join(", ")} (${voted.length} of ${rounds.length} clips). ${one + other ? split : ""}`;
    const row = ({ clip, sides, vote }) => {
      const cells = [clip.card.dataset.name, ...sides.map((k) => names.get(k))];
      cells.push(vote === "same" ? "no difference" : names.get(sides[vote === "a" ? 0 : 1]));
      const made = document.createElement("tr");
      for (const words of cells) made.append(Object.assign(document.createElement("td"), { textContent: words }));
      return made;
    };
    $("blind-rows").replaceChildren(...voted.map(row));
    $("blind-vote").hidden = true;
    $("blind-result").hidden = false;
    $("blind-tally").focus();
  }

  state.onDraw = draw;
  $("blind-open").addEventListener("click", () => {
    $("blind").showModal();
    start();
  });
  $("blind-start").addEventListener("click", start);
  for (const name of ["blind-first", "blind-second"]) $(name).addEventListener("change", start);
  $("blind-reveal").addEventListener("click", reveal);
  $("blind-close").addEventListener("click", () => $("blind").close());
  $("blind").addEventListener("close", () => {
    pause();
    state.blind = null;
    document.querySelector("#clips .hint").before(transport);
  });
  for (const button of document.querySelectorAll("[data-vote]")) button.addEventListener("click", () => vote(button.dataset.vote));
  document.addEventListener("keydown", (event) => {
    const choice = { 1: "a", 2: "b", 0: "same" }[event.key];
    if (!choice || !state.blind || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select")) return;
    event.preventDefault();
    vote(choice);
  });
})();
