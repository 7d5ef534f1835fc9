// Talking to the server: requests, streams and keys, and what their errors are in plain words.

const base = new URL(".", location.href).href.replace(/\/$/, "");

class Refusal extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = {...options.headers, ...(keyStore.read() ? {"X-Moondream-Auth": keyStore.read()} : {})};
  let response;
  try {
    response = await fetch(`${base}${path}`, {...options, headers});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Is it still running?");
  }
  if (!response.ok) throw await refusalOf(response);
  return response;
}

function post(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  return call(path, {method: "POST", headers, body: JSON.stringify(body), signal});
}

async function refusalOf(response) {
  if (response.status === 401) {
    const refused = "This server does not accept this API key. Type another one, and run again.";
    const missing = "This server asks for an API key. Type it in, and run again.";
    return new Refusal(keyStore.read() ? refused : missing, 401);
  }
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? body?.message ?? body?.detail;
  const text = typeof said === "string" && said ? said : "the server does not say why";
  return new Refusal(`${sentence(text)} (${response.status})`, response.status);
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

// The JSON objects of a stream of server-sent events.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new Refusal("The answer broke off: the connection to the server is lost.");
    });
    if (done) return;
    const blocks = (rest + value).split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

// The API key lives as long as the tab; where the browser allows no storage, as long as the page.
const keyStore = {
  kept: "",
  read() {
    try {
      return sessionStorage.getItem("moondream-cv key") ?? this.kept;
    } catch {
      return this.kept;
    }
  },
  write(key) {
    this.kept = key;
    try {
      sessionStorage.setItem("moondream-cv key", key);
    } catch {
      // `kept` has it
    }
  },
};
