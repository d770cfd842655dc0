// The gradient norm of each module over the steps of a run, as a map of colors; arrow keys walk through its cells.

const CELL = 15, LABEL = 118;

class HeatMap {
  constructor(runs) {
    this.runs = runs.map((run, number) => ({ run, number })).filter(({ run }) => run.modules);
    this.choice = el("select", { "aria-label": "Run", onchange: () => this.draw() },
      this.runs.map(({ run }, place) => el("option", { value: place }, run.name)));
    this.canvas = el("canvas", { tabindex: "0", role: "img", onkeydown: event => this.key(event),
      onmousemove: event => this.pointed(event), onmouseleave: () => this.say(null), onblur: () => this.say(null) });
    this.said = el("p", { class: "reading", role: "status", "aria-live": "polite" });
    this.scale = el("p", { class: "scale" });
    this.node = el("figure", { class: "chart wide", id: "modules" },
      el("figcaption", {}, el("h3", {}, "Gradient norm by module"),
        el("p", {}, "The largest norm of each column of steps, before clipping; the scale is logarithmic.")),
      this.runs.length > 1 ? this.choice : null, el("div", { class: "plot" }, this.canvas), this.said, this.scale);
    new ResizeObserver(() => this.draw()).observe(this.node);
  }

  draw() {
    const { modules } = this.runs[+this.choice.value || 0].run;
    this.modules = modules;
    this.columns = modules.first.length;
    const pixel = devicePixelRatio, width = Math.max(200, this.canvas.parentNode.clientWidth), label = width < 500 ? 84 : LABEL;
    const cell = Math.max(4, Math.min(CELL, Math.floor(460 / modules.names.length)));
    this.area = { label, cell, wide: (width - label) / this.columns, height: cell * modules.names.length };
    this.canvas.width = width * pixel;
    this.canvas.height = (this.area.height + 20) * pixel;
    this.canvas.style.width = `${width}px`;
    this.canvas.style.height = `${this.area.height + 20}px`;
    this.canvas.setAttribute("aria-label",
      `Gradient norm of ${modules.names.length} modules in ${this.columns} columns of steps. Arrow keys read the cells.`);
    const known = modules.norms.filter(norm => norm > 0);
    this.range = [Math.log(known.reduce((a, b) => Math.min(a, b), Infinity)), Math.log(known.reduce((a, b) => Math.max(a, b), 0))];
    this.paint();
    this.scale.replaceChildren(known.length ? exact(Math.exp(this.range[0])) : "–", el("span", { class: "ramp" }), known.length ? exact(Math.exp(this.range[1])) : "–");
  }

  paint() {
    const ctx = this.canvas.getContext("2d"), pixel = devicePixelRatio, { label, cell, wide, height } = this.area;
    ctx.setTransform(pixel, 0, 0, pixel, 0, 0);
    ctx.clearRect(0, 0, this.canvas.width, this.canvas.height);
    ctx.font = "11px system-ui, sans-serif";
    ctx.textBaseline = "middle";
    const every = Math.ceil(11 / cell), color = this.ramp(), ink = css("--muted");
    this.modules.names.forEach((name, row) => {
      for (let column = 0; column < this.columns; column++) {
        ctx.fillStyle = color(this.modules.norms[row * this.columns + column]);
        ctx.fillRect(label + column * wide, row * cell, Math.ceil(wide + 0.3), cell - (cell > 6 ? 1 : 0));
      }
      ctx.fillStyle = ink;
      ctx.textAlign = "right";
      if (row % every === 0) ctx.fillText(name.length > 18 ? `…${name.slice(-17)}` : name, label - 6, row * cell + cell / 2, label - 8);
    });
    ctx.fillStyle = ink;
    ctx.textAlign = "left";
    ctx.fillText(`step ${exact(this.modules.first[0])}`, label, height + 11);
    ctx.textAlign = "right";
    ctx.fillText(`step ${exact(this.modules.steps[this.columns - 1])}`, label + wide * this.columns, height + 11);
    if (!this.cell) return;
    ctx.strokeStyle = css("--fg");
    ctx.lineWidth = 2;
    ctx.strokeRect(label + this.cell[1] * wide, this.cell[0] * cell, wide, cell);
  }

  // A function from a norm to its color.
  ramp() {
    const [low, high] = this.range, none = css("--line");
    const stops = isDark() ? [[32, 38, 52], [70, 110, 190], [255, 186, 96]] : [[236, 241, 252], [70, 120, 210], [150, 30, 20]];
    return norm => {
      if (!(norm > 0)) return none;
      const part = high > low ? 2 * (Math.log(norm) - low) / (high - low) : 1;
      const start = stops[part < 1 ? 0 : 1], end = stops[part < 1 ? 1 : 2], share = part < 1 ? part : part - 1;
      return `rgb(${start.map((value, place) => Math.round(value + (end[place] - value) * share)).join(",")})`;
    };
  }

  say(cell) {
    this.cell = cell;
    this.paint();
    if (!cell) {
      this.said.textContent = "";
      return;
    }
    const [row, column] = cell, { first, steps, names, norms } = this.modules;
    const where = first[column] === steps[column] ? `step ${exact(first[column])}` : `steps ${exact(first[column])} to ${exact(steps[column])}`;
    this.said.textContent = `${names[row]}, ${where}: ${exact(norms[row * this.columns + column])}`;
  }

  pointed(event) {
    const { label, cell, wide } = this.area;
    const row = Math.floor(event.offsetY / cell), column = Math.floor((event.offsetX - label) / wide);
    const isInside = row >= 0 && row < this.modules.names.length && column >= 0 && column < this.columns;
    this.say(isInside ? [row, column] : null);
  }

  key(event) {
    const moves = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    const [row, column] = this.cell ?? [0, -1], [down, across] = moves[event.key];
    const within = (value, count) => Math.max(0, Math.min(count - 1, value));
    this.say([within(row + down, this.modules.names.length), within(column + across, this.columns)]);
  }
}
