// The parts of a report that are text: timeline, samples, tables, changes of the weights. Texts of rows are never markup.

const KINDS = { start: "start", resume: "resume", commit: "commit", incident: "incident", rollback: "rollback", branch: "branch" };

function timelineSection(runs) {
  const rows = runs.flatMap(run => run.timeline.happenings.map(each => ({ run: run.name, ...each })))
    .sort((one, two) => one.time < two.time ? -1 : one.time > two.time ? 1 : 0);
  const shown = el("div");
  const commits = el("input", { type: "checkbox", id: "commits", onchange: () => fill() });
  const fill = () => shown.replaceChildren(table("What happened, in order of time", ["step", "what", "", "run", "time (UTC)"],
    rows.filter(each => commits.checked || each.kind !== "commit").map(each =>
      [exact(each.step), badge(each.kind), each.text, each.run, each.time.slice(0, 19).replace("T", " ")])));
  fill();
  const count = rows.filter(each => each.kind === "commit").length;
  const told = runs.reduce((sum, run) => sum + run.timeline.unlisted, 0);
  return el("section", { id: "timeline" }, el("h2", {}, "Timeline"),
    el("label", { for: "commits", class: "check" }, commits, `show ${count === 1 ? "1 commit" : `${exact(count)} commits`}`),
    told ? el("p", {}, `${exact(told)} older commits are not listed.`) : null, shown);
}

function badge(kind) {
  return el("span", { class: `badge ${kind}` }, KINDS[kind]);
}

function tableSection(id, title, found, about) {
  if (!found.rows.length) return null;
  return el("section", { id }, el("h2", {}, title), el("p", { class: "about" }, about), table(title, found.head, found.rows));
}

function weightsSection(found) {
  if (!found.length) return null;
  return el("section", { id: "weights" }, el("h2", {}, "What changed in the weights"),
    el("p", { class: "about" }, "The norm of the change from the base, over the norm of the base’s weights, by module."),
    el("div", { class: "charts" }, found.map(each => {
      const most = Math.max(...each.modules.map(module => module.relative), 1e-12);
      const rows = each.modules.map(module => {
        const bar = el("span", { class: "bar" });
        bar.style.setProperty("--share", `${100 * module.relative / most}%`);
        return [module.module, `${(100 * module.relative).toPrecision(3)} %`, bar];
      });
      return table(`${each.ref}: ${(100 * each.total).toPrecision(3)} % in all`, ["module", "change", ""], rows);
    })));
}

function samplesSection(found) {
  if (!found.some(each => each.rows.length)) return null;
  return el("section", { id: "samples" }, el("h2", {}, "Rows that changed most"), found.map(each =>
    el("details", { open: found.length === 1 }, el("summary", {}, `${each.b} beside ${each.a}, by ${each.metric}`),
      each.note ? el("p", { class: "about" }, `The rows’ texts cannot be read: ${each.note}`) : null,
      each.rows.map(row => sample(each, row)))));
}

function sample(pair, row) {
  const isFlip = [row.a, row.b].every(value => value === 0 || value === 1) && row.a !== row.b;
  const answer = (ref, text, value) => el("div", {}, el("h4", {}, `${ref}: ${exact(value)}`),
    text === undefined ? el("p", { class: "about" }, "no answer stored") : el("pre", {}, text));
  return el("article", { class: "sample" },
    el("h3", {}, `Row ${exact(row.row)}`, isFlip ? el("span", { class: `badge ${row.b ? "commit" : "incident"}` }, row.b ? "now right" : "now wrong") : null),
    row.text === null ? null : el("pre", { class: "row" }, row.text),
    row.answer_a === undefined && row.answer_b === undefined
      ? el("p", { class: "about" }, `${pair.a}: ${exact(row.a)}, ${pair.b}: ${exact(row.b)}`)
      : el("div", { class: "answers" }, answer(pair.a, row.answer_a, row.a), answer(pair.b, row.answer_b, row.b)));
}
