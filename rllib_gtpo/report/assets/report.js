"use strict";
// Text of models and tasks becomes text nodes and nothing else: no innerHTML in this file.
(() => {
  const PAGE = 100; // rows of the table of groups that are drawn at one time
  const head = document.getElementById("head");
  const main = document.getElementById("main");
  const chunks = new Map();
  const view = { sort: "signal", down: true, shown: PAGE, find: "", stop: "", invalid: false, dead: false, iteration: "" };
  let data = null;
  let stepKeys = null; // what the arrow keys do in the group that is open

  // Elements.

  function el(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
      else node.setAttribute(name, value === true ? "" : String(value));
    }
    return fill(node, children);
  }

  function fill(node, ...children) {
    node.replaceChildren(...children.flat(9).filter((c) => c !== null && c !== undefined && c !== false && c !== ""));
    return node;
  }

  function svg(tag, attributes) {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  }

  const number = (x, digits = 3) =>
    x === null || x === undefined ? "–" : Number.isInteger(x) && Math.abs(x) < 1e6 ? String(x) : Number(x.toPrecision(digits)).toString();
  const signed = (x) => (x === null ? "–" : (x > 0 ? "+" : x < 0 ? "−" : "") + Math.abs(x).toFixed(2));
  const percent = (x) => Math.round(100 * x) + "%";
  const exact = (x) => (x === null || x === undefined ? "none" : String(x));

  // Data.

  async function unpack(id) {
    const text = document.getElementById(id).textContent;
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return JSON.parse(await new Response(stream).text());
  }

  async function groupOf(line) {
    if (!chunks.has(line.chunk)) {
      if (chunks.size >= 8) chunks.delete(chunks.keys().next().value);
      chunks.set(line.chunk, unpack("chunk-" + line.chunk));
    }
    return (await chunks.get(line.chunk))[line.place];
  }

  // The head and the overview.

  function drawHead() {
    document.title = data.name + " · rllib report";
    const facts = Object.entries(data.settings).map(([name, value]) =>
      el("span", {}, name.replaceAll("_", " ") + " ", el("b", {}, typeof value === "object" ? JSON.stringify(value) : String(value))));
    if (data.status) facts.push(el("span", {}, "run ", el("b", {}, data.status)));
    if (data.held_out) facts.push(el("span", {}, "held-out accuracy ", el("b", {}, data.held_out.map((x) => x.toFixed(3)).join(" → "))));
    const size = data.groups.reduce((sum, g) => sum + g.size, 0);
    facts.push(el("span", {}, el("b", {}, size.toLocaleString("en")), " trajectories in ", el("b", {}, data.groups.length.toLocaleString("en")), " groups"));
    fill(head, el("h1", {}, data.name), el("div", { class: "facts" }, facts), data.notes.map((note) => el("p", { class: "note" }, note)));
  }

  function curve(one) {
    const points = one.points;
    const [x0, x1] = [points[0][0], points[points.length - 1][0]];
    const all = points.flatMap((p) => p.slice(1)).filter((v) => v !== null);
    let [low, high] = [Math.min(...all), Math.max(...all)];
    const flat = low === high;
    if (flat) [low, high] = [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
    const X = (x) => (x1 === x0 ? 50 : (100 * (x - x0)) / (x1 - x0));
    const Y = (y) => 96 - (92 * (y - low)) / (high - low);
    const line = points.map((p, i) => (i ? "L" : "M") + X(p[0]) + " " + Y(p[1])).join("");
    const banded = points.filter((p) => p[2] !== null);
    const plot = svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", role: "img", "aria-label": one.title });
    if (banded.length > 1) {
      const over = banded.map((p, i) => (i ? "L" : "M") + X(p[0]) + " " + Y(p[3])).join("");
      const under = banded.slice().reverse().map((p) => "L" + X(p[0]) + " " + Y(p[2])).join("");
      plot.append(svg("path", { class: "band", d: over + under + "Z" }));
    }
    plot.append(svg("path", { class: "line", d: points.length > 1 ? line : "M46 " + Y(points[0][1]) + "L54 " + Y(points[0][1]) }));
    const now = el("span", { class: "now" });
    const show = (p) => {
      now.textContent = number(p[1]) + (p[2] === null ? "" : " (" + number(p[2]) + " to " + number(p[3]) + ")") + " · iteration " + p[0];
    };
    show(points[points.length - 1]);
    plot.addEventListener("pointermove", (event) => {
      const box = plot.getBoundingClientRect();
      const x = x0 + ((event.clientX - box.left) / box.width) * (x1 - x0);
      show(points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best)));
    });
    plot.addEventListener("pointerleave", () => show(points[points.length - 1]));
    return el("div", { class: "card curve" }, el("b", {}, one.title), el("div", {}, now, " "), plot,
      el("div", { class: "axis" }, el("span", {}, flat ? number(points[0][1]) : number(low) + " … " + number(high)), el("span", {}, x0 + " … " + x1)));
  }

  const COLUMNS = [
    ["iteration", "iteration", (g) => g.iteration],
    ["task", "task", (g) => g.task, "text"],
    ["size", "members", (g) => g.size],
    ["solved", "solved", (g) => percent(g.solved)],
    ["reward", "reward", (g) => number(g.reward)],
    ["spread", "spread", (g) => number(g.spread)],
    ["signal", "signal", (g) => signal(g)],
    ["dead", "dead turns", (g) => percent(g.dead)],
    ["turns", "turns", (g) => number(g.turns)],
    ["invalid", "invalid calls", (g) => g.invalid],
    ["shaped", "shaped", (g) => g.shaped],
    ["stops", "stopped by", (g) => Object.entries(g.stops).map(([name, n]) => n + " " + name).join(", "), "text"],
  ];

  const HELP = {
    signal: "Mean size of the advantage over the group's turns: what there is to learn",
    dead: "Share of turns whose advantage is 0",
    spread: "Standard deviation of the members' rewards",
    shaped: "Members that were paid for resembling a correct sibling",
  };

  function signal(g) {
    const most = Math.max(1e-9, ...[data.mostSignal]);
    return [el("span", { class: "bar", style: { width: (60 * g.signal) / most + "px" } }), number(g.signal), g.trained ? null : " (not trained)"];
  }

  function chosenGroups() {
    const wanted = view.find.toLowerCase();
    const found = data.groups.filter((g) =>
      (!wanted || g.task.toLowerCase().includes(wanted) || String(g.id).includes(wanted)) &&
      (!view.iteration || g.iteration === Number(view.iteration)) &&
      (!view.stop || g.stops[view.stop]) && (!view.invalid || g.invalid) && (!view.dead || g.dead > 0));
    const key = (g) => (view.sort === "stops" ? Object.keys(g.stops).join() : g[view.sort]);
    const sign = view.down ? -1 : 1;
    return found.sort((a, b) => sign * (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0) || a.iteration - b.iteration || a.id - b.id);
  }

  function drawTable(into, count) {
    const found = chosenGroups();
    const open = (g) => { location.hash = "#" + address(g); };
    const rows = found.slice(0, view.shown).map((g) =>
      el("tr", { class: "row", tabindex: 0, "data-group": g.iteration + "/" + g.id, onclick: () => open(g),
        onkeydown: (e) => { if (e.key === "Enter") open(g); } },
        COLUMNS.map(([name, , cell, kind]) => el("td", { class: kind, title: kind ? String(cell(g)) : exactCell(g, name) }, cell(g)))));
    const heads = COLUMNS.map(([name, title, , kind]) =>
      el("th", { class: kind, title: HELP[name], "aria-sort": view.sort === name ? (view.down ? "descending" : "ascending") : null },
        el("button", { onclick: () => { view.down = view.sort === name ? !view.down : kind !== "text"; view.sort = name; drawTable(into, count); } },
          title + (view.sort === name ? (view.down ? " ↓" : " ↑") : ""))));
    count.textContent = found.length.toLocaleString("en") + " of " + data.groups.length.toLocaleString("en") + " groups";
    const more = found.length > view.shown && el("p", {}, el("button", { onclick: () => { view.shown += PAGE; drawTable(into, count); } },
      "show " + Math.min(PAGE, found.length - view.shown) + " more"));
    fill(into, el("div", { class: "scroll" }, el("table", { class: "groups" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows))), more);
  }

  const exactCell = (g, name) => (typeof g[name] === "number" ? String(g[name]) : null);

  function filterBar(redraw, extra) {
    const stops = [...new Set(data.groups.flatMap((g) => Object.keys(g.stops)))].sort();
    return el("div", { class: "filters" }, extra,
      el("label", {}, "stopped by", el("select", { "data-filter": "stop", onchange: (e) => { view.stop = e.target.value; redraw(); } },
        el("option", { value: "" }, "anything"), stops.map((s) => el("option", { value: s, selected: view.stop === s }, s)))),
      el("label", {}, el("input", { type: "checkbox", "data-filter": "invalid", checked: view.invalid, onchange: (e) => { view.invalid = e.target.checked; redraw(); } }), "invalid calls"),
      el("label", {}, el("input", { type: "checkbox", "data-filter": "dead", checked: view.dead, onchange: (e) => { view.dead = e.target.checked; redraw(); } }), "dead turns"));
  }

  function drawOverview() {
    stepKeys = null;
    const table = el("div", {});
    const count = el("span", { class: "quiet" });
    const redraw = () => { view.shown = PAGE; drawTable(table, count); };
    const iterations = [...new Set(data.groups.map((g) => g.iteration))].sort((a, b) => a - b);
    const extra = [
      el("label", {}, "find", el("input", { type: "search", placeholder: "task or group", value: view.find, oninput: (e) => { view.find = e.target.value; redraw(); } })),
      el("label", {}, "iteration", el("select", { onchange: (e) => { view.iteration = e.target.value; redraw(); } },
        el("option", { value: "" }, "all"), iterations.map((i) => el("option", { value: i, selected: view.iteration === String(i) }, i)))),
    ];
    fill(main, 
      el("h2", {}, "Learning curves"), data.curves.some((c) => c.points.some((p) => p[2] !== null)) && el("p", { class: "quiet" }, "Bands are 95% intervals: of an iteration's mean, from the spread between groups; of an evaluation's, over tasks."),
      el("div", { class: "curves" }, data.curves.map(curve)));
    if (data.groups.length) {
      main.append(el("h2", {}, "Groups"), filterBar(redraw, extra), count, table);
      redraw();
    }
  }

  // A group.

  const address = (g, member, turn) => "g=" + g.iteration + "/" + g.id + (member === undefined ? "" : "&t=" + member + (turn === undefined ? "" : "&k=" + turn));

  function tint(value, most) {
    if (value === null || value === undefined) return "transparent";
    const strength = Math.min(1, Math.abs(value) / (most || 1));
    return "rgba(var(--" + (value >= 0 ? "good" : "bad") + "), " + (strength ? 0.08 + 0.6 * strength : 0).toFixed(3) + ")";
  }

  const advantageBy = (turn, estimator) => (estimator === "" ? turn.advantage : turn.others[estimator]);
  const peek = (turn) => turn.calls.map((c) => (c.error ? c.raw || c.name : c.name + ": " + pretty(c.arguments))).join("; ") || turn.text || "(nothing)";
  const isDead = (turn) => turn.advantage === null || Math.abs(turn.advantage) < 1e-6;
  const matches = (t, turn) => (!view.stop || t.stop === view.stop) && (!view.invalid || turn.invalid) && (!view.dead || isDead(turn));

  function drawGroup(g, line, member, index) {
    let estimator = "";
    let at = null;
    const columns = el("div", { class: "columns" });
    const detail = el("aside", { class: "card detail", "aria-live": "polite" });
    const open = (t, k) => {
      at = [t, k];
      history.replaceState(null, "", "#" + address(g, t.member, k));
      drawTurn(detail, g, t, k, line);
      for (const node of columns.querySelectorAll(".turn")) node.setAttribute("aria-pressed", String(node.dataset.at === t.member + "/" + k));
    };
    const redraw = () => {
      const turns = g.trajectories.flatMap((t) => t.turns);
      const most = Math.max(1e-9, ...turns.map((u) => Math.abs(advantageBy(u, estimator) ?? 0)));
      fill(columns, g.trajectories.map((t) => trajectory(t, estimator, most, open)));
      if (at) open(...at);
    };
    const names = Object.keys(g.trajectories.find((t) => t.turns.length)?.turns[0].others || {});
    const choose = el("label", {}, "coloured by", el("select", { "data-filter": "estimator", onchange: (e) => { estimator = e.target.value; redraw(); } },
      el("option", { value: "" }, "the run (" + data.estimator + ")"), names.map((n) => el("option", { value: n }, "what " + n + " would say"))));
    const neighbours = chosenGroups();
    const here = neighbours.findIndex((o) => o.iteration === g.iteration && o.id === g.id);
    const step = (by) => {
      const next = neighbours[here + by];
      return el("button", { disabled: !next, onclick: () => { location.hash = "#" + address(next); } }, by < 0 ? "← previous" : "next →");
    };
    fill(main, 
      el("div", { class: "crumbs" }, el("a", { href: "#" }, "All groups"), "›", el("b", {}, "iteration " + g.iteration + ", group " + g.id), el("span", { class: "quiet" }, g.task), step(-1), step(1)),
      el("div", { class: "filters" }, filterBar(redraw, choose), el("span", { class: "legend" }, "advantage − ", el("i", {}), " +")),
      el("details", { open: true }, el("summary", {}, "Prompt"), g.prompt.map((m) => el("pre", {}, m.role + ": " + m.content)), el("p", { class: "quiet" }, "task " + g.row)),
      el("h2", {}, "Trajectories"), el("div", { class: "group" }, columns, detail));
    redraw();
    const t = g.trajectories.find((one) => one.member === member) || g.trajectories[0];
    if (t && t.turns.length) open(t, Math.min(index || 0, t.turns.length - 1));
    stepKeys = (dx, dy) => {
      if (!at) return;
      const list = g.trajectories.filter((one) => one.turns.length);
      const column = list[Math.max(0, Math.min(list.length - 1, list.indexOf(at[0]) + dx))];
      open(column, Math.max(0, Math.min(column.turns.length - 1, at[1] + dy)));
      columns.querySelector('[aria-pressed="true"]').scrollIntoView({ block: "nearest", inline: "nearest" });
    };
  }

  function trajectory(t, estimator, most, open) {
    const hidden = t.turns.length > 0 && !t.turns.some((turn) => matches(t, turn));
    const boxes = t.turns.map((turn, k) => {
      const value = advantageBy(turn, estimator);
      return el("button", { class: "turn" + (matches(t, turn) ? "" : " faded"), "data-at": t.member + "/" + k, title: "advantage " + exact(value),
        style: { background: tint(value, most) }, "aria-pressed": "false", onclick: () => open(t, k) },
        el("span", { class: "a" }, signed(value ?? null)), el("span", { class: "n" }, (turn.invalid || turn.rewards.shaping ? k : "turn " + k) + (turn.invalid ? " · invalid" : "") + (turn.rewards.shaping ? " · shaped" : "")),
        el("span", { class: "peek" }, peek(turn).slice(0, 160)));
    });
    const left = !t.in_batch ? "group not trained on" : !t.trained ? "masked" : null;
    return el("section", { class: "trajectory " + (t.correct ? "right" : "wrong") + (hidden ? " hidden" : ""), "data-member": t.member },
      el("div", { class: "top" }, el("div", { class: "who" }, "#" + t.member + "  ", el("span", { class: "tag " + (t.correct ? "good" : "bad") }, t.correct ? "right" : "wrong")), el("div", { class: "quiet" }, "reward " + number(t.reward)),
        el("div", { class: "why" }, (t.stop || "no stop reason") + (t.answer === null ? "" : ": " + t.answer.slice(0, 60)), left && el("div", {}, el("span", { class: "tag" }, left)), t.error && el("div", {}, t.error.slice(0, 120)))),
      boxes);
  }

  // A turn.

  function block(title, text) {
    return text ? [el("h3", {}, title), el("pre", {}, text)] : null;
  }

  function drawTurn(into, g, t, k, line) {
    const turn = t.turns[k];
    const components = Object.entries(turn.rewards).map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", { title: exact(value) }, number(value, 4))));
    const sums = [["reward", turn.reward], ["return", turn.return], ["baseline", turn.baseline], ["scale", turn.scale], ["advantage", turn.advantage]];
    const versions = turn.last_version === null ? String(turn.weights_version) : turn.weights_version + " to " + turn.last_version;
    const tokens = el("div", {});
    const toggle = el("button", { "data-action": "tokens", onclick: () => { toggle.remove(); drawTokens(tokens, t, k); } }, "show tokens");
    fill(into, 
      el("h2", {}, "#" + t.member + ", turn " + k),
      el("p", { class: "quiet" }, turn.prompt_tokens + " tokens of context, " + turn.sampled_tokens + " sampled in " + number(turn.seconds) + " s, weights " + versions + ", " + (turn.finish === "stop" ? "complete" : "cut off: " + turn.finish)),
      el("table", { class: "sums", "data-part": "credit" }, el("thead", {}, el("tr", {}, sums.map(([name]) => el("th", {}, name)))),
        el("tbody", {}, el("tr", {}, sums.map(([name, value]) => el("td", { "data-name": name, "data-value": exact(value), title: exact(value) }, number(value, 4)))))),
      el("p", { class: "quiet" }, turn.advantage === null ? "Not trained on: no credit was computed." : "advantage = (return − baseline) / scale" + (["mt_grpo", "gigpo"].includes(data.estimator) ? " + the estimator's second term" : "")),
      components.length ? [el("h3", {}, "Reward by component"), el("table", { class: "sums" }, el("tbody", {}, components))] : null,
      k === t.turns.length - 1 ? shaping(t, turn) : null,
      el("h3", {}, "What each estimator says of this turn"), estimates(turn),
      block("Thinking", turn.thinking), block("Sampled text", turn.text),
      turn.calls.map((c) => [el("h3", {}, "Tool call: " + c.name), c.error ? el("p", {}, el("span", { class: "tag bad" }, "invalid"), c.error) : null, el("pre", {}, c.error ? c.raw || c.arguments : pretty(c.arguments))]),
      turn.results.map((r) => [el("h3", {}, "Output of " + r.name), el("p", { class: "quiet" }, (r.error ? r.error + ", " : "") + number(r.seconds) + " s"), el("pre", {}, r.content)]),
      turn.seen.map((m) => [el("h3", {}, "Then, " + m.role), el("pre", {}, m.content)]),
      el("h3", {}, "Tokens"), t.tokens ? toggle : el("p", { class: "quiet" }, "Not in the report; the record has them."), tokens);
    into.scrollTop = 0;
  }

  function pretty(text) {
    try {
      const given = Object.entries(JSON.parse(text));
      if (given.length === 1 && typeof given[0][1] === "string") return given[0][1];
      return given.map(([name, value]) => name + " = " + (typeof value === "string" ? (value.includes("\n") ? "\n" + value : value) : JSON.stringify(value))).join("\n");
    } catch {
      return text;
    }
  }

  function shaping(t, turn) {
    const value = turn.rewards.shaping;
    if (value === undefined || (!value && !t.similarities.length)) return null;
    const { shaping: mode, shaping_alpha: alpha } = data.shaping;
    const best = Math.max(...t.similarities.map((s) => s.similarity));
    const rule = { mean: "the mean of", max: "the largest of" }[mode] || "(control: " + mode + ") not";
    return [el("h3", {}, "Shaping " + signed(value)),
      el("p", {}, number(alpha) + " × " + rule + " its similarities to correct siblings:"),
      el("table", { class: "sums", "data-part": "shaping" }, el("tbody", {}, t.similarities.map((s) =>
        el("tr", {}, el("td", {}, el("a", { href: location.hash.replace(/&t=.*/, "") + "&t=" + s.member }, "#" + s.member), mode === "max" && s.similarity === best ? " (taken)" : ""), el("td", { title: exact(s.similarity) }, s.similarity.toFixed(3))))))];
  }

  function estimates(turn) {
    const rows = [["the run", turn.advantage, true], ...Object.entries(turn.others).map(([n, v]) => [n, v, false])];
    const most = Math.max(1e-9, ...rows.map((r) => Math.abs(r[1] ?? 0)));
    return el("div", { "data-part": "estimates" }, rows.map(([name, value, own]) => {
      const width = (50 * Math.abs(value ?? 0)) / most;
      const bar = el("i", { style: { left: (value ?? 0) < 0 ? 50 - width + "%" : "50%", width: width + "%", background: tint(value ?? 0, 0.4 * most) } });
      return el("div", { class: "estimate" + (own ? " own" : ""), title: name + ": " + exact(value) }, el("span", {}, name), el("span", { class: "track" }, bar), el("span", { class: "v" }, signed(value ?? null)));
    }));
  }

  // Tokens.

  function drawTokens(into, t, k) {
    const all = t.tokens;
    const first = all.turn_ids.indexOf(k);
    let start = first;
    while (start > 0 && all.turn_ids[start - 1] === -1) start--;
    let end = first;
    while (end >= 0 && end < all.ids.length && all.turn_ids[end] === k) end++;
    if (first < 0) return fill(into, el("p", { class: "quiet" }, "The turn has no sampled token."));
    const about = el("table", { class: "sums", "data-part": "token" });
    const colours = {
      "log-probability": (i) => (all.logprobs[i] === null ? "transparent" : "rgba(var(--bad), " + Math.min(0.75, -all.logprobs[i] / 4).toFixed(3) + ")"),
      "ratio": (i) => (all.ratios[i] === null ? "transparent" : tint(Math.log(all.ratios[i]), 0.3)),
      "learner against sampler": (i) => (all.learner_logprobs[i] === null ? "transparent" : tint(all.learner_logprobs[i] - all.logprobs[i], 0.3)),
    };
    const spans = [];
    const stream = el("div", { class: "tokens", "data-part": "tokens" });
    const show = (i) => {
      for (const span of spans) span.classList.toggle("on", span.dataset.i === String(i));
      const rows = [["text", JSON.stringify(all.tokens[i])], ["id", all.ids[i]], ["trained", all.mask[i] ? "yes" : "no"],
        ["log-probability, sampler", all.logprobs[i]], ["log-probability, learner before", all.learner_logprobs[i]], ["ratio", all.ratios[i]],
        ["clipped", all.clipped[i] === null ? null : all.clipped[i] ? "yes: no gradient" : "no"]];
      fill(about, el("tbody", {}, rows.map(([name, value]) => el("tr", {}, el("td", {}, name), el("td", {}, value === null ? "–" : String(value))))));
    };
    const draw = (kind) => {
      spans.length = 0;
      for (let i = start; i < end; i++) {
        spans.push(el("span", { "data-i": i, class: (all.turn_ids[i] === -1 ? "context " : "") + (all.clipped[i] ? "clipped" : ""), style: { background: colours[kind](i) }, onclick: () => show(i) }, all.tokens[i]));
      }
      fill(stream, spans);
    };
    draw("log-probability");
    show(first);
    fill(into, 
      el("div", { class: "filters" }, el("label", {}, "coloured by", el("select", { onchange: (e) => draw(e.target.value) }, Object.keys(colours).map((c) => el("option", {}, c)))), el("span", { class: "quiet" }, "grey: context; underlined: clipped")),
      stream, about);
  }

  // Where we are.

  async function route() {
    const match = /^#g=(\d+)\/(-?\d+)(?:&t=(\d+))?(?:&k=(\d+))?$/.exec(location.hash);
    const line = match && data.groups.find((g) => g.iteration === Number(match[1]) && g.id === Number(match[2]));
    if (!line) return drawOverview();
    const group = await groupOf(line);
    drawGroup(group, line, match[3] === undefined ? undefined : Number(match[3]), Number(match[4] || 0));
    window.scrollTo(0, 0);
  }

  document.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (stepKeys && moves[event.key] && !/INPUT|SELECT/.test(event.target.tagName)) {
      event.preventDefault();
      stepKeys(...moves[event.key]);
    }
  });

  async function start() {
    if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old: it has no DecompressionStream");
    data = await unpack("overview");
    data.mostSignal = data.groups.reduce((most, g) => Math.max(most, g.signal), 0);
    drawHead();
    window.addEventListener("hashchange", route);
    await route();
    document.body.dataset.ready = "yes";
  }

  start().catch((error) => {
    fill(main, el("p", { class: "note" }, "The report cannot be shown: " + error.message));
    throw error;
  });
})();
