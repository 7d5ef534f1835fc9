// Requests to the server, streams and API keys. Errors have messages for users.

const base = new URL(".", location.href).href.replace(/\/$/, "");

class UserError extends Error {
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
    throw new UserError("The server cannot be reached. Check that it is running.");
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

function post(path, body, signal) {
  const headers = {"Content-Type": "application/json"};
  return call(path, {method: "POST", headers, body: JSON.stringify(body), signal});
}

async function errorOf(response) {
  if (response.status === 401) {
    const invalid = "The API key is invalid. Enter another one and run again.";
    const missing = "This server requires an API key. Enter it and run again.";
    return new UserError(keyStore.read() ? invalid : missing, 401);
  }
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? body?.message ?? body?.detail;
  const text = typeof message === "string" && message ? message : "the server returned no error message";
  return new UserError(`${sentence(text)} (${response.status})`, response.status);
}

function sentence(text) {
  return `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;
}

// Yields the JSON objects of a stream of server-sent events.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new UserError("The answer is incomplete: the connection to the server was lost.");
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

// The API key is kept until the tab is closed, or until the page is left if the browser allows no storage.
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
      // no storage; use `kept`
    }
  },
};
