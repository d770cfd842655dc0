// Small pieces: elements without markup, packed numbers, formats, colors.

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value === "boolean") made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter(child => child !== null && child !== undefined));
  return made;
}

function unpack(text, kind = Float64Array) {
  const bytes = Uint8Array.from(atob(text), sign => sign.charCodeAt(0));
  return new kind(bytes.buffer);
}

const AXES = { steps: "step", tokens: "tokens", hours: "hours in steps" };

// The number with six significant digits.
function exact(value) {
  if (typeof value === "string") return value; // NaN and infinity are words in JSON
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en-US");
  const size = Math.abs(value);
  return size >= 1e-4 && size < 1e6 ? String(+value.toPrecision(6)) : value.toExponential(3);
}

// The number as short as an axis needs it.
function short(value) {
  if (value === null) return "";
  for (const [size, sign] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (Math.abs(value) >= size) return `${+(value / (sign === "k" ? 1e3 : size)).toPrecision(4)}${sign}`;
  return Math.abs(value) >= 1e-3 || value === 0 ? String(+value.toPrecision(4)) : value.toExponential();
}

function bytes(value) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(Math.max(1, Math.abs(value))) / 3)));
  return `${+(value / 1000 ** power).toPrecision(4)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

const LIGHT = ["#1d5fd6", "#c2410c", "#0b7a55", "#a3218e", "#6d3bd1", "#0b6e8a", "#8a5a00", "#b3163f"];
const DARK = ["#7fb0ff", "#ff9d63", "#55d6a0", "#f08be0", "#b7a2ff", "#63cfe6", "#e3bf55", "#ff8aa2"];
const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3]];

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

// The color and the dashes of a run: eight colors, then the same ones dashed.
function lookOf(run) {
  const colors = isDark() ? DARK : LIGHT;
  return { color: colors[run % colors.length], dash: DASHES[Math.floor(run / colors.length) % DASHES.length] };
}

function css(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// The place of the number nearest to one, among ascending ones.
function nearest(values, wanted) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle;
    else high = middle;
  }
  return high > 0 && wanted - values[low] > values[high] - wanted ? high : low;
}

// A table that scrolls by itself where it is too wide, also by keyboard.
function table(caption, head, rows, attributes = {}) {
  const cell = (tag, text, place) => el(tag, { scope: tag === "th" ? (place === null ? "row" : "col") : null }, text);
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption, ...attributes },
    el("table", {}, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((text, place) => cell("th", text, place)))),
      el("tbody", {}, rows.map(([first, ...others]) =>
        el("tr", {}, cell("th", first, null), others.map(text => cell("td", text)))))));
}
