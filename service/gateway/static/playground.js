// Tries the served model out: sends one streamed completion at a time and shows it as it comes.

const element = (id) => document.getElementById(id);
const form = element("form");
const ROOT = new URL("../", import.meta.url); // Of the server, wherever a proxy shows it.
const API = new URL("v1/completions", ROOT);

const KEY = "tessera-api-key"; // Of the tab's session storage.

let running = null; // The AbortController of the request in flight.

function requestBody() {
  const body = {
    prompt: element("prompt").value,
    max_tokens: Number(element("max-tokens").value),
    temperature: Number(element("temperature").value),
    top_p: Number(element("top-p").value),
    stream: true,
    stream_options: { include_usage: true },
  };
  const seed = element("seed").value.trim();
  if (seed) body.seed = Number(seed);
  return body;
}

function curlCommand() {
  const quoted = JSON.stringify(requestBody(), null, 1).replace(/\n\s*/g, " ").replaceAll("'", "'\\''");
  const key = apiKey() ? ` \\\n  -H "Authorization: Bearer $TESSERA_API_KEY"` : "";
  return `curl -N ${API} \\\n  -H 'Content-Type: application/json'${key} \\\n  -d '${quoted}'`;
}

function apiKey() {
  return element("key").value.trim();
}

// What a request to the server carries. A key the browser cannot send in a header is left out, and so refused.
function headers(more = {}) {
  const key = apiKey();
  return /^[!-~]+$/.test(key) ? { ...more, Authorization: `Bearer ${key}` } : more;
}

function askForKey() {
  element("key-field").hidden = false;
  element("key").focus();
}

function keepKey() {
  sessionStorage.setItem(KEY, apiKey());
  showModel();
}

function showSettings() {
  const isExact = Number.isSafeInteger(Number(element("seed").value));
  element("seed").setCustomValidity(isExact ? "" : "A browser cannot send a whole number this large exactly.");
  element("temperature-value").value = Number(element("temperature").value).toFixed(2);
  element("top-p-value").value = Number(element("top-p").value).toFixed(2);
  element("curl").textContent = curlCommand();
}

function showError(message) {
  element("error").textContent = message;
  element("error").hidden = !message;
}

function showRunning(isRunning) {
  element("generate").disabled = isRunning;
  element("stop").disabled = !isRunning;
  element("caret").hidden = !isRunning;
  element("output").setAttribute("aria-busy", String(isRunning));
}

function clearResult(prompt) {
  showError("");
  element("echo").textContent = prompt;
  element("text").textContent = "";
  for (const id of ["tokens", "rate", "ttft", "finish"]) element(id).textContent = "–";
  showSeed(null);
}

function showSeed(seed) {
  const button = element("reuse");
  button.textContent = seed ?? "–";
  button.disabled = seed === null;
  button.setAttribute("aria-label", seed === null ? "No seed yet" : `Use seed ${seed} again`);
}

// Yields the data of each server-sent event. An event ends with an empty line, wherever the network cut it.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (pending + value).split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: ")) yield part.slice("data: ".length);
    }
  }
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

class Result {
  constructor() {
    this.sentAt = performance.now();
    this.firstAt = null;
    this.lastAt = null;
    this.numChunks = 0;
    this.isDone = false;
    this.finish = "";
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    const now = performance.now();
    if (this.firstAt === null) {
      this.firstAt = now;
      element("ttft").textContent = `${(now - this.sentAt).toFixed(0)} ms`;
      showSeed(chunk.seed);
    }
    for (const choice of chunk.choices) {
      this.lastAt = now;
      this.numChunks += 1;
      element("text").append(choice.text);
      if (choice.finish_reason) this.showFinish(choice);
    }
    if (chunk.usage) this.showTokens(chunk.usage.completion_tokens, "");
    else if (chunk.choices.length) this.showTokens(this.numChunks, "≈ ");
  }

  // While it runs, a chunk is taken for a token; the usage at the end is exact.
  showTokens(count, about) {
    element("tokens").textContent = about + count;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    if (count > 1 && seconds > 0) element("rate").textContent = about + ((count - 1) / seconds).toFixed(0);
  }

  showFinish(choice) {
    const reasons = { stop: "end of text", length: "max tokens reached" };
    this.finish = reasons[choice.finish_reason] ?? choice.finish_reason;
    element("finish").textContent = this.finish;
  }
}

async function stream(body, signal) {
  const result = new Result();
  const response = await fetch(API, {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
  if (response.status === 401) askForKey();
  if (!response.ok) throw new Error(await errorOf(response));
  for await (const data of events(response)) {
    if (data === "[DONE]") result.isDone = true;
    else result.take(JSON.parse(data));
  }
  if (!result.isDone) throw new Error("The connection ended before the answer was complete.");
  return result;
}

async function generate() {
  if (running || !form.reportValidity()) return;
  const body = requestBody();
  const controller = new AbortController();
  running = controller;
  clearResult(body.prompt);
  showRunning(true);
  element("status").textContent = "Generating";
  try {
    const result = await stream(body, controller.signal);
    element("status").textContent = `Finished: ${result.finish}`;
  } catch (error) {
    if (controller.signal.aborted) {
      element("finish").textContent = "stopped by you";
      element("status").textContent = "Stopped";
    } else {
      const isNetwork = error instanceof TypeError;
      showError(isNetwork ? "The server cannot be reached, or the connection broke." : error.message);
      element("finish").textContent = "failed";
      element("status").textContent = "";
    }
  } finally {
    running = null;
    showRunning(false);
  }
}

function stop() {
  running?.abort();
}

async function copyCurl() {
  const button = element("copy");
  try {
    await navigator.clipboard.writeText(element("curl").textContent);
    button.textContent = "Copied";
  } catch {
    // Without a secure context there is no clipboard: select the text for Ctrl+C.
    getSelection().selectAllChildren(element("curl"));
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

async function showModel() {
  try {
    const response = await fetch(new URL("v1/models", ROOT), { headers: headers() });
    if (response.status === 401) {
      askForKey();
      element("model").textContent = await errorOf(response);
      return;
    }
    const [model] = (await response.json()).data;
    element("model").textContent = `${model.id} · up to ${model.max_model_len} tokens`;
    element("max-tokens").max = String(model.max_model_len);
  } catch {
    element("model").textContent = "The server does not say what it serves.";
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  generate();
});
form.addEventListener("input", showSettings);
element("key").addEventListener("change", keepKey);
element("stop").addEventListener("click", stop);
element("copy").addEventListener("click", copyCurl);
element("reuse").addEventListener("click", () => {
  element("seed").value = element("reuse").textContent;
  showSettings();
  element("generate").focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    generate();
  } else if (event.key === "Escape") {
    stop();
  }
});

element("key").value = sessionStorage.getItem(KEY) ?? "";
element("key-field").hidden = !apiKey();
showSettings();
showModel();
