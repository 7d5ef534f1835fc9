// Generates code for the current request. These functions do not access the page. A request is
// {url, task, names, text, length, reasoning, file, mime, keyed, threshold}.

const RECIPES = {python: pythonRecipe, client: clientRecipe, curl: curlRecipe};
const RECIPE_HINTS = {
  python: "pip install moondream-cv",
  client: "pip install moondream (Moondream's client, with this server as its endpoint)",
  curl: "Requires a POSIX shell with base64. The request body has the image, which is too long for a command line.",
};

// JSON strings are valid Python strings.
const literal = (value) => JSON.stringify(value);
const listOf = (values) => (values.length === 1 ? literal(values[0]) : `[${values.map(literal).join(", ")}]`);
const shellQuoted = (text) => `'${text.replace(/'/g, "'\\''")}'`;

function pythonRecipe(request) {
  const key = request.keyed ? `, api_key=os.environ["MOONDREAM_API_KEY"]` : "";
  const model = `connect(${literal(request.url)}${key})`;
  const head = request.keyed ? ["import os", ""] : [];
  if (request.task === "query" || request.task === "caption") {
    const lines = textLines(request, literal(request.file));
    return [...head, "from moondream_cv import connect", "", `model = ${model}`, ...lines].join("\n");
  }
  const finder = request.task === "detect" ? "Detector" : "Pointer";
  const least = request.threshold > 0 ? `, confidence=${request.threshold}` : "";
  const place = request.task === "detect" ? "box" : "box[:2]";
  return [
    ...head,
    `from moondream_cv import ${finder}, connect`,
    "",
    `model = ${model}`,
    `found = ${finder}(model${least})(${literal(request.file)}, ${listOf(request.names)})`,
    `for name, box, confidence in zip(found.data["class_name"], found.xyxy, found.confidence):`,
    `    print(name, ${place}.round(1), confidence.round(2))  # pixels`,
  ].join("\n");
}

function clientRecipe(request) {
  const key = request.keyed ? `, api_key=os.environ["MOONDREAM_API_KEY"]` : "";
  const lines = [
    ...(request.keyed ? ["import os", ""] : []),
    "import moondream",
    "from PIL import Image, ImageOps",
    "",
    `model = moondream.vl(endpoint=${literal(`${request.url}/v1`)}${key})`,
    `image = ImageOps.exif_transpose(Image.open(${literal(request.file)}))`,
  ];
  if (request.task === "query" || request.task === "caption") {
    return [...lines, ...textLines(request, "image")].join("\n");
  }
  const call = `model.${request.task}(image, name)["${request.task === "detect" ? "objects" : "points"}"]`;
  return [
    ...lines,
    `for name in [${request.names.map(literal).join(", ")}]:`,
    `    print(name, ${call})  # fractions of the width and height`,
  ].join("\n");
}

function textLines(request, image) {
  const settings = `settings={"temperature": 0}`;
  if (request.task === "caption") {
    return [`print(model.caption(${image}, length=${literal(request.length)}, ${settings})["caption"])`];
  }
  if (!request.reasoning) return [`print(model.query(${image}, ${literal(request.text)}, ${settings})["answer"])`];
  return [
    `reply = model.query(${image}, ${literal(request.text)}, reasoning=True, ${settings})`,
    `print(reply["reasoning"]["text"])`,
    `print(reply["answer"])`,
  ];
}

function curlRecipe(request) {
  const many = request.names.length > 1 && (request.task === "detect" || request.task === "point");
  const {object, ...rest} = bodyOf(request, request.names[0]);
  const fields = JSON.stringify(object === undefined || many ? rest : {object, ...rest}).slice(1, -1);
  const start = `{${fields}${fields && ", "}${many ? `"object": %s, ` : ""}"image_url": "data:${request.mime};base64,`;
  const print = many ? `printf ${shellQuoted(start)} "$object"` : `printf %s ${shellQuoted(start)}`;
  const key = request.keyed ? ` -H "X-Moondream-Auth: $MOONDREAM_API_KEY"` : "";
  const url = shellQuoted(`${request.url}/v1/${request.task}`);
  const lines = [
    `{ ${print}`,
    `  base64 < ${shellQuoted(request.file)} | tr -d '\\n'`,
    `  printf '"}'; } |`,
    `  curl -sS ${url} -H 'Content-Type: application/json'${key} --data-binary @-`,
  ];
  if (!many) return lines.join("\n");
  const names = request.names.map((name) => shellQuoted(JSON.stringify(name))).join(" ");
  return [`for object in ${names}; do`, ...lines.map((line) => `  ${line}`), "  echo", "done"].join("\n");
}

// Returns the request body without the image.
function bodyOf(request, name) {
  if (request.task === "detect" || request.task === "point") return {object: name};
  const settings = {temperature: 0}; // the same question gets the same answer
  if (request.task === "caption") return {length: request.length, settings};
  return {question: request.text, ...(request.reasoning ? {reasoning: true} : {}), settings};
}
