// What the page asks, as code that runs elsewhere. These functions know nothing of the page. An ask is
// {url, task, names, text, length, reasoning, file, mime, keyed, threshold}.

const RECIPES = {python: pythonRecipe, client: clientRecipe, curl: curlRecipe};
const RECIPE_HINTS = {
  python: "pip install moondream-cv",
  client: "pip install moondream: Moondream's own client, with this server as its endpoint",
  curl: "Needs a POSIX shell with base64. The image goes into the request's body, too long for a command line.",
};

// JSON strings are Python strings, too.
const literal = (value) => JSON.stringify(value);
const listOf = (values) => (values.length === 1 ? literal(values[0]) : `[${values.map(literal).join(", ")}]`);
const shellQuoted = (text) => `'${text.replace(/'/g, "'\\''")}'`;

function pythonRecipe(ask) {
  const key = ask.keyed ? `, api_key=os.environ["MOONDREAM_API_KEY"]` : "";
  const model = `connect(${literal(ask.url)}${key})`;
  const head = ask.keyed ? ["import os", ""] : [];
  if (ask.task === "query" || ask.task === "caption") {
    const lines = ["from moondream_cv import connect", "", `model = ${model}`, ...textLines(ask, literal(ask.file))];
    return [...head, ...lines].join("\n");
  }
  const finder = ask.task === "detect" ? "Detector" : "Pointer";
  const least = ask.threshold > 0 ? `, confidence=${ask.threshold}` : "";
  const place = ask.task === "detect" ? "box" : "box[:2]";
  return [
    ...head,
    `from moondream_cv import ${finder}, connect`,
    "",
    `model = ${model}`,
    `found = ${finder}(model${least})(${literal(ask.file)}, ${listOf(ask.names)})`,
    `for name, box, confidence in zip(found.data["class_name"], found.xyxy, found.confidence):`,
    `    print(name, ${place}.round(1), confidence.round(2))  # pixels`,
  ].join("\n");
}

function clientRecipe(ask) {
  const key = ask.keyed ? `, api_key=os.environ["MOONDREAM_API_KEY"]` : "";
  const lines = [
    ...(ask.keyed ? ["import os", ""] : []),
    "import moondream",
    "from PIL import Image, ImageOps",
    "",
    `model = moondream.vl(endpoint=${literal(`${ask.url}/v1`)}${key})`,
    `image = ImageOps.exif_transpose(Image.open(${literal(ask.file)}))`,
  ];
  if (ask.task === "query" || ask.task === "caption") return [...lines, ...textLines(ask, "image")].join("\n");
  const call = `model.${ask.task}(image, name)["${ask.task === "detect" ? "objects" : "points"}"]`;
  return [
    ...lines,
    `for name in [${ask.names.map(literal).join(", ")}]:`,
    `    print(name, ${call})  # fractions of the width and height`,
  ].join("\n");
}

function textLines(ask, image) {
  const settings = `settings={"temperature": 0}`;
  if (ask.task === "caption") {
    return [`print(model.caption(${image}, length=${literal(ask.length)}, ${settings})["caption"])`];
  }
  if (!ask.reasoning) return [`print(model.query(${image}, ${literal(ask.text)}, ${settings})["answer"])`];
  return [
    `reply = model.query(${image}, ${literal(ask.text)}, reasoning=True, ${settings})`,
    `print(reply["reasoning"]["text"])`,
    `print(reply["answer"])`,
  ];
}

function curlRecipe(ask) {
  const many = ask.names.length > 1 && (ask.task === "detect" || ask.task === "point");
  const {object, ...rest} = bodyOf(ask, ask.names[0]);
  const fields = JSON.stringify(object === undefined || many ? rest : {object, ...rest}).slice(1, -1);
  const start = `{${fields}${fields && ", "}${many ? `"object": %s, ` : ""}"image_url": "data:${ask.mime};base64,`;
  const print = many ? `printf ${shellQuoted(start)} "$object"` : `printf %s ${shellQuoted(start)}`;
  const key = ask.keyed ? ` -H "X-Moondream-Auth: $MOONDREAM_API_KEY"` : "";
  const lines = [
    `{ ${print}`,
    `  base64 < ${shellQuoted(ask.file)} | tr -d '\\n'`,
    `  printf '"}'; } |`,
    `  curl -sS ${shellQuoted(`${ask.url}/v1/${ask.task}`)} -H 'Content-Type: application/json'${key} --data-binary @-`,
  ];
  if (!many) return lines.join("\n");
  const names = ask.names.map((name) => shellQuoted(JSON.stringify(name))).join(" ");
  return [`for object in ${names}; do`, ...lines.map((line) => `  ${line}`), "  echo", "done"].join("\n");
}

// A request's body, but for the image.
function bodyOf(ask, name) {
  if (ask.task === "detect" || ask.task === "point") return {object: name};
  const settings = {temperature: 0}; // so that the same question has the same answer
  if (ask.task === "caption") return {length: ask.length, settings};
  return {question: ask.text, ...(ask.reasoning ? {reasoning: true} : {}), settings};
}
