// Draws what the server remembers of the last minutes, and goes on asking for what is new.

import { Chart, html, svg } from "./chart.js";
import { clock, count, parts, seconds, share } from "./format.js";
import { Mosaic, legend } from "./mosaic.js";

const element = (id) => document.getElementById(id);
const KEY = "tessera-api-key"; // Of the tab's session storage, where the playground has it, too.
const DATA = new URL("dashboard/data", document.baseURI);

const state = { samples: [], last: null, span: 300, replicas: new Map(), key: sessionStorage.getItem(KEY) ?? "" };

const percentiles = (name) =>
  ["p50", "p90", "p99"].map((label, i) => ({ name: label, value: (sample) => sample[name][i] }));
const field = (name, key) => ({ name, value: (sample) => sample[key] });

const charts = [
  new Chart({ id: "ttft", title: "First token", unit: "from the request's arrival", series: percentiles("ttft"), format: seconds }),
  new Chart({ id: "itl", title: "Between tokens", unit: "as they reach the gateway", series: percentiles("itl"), format: seconds }),
  new Chart({
    id: "phases",
    title: "Where the time goes",
    unit: "mean of a request",
    series: ["gateway", "queue", "prefill", "decode", "stream"].map((name, i) => ({
      name,
      value: (sample) => sample.phases[i],
    })),
    format: seconds,
    isStacked: true,
  }),
  new Chart({
    id: "tokens",
    title: "Tokens",
    unit: "per second",
    series: [field("generated", "generation_tokens"), field("in prompts", "prompt_tokens")],
    format: count,
  }),
  new Chart({
    id: "requests",
    title: "Requests",
    unit: "in the engine",
    series: [field("running", "running"), field("waiting", "waiting")],
    format: count,
  }),
  new Chart({
    id: "batch",
    title: "Batch",
    unit: "requests in a step, on average",
    series: [field("batch", "batch")],
    format: count,
  }),
  new Chart({ id: "e2e", title: "Whole request", unit: "until its last text is on its way", series: percentiles("e2e"), format: seconds }),
  new Chart({ id: "busy", title: "Engine busy", unit: "share of the time", series: [field("busy", "busy")], format: share }),
  new Chart({ id: "usage", title: "Memory used", unit: "share of the blocks", series: [field("used", "memory")], format: share }),
];

class Vital {
  constructor(id, title) {
    this.value = html("dd", { class: "value" }, "–");
    this.aside = html("dd", { class: "aside" });
    this.node = html("div", { id: `vital-${id}` }, html("dt", {}, title), this.value, this.aside);
  }

  show(text, aside, isBad = false) {
    const [number, unit] = parts(text);
    this.value.replaceChildren(number, " ", html("span", { class: "unit" }, unit));
    this.aside.textContent = aside;
    this.node.classList.toggle("bad", isBad);
  }
}

const vitals = {
  requests: new Vital("requests", "Requests"),
  tokens: new Vital("tokens", "Tokens"),
  ttft: new Vital("ttft", "First token, p50"),
  itl: new Vital("itl", "Between tokens, p50"),
  memory: new Vital("memory", "Memory used"),
  trouble: new Vital("trouble", "Refused or failed"),
};

function showVitals(samples) {
  const now = samples.at(-1);
  if (!now) return;
  vitals.requests.show(`${count(now.running)} running`, `${count(now.waiting)} waiting`);
  vitals.tokens.show(`${count(now.generation_tokens)} per s`, `${count(now.requests)} answers per s`);
  vitals.ttft.show(seconds(now.ttft[0]), `p99 ${seconds(now.ttft[2])}`);
  vitals.itl.show(seconds(now.itl[0]), `p99 ${seconds(now.itl[2])}`);
  vitals.memory.show(share(now.memory), `${count(now.replicas)} ${now.replicas === 1 ? "replica" : "replicas"}`);
  const per = samples.reduce((sum, sample) => sum + sample.refused + sample.failed, 0) / samples.length;
  vitals.trouble.show(`${count(per)} per s`, "on average", per > 0);
}

function showHealth(data) {
  const pill = element("health");
  const text = !data.is_up ? "Engine silent" : data.is_draining ? "Draining" : "Healthy";
  if (pill.textContent !== text) pill.textContent = text;
  pill.classList.toggle("bad", text !== "Healthy");
  const gateways = data.gateways > 1 ? ` · ${data.gateways} gateways` : "";
  element("model").textContent = `${data.model} · ${data.dtype} on ${data.device} (${data.kernel}) · ${data.version}${gateways}`;
}

function showReplicas(replicas) {
  const rows = replicas.map((replica) => {
    const before = state.replicas.get(replica.name)?.figures ?? replica;
    const past = state.last ? (performance.now() - state.last) / 1000 : 0;
    const perSecond = (key) => (past ? Math.max(replica[key] - before[key], 0) / past : null);
    const cells = [
      count(replica.running),
      count(replica.waiting),
      count(perSecond("tokens")),
      share(past ? Math.min(perSecond("step_s"), 1) : null),
      share((replica.blocks - replica.free_blocks) / Math.max(replica.blocks, 1)),
      `${replica.slots - replica.free_slots} of ${replica.slots}`,
      count(replica.preemptions),
      seconds(replica.start_up_s),
    ];
    return html("tr", {}, html("th", { scope: "row" }, replica.name), ...cells.map((text) => html("td", {}, text)));
  });
  element("replicas").tBodies[0].replaceChildren(...rows);
}

function showMosaics(replicas) {
  const names = new Set(replicas.map((replica) => replica.name));
  for (const [name, known] of state.replicas) {
    if (names.has(name)) continue;
    known.mosaic.node.remove();
    state.replicas.delete(name);
  }
  for (const replica of replicas) {
    let known = state.replicas.get(replica.name);
    if (!known) {
      known = { mosaic: new Mosaic(replica.name) };
      state.replicas.set(replica.name, known);
      element("mosaics").append(known.mosaic.node);
    }
    known.figures = replica;
    known.mosaic.show(replica);
  }
}

function showCharts() {
  const end = state.samples.at(-1)?.time ?? Date.now() / 1000;
  const start = end - state.span;
  const shown = state.samples.filter((sample) => sample.time >= start);
  for (const chart of charts) chart.show(shown, start, end);
  showVitals(shown);
}

// A server that was started anew counts from the beginning: what is known of the old one goes.
function take(data) {
  const newest = state.samples.at(-1)?.number ?? 0;
  const fresh = data.samples.filter((sample) => sample.number > newest);
  state.samples.push(...fresh);
  state.samples.splice(0, state.samples.length - data.num_samples);
  showHealth(data);
  showReplicas(data.replicas);
  showMosaics(data.replicas);
  showCharts();
  state.last = performance.now();
}

function lost(text) {
  element("health").textContent = text;
  element("health").classList.add("bad");
}

async function ask() {
  const url = new URL(DATA);
  url.searchParams.set("after", String(state.samples.at(-1)?.number ?? 0));
  // A key the browser cannot send in a header is left out, and so refused.
  const headers = /^[!-~]+$/.test(state.key) ? { Authorization: `Bearer ${state.key}` } : {};
  const response = await fetch(url, { headers, signal: AbortSignal.timeout(10000) });
  const isRefused = response.status === 401 || response.status === 403;
  element("key-form").hidden = !isRefused;
  if (isRefused) {
    lost("Needs a key");
    return 5;
  }
  if (!response.ok) throw new Error(`status ${response.status}`);
  const data = await response.json();
  take(data);
  return data.period_s;
}

async function watch() {
  for (;;) {
    let pause = 2;
    try {
      pause = await ask();
    } catch {
      lost(`No answer since ${clock(Date.now() / 1000)}`);
      state.samples = [];
    }
    await new Promise((resolve) => {
      setTimeout(resolve, pause * 1000);
      state.wake = resolve;
    });
    // Nobody looks: nothing is asked until somebody does.
    if (document.hidden) await new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
  }
}

element("charts").append(...charts.map((chart) => chart.node));
element("vitals").append(...Object.values(vitals).map((vital) => vital.node));
element("memory-legend").append(
  ...legend().map(([variable, name]) => {
    const mark = svg("rect", { width: 10, height: 10, rx: 2, fill: `var(${variable})` });
    return html("span", { class: "key" }, svg("svg", { width: 10, height: 10, "aria-hidden": "true" }, mark), name);
  }),
);
element("span").addEventListener("change", (event) => {
  state.span = Number(event.target.value);
  showCharts();
});
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.key = element("key").value.trim();
  sessionStorage.setItem(KEY, state.key);
  state.wake?.();
});
addEventListener("resize", () => {
  for (const { mosaic, figures } of state.replicas.values()) mosaic.draw(figures.tiles);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("resize")));

watch();
