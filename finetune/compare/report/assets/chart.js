// A chart of lines over steps, tokens or hours: drawn by uPlot, read by pointer or keyboard, with its numbers as a table.

const SYNC = "report";
const ROWS = 200; // of a run, in the table of a chart

// `lines`: {run, label, x, y, low, high, last, count, points, faint}, ascending in x. `format` writes a figure.
class Chart {
  constructor(spec) {
    this.spec = spec;
    this.tip = el("div", { class: "tip", "aria-hidden": "true" });
    this.said = el("p", { class: "said", role: "status", "aria-live": "polite" });
    this.plot = el("div", { class: "plot", tabindex: "0", role: "group", "aria-roledescription": "chart",
      "aria-label": `${spec.title}. Arrow keys read the points.`, onkeydown: event => this.key(event), onblur: () => this.leave() });
    this.body = el("tbody");
    this.details = el("details", { class: "numbers", ontoggle: () => this.tabulate() }, el("summary", {}, "Numbers"));
    this.node = el("figure", { class: `chart ${spec.wide ? "wide" : ""}`, id: spec.id },
      el("figcaption", {}, el("h3", {}, spec.title), spec.note ? el("p", {}, spec.note) : null),
      this.plot, this.said, this.details);
    new ResizeObserver(() => this.resize()).observe(this.plot);
  }

  // Draws what `spec.lines(state)` returns now.
  draw(state) {
    this.state = state;
    this.lines = this.spec.lines(state).filter(line => line.y.some(value => value !== null));
    this.chart?.destroy();
    this.chart = null;
    this.plot.replaceChildren();
    this.at = null;
    if (this.details.open) this.tabulate();
    if (!this.lines.length) {
      this.plot.append(el("p", { class: "nothing" }, "Nothing is recorded yet."));
      return;
    }
    const { series, bands, tables } = this.layout(state);
    this.chart = new uPlot(this.options(state, series, bands), uPlot.join(tables), this.plot);
    this.plot.append(this.tip);
    this.tip.hidden = true;
  }

  layout(state) {
    const series = [{}], bands = [], tables = [];
    // More bands than these would hide each other; beside lines of training, points go without.
    const hasBand = line => line.low && !(line.points && this.spec.mixed);
    const banded = this.lines.filter(hasBand);
    const areBands = banded.length <= (banded.every(line => line.points) ? 4 : 2);
    for (const line of this.lines) {
      const { color, dash } = lookOf(line.run);
      const columns = [line.x, line.y];
      const points = { show: line.points || line.y.length === 1, size: 7, fill: color, stroke: color };
      series.push({ label: line.label, stroke: color, width: line.faint ? 1 : 1.75, alpha: line.faint ? 0.5 : 1,
        dash: line.faint ? [3, 4] : line.points && this.spec.mixed ? [5, 4] : dash, points, auto: !line.faint });
      if (areBands && hasBand(line)) {
        columns.push(line.low, line.high);
        const edge = { stroke: "transparent", width: 0, points: { show: false } };
        bands.push({ series: [series.length + 1, series.length], fill: `${color}${line.points ? "38" : "26"}` });
        series.push({ ...edge }, { ...edge });
      }
      tables.push(columns);
    }
    return { series, bands, tables };
  }

  options(state, series, bands) {
    const ink = css("--muted"), grid = css("--line");
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1, size: 4 }, font: "12px system-ui, sans-serif" };
    const isLog = state.log && this.spec.canLog && this.lines.every(line => line.y.every(value => value === null || value > 0));
    return {
      width: this.width(), height: this.spec.wide ? 320 : 240,
      series, bands,
      legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => this.zoomed(low, high) },
        y: isLog ? { distr: 3 } : { range: (_, low, high) => span(low, high) } },
      axes: [
        { ...axis, values: (_, found) => found.map(short), label: AXES[state.axis], labelSize: 18, labelFont: axis.font, size: 32, space: 64 },
        { ...axis, values: (_, found) => this.spec.axisFormat ? found.map(bytes) : even(found), space: 34,
          size: (_, found) => 18 + 6.6 * Math.max(3, ...(found ?? []).map(text => text.length)) },
      ],
      cursor: { sync: { key: SYNC, scales: ["x", null] }, y: false, points: { show: false }, drag: { x: true, y: false } },
      hooks: {
        setCursor: [plot => this.moved(plot)],
        draw: [plot => this.spec.marks && drawMarks(plot, state)],
        ...(this.spec.zero ? { drawAxes: [plot => drawZero(plot)] } : {}),
      },
    };
  }

  // All of the runs, or the part that was chosen; the same in every chart.
  zoomed(low, high) {
    const { x } = this.chart?.data ? { x: this.chart.data[0] } : { x: null };
    const isWhole = low === null || !x || (low <= x[0] && high >= x[x.length - 1]);
    return isWhole ? this.state.span : low === high ? [low - 1, high + 1] : [low, high];
  }

  width() { return Math.max(220, Math.floor(this.plot.clientWidth)); }

  resize() {
    if (this.chart && this.chart.width !== this.width()) this.chart.setSize({ width: this.width(), height: this.chart.height });
  }

  // What the lines say at a place of the x axis, each by its nearest point.
  reading(value) {
    return this.lines.map(line => ({ line, place: nearest(line.x, value) }));
  }

  moved(plot) {
    const { left } = plot.cursor;
    if (left === null || left < 0 || !this.plot.matches(":hover, :focus")) {
      this.tip.hidden = true;
      return;
    }
    this.show(this.reading(plot.posToVal(left, "x")), left, plot);
  }

  show(found, left, plot) {
    const rows = found.slice(0, 12).map(({ line, place }) => el("div", {},
      el("i", { class: line.points ? "dot" : "dash" }), `${line.label}: ${this.text(line, place)}`));
    rows.forEach((row, number) => row.firstChild.style.setProperty("--own", lookOf(found[number].line.run).color));
    if (found.length > rows.length) rows.push(el("div", {}, `and ${found.length - rows.length} more`));
    this.tip.replaceChildren(...rows);
    this.tip.hidden = false;
    const { offsetLeft, clientWidth } = plot.over;
    const room = this.plot.clientWidth - this.tip.offsetWidth - 4;
    const beside = offsetLeft + left + 14;
    this.tip.style.left = `${Math.max(0, beside <= room ? beside : Math.min(room, offsetLeft + left - this.tip.offsetWidth - 14))}px`;
    this.tip.style.top = `${plot.over.offsetTop + 6}px`;
  }

  text(line, place) {
    const format = this.spec.format ?? exact;
    const value = line.y[place], step = line.last[place], count = line.count?.[place] ?? 1;
    const where = count > 1 ? `steps ${exact(step - count + 1)} to ${exact(step)}` : `step ${exact(step)}`;
    const hasRange = line.low && line.low[place] !== null && line.low[place] !== undefined && line.low[place] !== line.high[place];
    const range = hasRange ? (count > 1 ? `, ${format(line.low[place])} to ${format(line.high[place])}` : ` (${format(line.low[place])} to ${format(line.high[place])})`) : "";
    return `${format(value)}${range} at ${where}`;
  }

  // Arrow keys walk along the points of the first line, and say what all lines are there.
  key(event) {
    if (!this.chart || event.altKey || event.ctrlKey || event.metaKey) return;
    const { x } = this.lines.reduce((most, line) => line.x.length > most.x.length ? line : most);
    const last = x.length - 1, now = this.at ?? -1;
    const next = { ArrowRight: now + 1, ArrowLeft: this.at === null ? last : now - 1, PageDown: now + 10, PageUp: now - 10, Home: 0, End: last }[event.key];
    if (event.key === "Escape") this.chart.setScale("x", { min: null, max: null });
    if (next === undefined) return;
    event.preventDefault();
    this.at = Math.max(0, Math.min(last, next));
    const left = this.chart.valToPos(x[this.at], "x");
    this.chart.setCursor({ left, top: 10 });
    const found = this.reading(x[this.at]);
    this.show(found, left, this.chart);
    this.said.textContent = found.map(({ line, place }) => `${line.label}: ${this.text(line, place)}`).join("; ");
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    this.said.textContent = "";
  }

  // The numbers behind the lines, when somebody wants them.
  tabulate() {
    const tables = this.details.querySelectorAll(".scroll");
    tables.forEach(each => each.remove());
    if (!this.details.open) return;
    const format = this.spec.format ?? exact;
    for (const line of this.lines) {
      const every = Math.ceil(line.x.length / ROWS);
      const rows = [];
      for (let place = line.x.length - 1; place >= 0; place -= every) {
        const low = line.low?.[place] ?? null, high = line.high?.[place] ?? null;
        rows.unshift([exact(line.last[place]), format(line.y[place]), format(low), format(high)]);
      }
      const told = every > 1 ? `${line.label}: every ${every}th point` : line.label;
      this.details.append(table(told, ["up to step", line.points ? "value" : "mean", "low", "high"], rows));
    }
  }
}

// Numbers of an axis in one style.
function even(values) {
  const most = Math.max(...values.map(value => Math.abs(value ?? 0)));
  return values.map(value => value === null ? "" : most > 0 && most < 0.005 && value ? (+value.toPrecision(3)).toExponential() : short(value));
}

function span(low, high) {
  if (low === null) return [0, 1];
  const room = high > low ? 0.06 * (high - low) : Math.abs(low) * 0.1 || 1;
  return [low - room, high + room];
}

function drawZero(plot) {
  const { ctx, bbox } = plot, y = plot.valToPos(0, "y", true);
  if (y < bbox.top || y > bbox.top + bbox.height) return;
  ctx.save();
  ctx.strokeStyle = css("--fg");
  ctx.lineWidth = devicePixelRatio;
  ctx.beginPath();
  ctx.moveTo(bbox.left, y);
  ctx.lineTo(bbox.left + bbox.width, y);
  ctx.stroke();
  ctx.restore();
}

// Commits are ticks at the bottom, resumes dotted lines, incidents and rollbacks dashed lines with a cross.
function drawMarks(plot, state) {
  const { ctx, bbox } = plot, pixel = devicePixelRatio, { top, height, left, width } = bbox;
  ctx.save();
  for (const [number, run] of state.runs.entries()) {
    if (state.hidden.has(number)) continue;
    const { color } = lookOf(number);
    run.timeline.happenings.forEach(({ kind }, place) => {
      const x = plot.valToPos(run.timeline[state.axis][place], "x", true);
      if (kind === "start" || x < left || x > left + width) return;
      const isBad = kind === "incident" || kind === "rollback";
      ctx.beginPath();
      ctx.setLineDash(kind === "commit" ? [] : isBad ? [5 * pixel, 3 * pixel] : [pixel, 3 * pixel]);
      ctx.lineWidth = (kind === "commit" ? 1.5 : 1) * pixel;
      ctx.strokeStyle = isBad ? css("--bad") : color;
      ctx.moveTo(x, top + height);
      ctx.lineTo(x, kind === "commit" ? top + height - 7 * pixel : top);
      ctx.stroke();
      if (!isBad) return;
      const size = 4 * pixel;
      ctx.setLineDash([]);
      ctx.lineWidth = 2 * pixel;
      ctx.beginPath();
      ctx.moveTo(x - size, top + 2 * pixel);
      ctx.lineTo(x + size, top + 2 * pixel + 2 * size);
      ctx.moveTo(x + size, top + 2 * pixel);
      ctx.lineTo(x - size, top + 2 * pixel + 2 * size);
      ctx.stroke();
    });
  }
  ctx.restore();
}
