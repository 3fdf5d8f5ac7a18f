// A line or stacked-area chart of samples over time: SVG, a cursor for mouse and keyboard, and the same as a table.

import { clock } from "./format.js";

const NS = "http://www.w3.org/2000/svg";
const WIDTH = 400;
const HEIGHT = 150;
const LEFT = 46;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 20;
const TABLE_ROWS = 30;

export function svg(name, attributes = {}, ...children) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function html(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// The values at which an axis from 0 to `top` has its lines, the last at or above `top`.
export function ticks(top) {
  const rough = (top || 1) / 3;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  return Array.from({ length: Math.ceil((top || 1) / step - 1e-9) + 1 }, (_, index) => index * step);
}

// Without zeros that say nothing: "7.50 s" is "7.5 s", and nought is nought in every unit.
function axisText(text) {
  return text.replace(/(\.\d*?)0+(?=\D|$)/, "$1").replace(/\.(?=\D|$)/, "").replace(/^0 .*/, "0");
}

// `series`: [{ name, value: (sample) => number | null }], at most five; `format` turns a value into text.
export class Chart {
  constructor({ id, title, unit, series, format, isStacked = false }) {
    Object.assign(this, { series, format, isStacked });
    this.samples = [];
    this.cursor = null;
    this.legend = html("p", { class: "legend" });
    this.plot = svg("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
      tabindex: "0",
      role: "img",
      "aria-label": `${title}. Arrow keys move through time.`,
    });
    this.details = html("details", {}, html("summary", {}, "As a table"));
    this.spoken = html("p", { class: "visually-hidden", role: "status" });
    const head = html("div", {}, html("h2", { id: `${id}-title` }, title), " ", html("span", { class: "unit" }, unit));
    const attributes = { class: "chart", id, "aria-labelledby": `${id}-title` };
    this.node = html("section", attributes, head, this.legend, this.plot, this.details, this.spoken);
    this.listen();
  }

  listen() {
    this.plot.addEventListener("pointermove", (event) => {
      const box = this.plot.getBoundingClientRect();
      this.pointTo(((event.clientX - box.left) / box.width) * WIDTH);
    });
    this.plot.addEventListener("pointerleave", () => this.moveTo(null));
    this.plot.addEventListener("blur", () => this.moveTo(null));
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.samples.length) return;
      event.preventDefault();
      const last = this.samples.length - 1;
      const from = this.cursor ?? (step < 0 ? last + 1 : -1);
      this.moveTo(Math.min(Math.max(from + step, 0), last));
      this.spoken.textContent = this.describe(this.samples[this.cursor]);
    });
    this.details.addEventListener("toggle", () => this.fillTable());
  }

  pointTo(x) {
    if (!this.samples.length) return;
    const time = this.start + ((x - LEFT) / (WIDTH - LEFT - RIGHT)) * (this.end - this.start);
    let nearest = 0;
    for (let i = 1; i < this.samples.length; i += 1) {
      if (Math.abs(this.samples[i].time - time) < Math.abs(this.samples[nearest].time - time)) nearest = i;
    }
    this.moveTo(nearest);
  }

  moveTo(index) {
    this.cursor = index;
    this.draw();
  }

  describe(sample) {
    const values = this.series.map(({ name, value }) => `${name} ${this.format(value(sample))}`);
    return `${clock(sample.time)}: ${values.join(", ")}`;
  }

  show(samples, start, end) {
    const time = this.cursor === null ? null : this.samples[this.cursor]?.time;
    Object.assign(this, { samples, start, end });
    const found = time === null ? -1 : samples.findIndex((sample) => sample.time === time);
    this.cursor = found < 0 ? null : found;
    this.draw();
    if (this.details.open) this.fillTable();
  }

  x(time) {
    return LEFT + ((time - this.start) / (this.end - this.start)) * (WIDTH - LEFT - RIGHT);
  }

  // For each series the values to draw; stacked ones lie on those before them.
  layers() {
    const layers = this.series.map(({ value }) => this.samples.map(value));
    if (!this.isStacked) return layers;
    for (let i = 1; i < layers.length; i += 1) {
      layers[i] = layers[i].map((value, at) => (value === null ? null : value + layers[i - 1][at]));
    }
    return layers;
  }

  draw() {
    const layers = this.layers();
    const top = Math.max(0, ...layers.flat().filter((value) => value !== null));
    const lines = ticks(top);
    const scale = (HEIGHT - TOP - BOTTOM) / lines.at(-1);
    const y = (value) => HEIGHT - BOTTOM - value * scale;
    const parts = lines.flatMap((value) => [
      svg("line", { class: value ? "rule" : "base", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, top || !value ? axisText(this.format(value)) : ""),
    ]);
    parts.push(...this.timeMarks());
    if (this.isStacked) parts.push(...layers.map((_, i) => this.area(layers, i, y)).reverse());
    else parts.push(...this.lines(layers, y));
    if (!top) {
      const where = { class: "empty", x: (LEFT + WIDTH) / 2, y: HEIGHT / 2 - 8, "text-anchor": "middle" };
      parts.push(svg("text", where, "Nothing yet"));
    }
    if (this.cursor !== null) {
      const x = this.x(this.samples[this.cursor].time);
      parts.push(svg("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    this.plot.replaceChildren(...parts);
    this.drawLegend();
  }

  timeMarks() {
    const names = [["start", this.start], ["middle", (this.start + this.end) / 2], ["end", this.end]];
    return names.map(([anchor, time]) => {
      const text = anchor === "end" ? "now" : clock(time).slice(0, this.end - this.start > 120 ? 5 : 8);
      return svg("text", { x: this.x(time), y: HEIGHT - 5, "text-anchor": anchor }, text);
    });
  }

  lines(layers, y) {
    const marks = layers.map((values, i) =>
      svg("path", { class: `line s${i + 1} dash${i + 1}`, d: this.path(values, y) }),
    );
    if (layers.length === 1) marks.unshift(svg("path", { class: "area f1 soft", d: this.filled(layers[0], y) }));
    return marks;
  }

  path(values, y) {
    let d = "";
    let isDrawing = false;
    values.forEach((value, i) => {
      if (value === null) {
        isDrawing = false;
        return;
      }
      d += `${isDrawing ? "L" : "M"}${this.x(this.samples[i].time).toFixed(1)} ${y(value).toFixed(1)}`;
      isDrawing = true;
    });
    return d;
  }

  // Down to the axis from the first to the last value; gaps are bridged at zero.
  filled(values, y) {
    if (!values.length) return "";
    const points = values.map((v, i) => `L${this.x(this.samples[i].time).toFixed(1)} ${y(v ?? 0).toFixed(1)}`);
    const [first, last] = [this.x(this.samples[0].time), this.x(this.samples.at(-1).time)];
    return `M${first.toFixed(1)} ${y(0)}${points.join("")}L${last.toFixed(1)} ${y(0)}Z`;
  }

  area(layers, i, y) {
    return svg("path", { class: `area f${i + 1}`, d: this.filled(layers[i], y) });
  }

  drawLegend() {
    const sample = this.cursor === null ? this.samples.at(-1) : this.samples[this.cursor];
    const keys = this.series.map(({ name, value }, i) => {
      const mark = this.isStacked
        ? svg("rect", { class: `f${i + 1}`, width: 10, height: 10, rx: 2 })
        : svg("line", { class: `line s${i + 1} dash${i + 1}`, x1: 0, x2: 16, y1: 5, y2: 5 });
      const size = { width: this.isStacked ? 10 : 16, height: 10, "aria-hidden": "true" };
      const text = sample ? this.format(value(sample)) : "–";
      return html("span", { class: "key" }, svg("svg", size, mark), name, html("b", {}, text));
    });
    if (this.cursor !== null && sample) keys.push(html("span", {}, clock(sample.time)));
    this.legend.replaceChildren(...keys);
  }

  fillTable() {
    if (!this.details.open) {
      this.details.querySelector(".scroll")?.remove();
      return;
    }
    const heads = ["Time", ...this.series.map(({ name }) => name)].map((name) => html("th", { scope: "col" }, name));
    const every = Math.max(1, Math.ceil(this.samples.length / TABLE_ROWS));
    const rows = this.samples
      .filter((_, i) => (this.samples.length - 1 - i) % every === 0)
      .reverse()
      .map((sample) => {
        const cells = this.series.map(({ value }) => html("td", {}, this.format(value(sample))));
        return html("tr", {}, html("th", { scope: "row" }, clock(sample.time)), ...cells);
      });
    const table = html("table", {}, html("thead", {}, html("tr", {}, ...heads)), html("tbody", {}, ...rows));
    const old = this.details.querySelector(".scroll");
    const box = html("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "The chart as a table" }, table);
    if (!old) this.details.append(box);
    else if (!old.contains(document.activeElement)) old.firstElementChild.replaceWith(table);
  }
}
