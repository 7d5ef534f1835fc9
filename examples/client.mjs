/** Detect objects and stream a caption with a server, in JavaScript: fetch only, no packages.
 *
 *     moondream-cv serve --model tiny
 *     node examples/client.mjs photo.jpg dog [http://localhost:2020]
 *
 * Requires Node.js 18 or later. The API key of the server, if it has one, comes from MOONDREAM_API_KEY. In a browser,
 * FileReader.readAsDataURL returns a valid image_url, and the server needs --cors https://page.example. The npm package
 * moondream works as well: new vl({ endpoint: "http://localhost:2020/v1", apiKey }).
 */
import { readFile } from "node:fs/promises";

const [path, name, url = "http://localhost:2020"] = process.argv.slice(2);
const key = process.env.MOONDREAM_API_KEY;

/** Send a request to /v1/detect, /v1/point, /v1/query or /v1/caption, and return the response. */
async function post(skill, body) {
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  const request = { method: "POST", headers, body: JSON.stringify(body) };
  const response = await fetch(`${url}/v1/${skill}`, request).catch((error) => {
    throw new Error(`${url} cannot be reached (${error.cause?.code ?? error.message}); start moondream-cv serve`);
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  return response;
}

/** Yield the data of server-sent events. A chunk of the network may end anywhere, also inside an event. */
async function* events(response) {
  let text = "";
  for await (const chunk of response.body.pipeThrough(new TextDecoderStream())) {
    const complete = (text + chunk).split("\n\n");
    text = complete.pop();
    for (const event of complete) yield JSON.parse(event.replace(/^data: /, ""));
  }
}

async function main() {
  if (!name) throw new Error("Usage: node examples/client.mjs IMAGE CLASS [URL]");
  const image = (await readFile(path)).toString("base64");

  const { objects } = await (await post("detect", { image_url: image, object: name })).json();
  console.log(`${name}: ${objects.length} found`);
  for (const { x_min, y_min, x_max, y_max, confidence } of objects) {
    console.log([x_min, y_min, x_max, y_max].map((value) => value.toFixed(3)).join(" "), confidence.toFixed(2));
  }

  for await (const event of events(await post("caption", { image_url: image, length: "short", stream: true }))) {
    if (event.error) throw new Error(event.error.message);
    process.stdout.write(event.chunk ?? "\n");
  }
}

main().catch((error) => {
  console.error(error.message);
  process.exitCode = 1;
});
