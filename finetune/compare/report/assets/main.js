// The page: what is chosen, the sections in their order, and news of a training that is followed.

const TITLES = {
  loss: "Loss", grad_norm: "Gradient norm", learning_rate: "Learning rate", tokens_per_second: "Tokens a second",
  memory_bytes: "Memory", router_loss: "Balance of experts",
};
const SECONDS = 2, TRIES = 5; // between two questions to a server; until it counts as gone
const state = { axis: "steps", together: 1, log: false, hidden: new Set(), runs: [] };
const charts = [];
const root = document.getElementById("report");
let data = null, heatMap = null;

function visible() {
  return state.runs.map((run, number) => ({ run, number })).filter(({ number }) => !state.hidden.has(number));
}

function figureLines(name) {
  return ({ axis, together }) => visible().filter(({ run }) => run.figures[name]).map(({ run, number }) => {
    const found = grouped(run, name, axis, name === "learning_rate" ? 1 : together);
    const isBand = name !== "learning_rate" && found.count.some(count => count > 1);
    return { run: number, label: run.name, ...found, low: isBand ? found.low : null, high: isBand ? found.high : null };
  });
}

function pointLines(kind, name, label = "") {
  return ({ axis }) => visible().filter(({ run }) => run[kind][name]).map(({ run, number }) =>
    ({ run: number, label: `${run.name}${label}`, points: true, ...pointed(run[kind][name], axis) }));
}

function lossLines(now) {
  const lost = visible().flatMap(({ run, number }) => run.givenUp.map(each =>
    ({ run: number, label: `${run.name}, given up`, faint: true, x: each[now.axis], y: orNull(each.loss), low: null, high: null, last: each.steps, count: null })));
  return [...figureLines("loss")(now), ...lost, ...pointLines("heldOut", "loss", ", held-out")(now)];
}

function specs() {
  const names = kind => [...new Set(state.runs.flatMap(run => Object.keys(run[kind])))];
  const has = name => state.runs.some(run => run.figures[name]);
  const interval = "Bands are 95 % intervals over rows like these.";
  const found = [{ id: "loss", title: "Loss", wide: true, marks: true, mixed: true, canLog: true, lines: lossLines,
    note: "Lines are training, points held-out rows, faint lines steps that a rollback gave up. ✕ incident or rollback, dotted: resume, ticks at the bottom: commits." }];
  for (const name of new Set([...names("heldOut"), ...names("differences")].sort((one, two) => (two === "loss") - (one === "loss")))) {
    if (names("heldOut").includes(name)) found.push({ id: `held-out-${name}`, title: `Held-out ${name}`, note: interval, lines: pointLines("heldOut", name) });
    const baseline = data.baselines[name.includes("/") ? name.split("/")[0] : "held-out"];
    if (names("differences").includes(name)) found.push({ id: `difference-${name}`, title: `Held-out ${name}: difference to ${baseline}`, zero: true,
      note: "Paired by row. The 95 % interval of a checkpoint holds for it alone.", lines: pointLines("differences", name) });
  }
  for (const name of ["learning_rate", "grad_norm", "tokens_per_second", "memory_bytes", "router_loss"])
    if (has(name)) found.push({ id: name, title: TITLES[name], canLog: name === "grad_norm", lines: figureLines(name),
      ...(name === "memory_bytes" ? { format: bytes, axisFormat: bytes } : {}) });
  return found;
}

// Controls -------------------------------------------------------------------------------------------------------------------------

function choice(label, options, chosen, taken) {
  return el("label", {}, label, el("select", { onchange: event => taken(event.target.value) },
    options.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen) }, text))));
}

function controls() {
  const widths = choicesOf(state.runs).map(together => [together, `${exact(together * data.width)} ${together * data.width === 1 ? "step" : "steps"}`]);
  const log = el("input", { type: "checkbox", checked: state.log, onchange: event => { state.log = event.target.checked; drawAll(); } });
  return el("div", { class: "controls", role: "toolbar", "aria-label": "What the charts show" },
    choice("Over", Object.entries({ steps: "steps", tokens: "tokens", hours: "hours" }), state.axis, value => { state.axis = value; drawAll(); }),
    choice("A point is", widths, state.together, value => { state.together = +value; drawAll(); }),
    el("label", { class: "check" }, log, "logarithmic"),
    el("button", { type: "button", onclick: () => drawAll() }, "Whole range"),
    el("button", { type: "button", onclick: turnTheme }, "Light or dark"));
}

function legend() {
  return el("div", { class: "legend", role: "group", "aria-label": "Runs: press to hide or show" }, state.runs.map((run, number) => {
    const button = el("button", { type: "button", "aria-pressed": String(!state.hidden.has(number)), onclick: () => {
      if (!state.hidden.delete(number)) state.hidden.add(number);
      button.setAttribute("aria-pressed", String(!state.hidden.has(number)));
      drawAll();
    } }, el("i", { class: lookOf(number).dash.length ? "dash" : "line" }), run.name);
    return button;
  }));
}

function colorLegend() {
  document.querySelectorAll(".legend button").forEach((button, number) => button.style.setProperty("--own", lookOf(number).color));
}

function turnTheme() {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  drawAll();
}

// The whole range of an axis, over all runs.
function spanOf(axis) {
  const ends = visible().flatMap(({ run }) => [run.at[axis], ...Object.values(run.heldOut).map(each => each[axis])])
    .filter(each => each.length).flatMap(each => [each[0], each[each.length - 1]]);
  const low = Math.min(...ends), high = Math.max(...ends);
  return ends.length && high > low ? [low, high] : [(ends[0] ?? 0) - 1, (ends[0] ?? 0) + 1];
}

function drawAll() {
  state.span = spanOf(state.axis);
  colorLegend();
  charts.forEach(chart => chart.draw(state));
  heatMap?.draw();
}

// The page -------------------------------------------------------------------------------------------------------------------------

function header() {
  const runs = data.runs.length === 1 ? data.runs[0].name : `${data.runs.length} runs`;
  const about = [`written ${data.created.slice(0, 16).replace("T", " ")} UTC`,
    data.width > 1 ? `every point is at least ${exact(data.width)} steps: their mean, lowest and highest` : "every step is in this page"];
  return el("header", {}, el("h1", {}, "Training report: ", el("span", { class: "name" }, runs)),
    el("p", { class: "about", id: "about" }, about.join(" · ")), el("p", { class: "news", role: "status" }));
}

function build() {
  const open = new Set([...document.querySelectorAll("details[open]")].map(each => each.closest("[id]")?.id));
  const all = specs();
  charts.splice(0, charts.length, ...all.map(spec => new Chart(spec)));
  heatMap = state.runs.some(run => run.modules) ? new HeatMap(state.runs) : null;
  root.replaceChildren(header(), el("div", { class: "bar-of-controls" }, legend(), controls()),
    ...[el("section", { id: "summary" }, table("The runs side by side", data.comparison.head, data.comparison.rows), data.notes.map(note => el("p", { class: "about" }, note))),
      el("section", { class: "charts", "aria-label": "Charts" }, charts.map(chart => chart.node), heatMap?.node),
      timelineSection(state.runs),
      data.runs.length > 1 ? tableSection("recipe", "Recipes that differ", data.recipe, "Every recipe key in which these runs differ.") : null,
      weightsSection(data.weights), samplesSection(data.samples)].filter(Boolean));
  charts.forEach(chart => { chart.details.open = open.has(chart.spec.id); });
  drawAll();
}

function take(found) {
  data = found;
  const isFirst = !state.runs.length;
  state.runs = data.runs.map(decoded);
  if (isFirst) {
    const most = Math.max(...state.runs.map(run => run.counts.length));
    state.together = choicesOf(state.runs).find(each => most / each <= 150) ?? 1;
  }
  build();
}

async function follow(tag = null, failed = 0) {
  try {
    const answer = await fetch("data.json", { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    if (answer.status === 200) {
      take(await answer.json());
      tag = answer.headers.get("ETag");
    }
    failed = 0;
  } catch {
    failed += 1;
  }
  document.querySelector(".news").textContent = failed >= TRIES ? "The server has stopped; this is the last it said." : "Follows the training.";
  if (failed < TRIES) setTimeout(() => follow(tag, failed), 1000 * SECONDS);
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
let beforePrint;
addEventListener("beforeprint", () => { beforePrint = document.documentElement.dataset.theme ?? ""; document.documentElement.dataset.theme = "light"; drawAll(); });
addEventListener("afterprint", () => {
  if (beforePrint) document.documentElement.dataset.theme = beforePrint;
  else delete document.documentElement.dataset.theme;
  drawAll();
});
take(JSON.parse(document.getElementById("data").textContent));
if (document.body.dataset.live) follow();
