// The state of the page, its form, its images and its event handlers.

const PROMPTS = {
  object: ["Objects to find", "red circle, blue square", "Separate several names by commas."],
  question: ["Question", "How many blue squares are there?", ""],
};
const state = {
  model: null, // entry of /v1/models
  retryTimer: 0, // timer of the next request for the model
  image: null,
  opened: null, // promise of the latest image
  numOpened: 0, // number of opened images; only the latest one is shown
  prompts: {object: "", question: ""},
  groups: [], // results in the format of showFound in view.js
  running: null, // AbortController of the current run
};

const task = () => document.querySelector("input[name=task]:checked").value;
const promptKind = () => (task() === "query" ? "question" : "object");
const namesOf = (text) => [...new Set(text.split(",").map((name) => name.trim()).filter(Boolean))];

function currentRequest() {
  const text = $("prompt").value.trim();
  const names = namesOf(text);
  return {
    url: base,
    task: task(),
    names: names.length ? names : namesOf(PROMPTS.object[1]),
    text: text || PROMPTS.question[1],
    length: $("length").value,
    reasoning: $("reasoning").checked,
    file: state.image?.name ?? "photo.jpg",
    mime: state.image?.mime ?? "image/jpeg",
    keyed: !$("key-field").hidden || keyStore.read() !== "",
    threshold: state.model?.has_scores ? Number($("threshold").value) : 0,
  };
}

// The model

async function refreshModel() {
  clearTimeout(state.retryTimer);
  try {
    const reply = await (await call("/v1/models")).json();
    showModel(reply.models[0]);
    if (!state.model.skills.length) state.retryTimer = setTimeout(refreshModel, 2000); // still loading
  } catch (error) {
    showLamp("failed", error.status === 401 ? "API key needed" : "not reachable");
    if (error.status === 401) showError(error);
    else state.retryTimer = setTimeout(refreshModel, 5000);
  }
}

function showModel(model) {
  state.model = model;
  const loaded = model.skills.length > 0;
  showLamp(loaded ? "ready" : "", model.name);
  $("skills").textContent = loaded ? model.skills.join(" · ") : "loading…";
  document.title = `${model.name} · moondream-cv`;
  const radios = [...document.querySelectorAll("input[name=task]")];
  for (const radio of radios) {
    radio.disabled = loaded && !model.skills.includes(radio.value);
    radio.parentElement.title = radio.disabled ? `${model.name} does not support ${radio.value}` : "";
  }
  if (radios.some((radio) => radio.checked && radio.disabled)) {
    const able = radios.find((radio) => !radio.disabled);
    if (able) able.checked = true;
  }
  $("run").disabled = radios.every((radio) => radio.disabled);
  showForm();
}

function showLamp(kind, text) {
  $("lamp").className = `lamp ${kind}`;
  $("model").textContent = text;
  $("skills").textContent = "";
}

// The form and the code

function showForm() {
  const [label, placeholder, hint] = PROMPTS[promptKind()];
  $("prompt-field").hidden = task() === "caption";
  $("reasoning-field").hidden = task() !== "query";
  $("length-field").hidden = task() !== "caption";
  $("prompt-label").textContent = label;
  $("prompt").placeholder = placeholder;
  $("prompt").value = state.prompts[promptKind()];
  $("prompt-hint").textContent = hint;
  showRecipe();
}

function showRecipe() {
  const kind = document.querySelector("input[name=recipe]:checked").value;
  $("code").textContent = RECIPES[kind](currentRequest());
  $("recipe-hint").textContent = RECIPE_HINTS[kind];
}

async function copyRecipe() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
  } catch { // browsers block the clipboard on pages over plain http
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// The image

// Opens a file, or the file of a promise. `run` waits for it.
function useImage(file, name, own = true) {
  state.opened = loadImage(file, name, own);
  return state.opened;
}

async function loadImage(file, name, own) {
  const turn = ++state.numOpened;
  stop();
  try {
    const image = await openImage(await file, name, own);
    if (turn !== state.numOpened) return URL.revokeObjectURL(image.url);
    if (state.image) URL.revokeObjectURL(state.image.url);
    state.image = image;
    clearResult();
    showImage(image);
  } catch (error) {
    if (turn === state.numOpened) showError(error);
  }
}

function showImage(image) {
  $("drop").hidden = true;
  $("frame").hidden = $("about").hidden = false;
  $("frame").style.setProperty("--ratio", image.width / image.height);
  $("frame").style.setProperty("--width", image.width);
  $("image").src = image.url;
  $("image").alt = image.name;
  $("file-name").textContent = image.name;
  $("file-facts").textContent = `${image.width} × ${image.height} · ${bytes(image.file.size)}`;
  $("sent").textContent = image.note;
  $("sent").hidden = !image.note;
  $("save").hidden = image.own;
  if (!image.own) {
    URL.revokeObjectURL($("save").href);
    $("save").href = URL.createObjectURL(image.file);
    $("save").download = image.name;
  }
  showRecipe();
}

async function useExample() {
  for (const kind of Object.keys(PROMPTS)) state.prompts[kind] = state.prompts[kind] || PROMPTS[kind][1];
  showForm();
  await useImage(drawExample(), "example.png", false);
  $("prompt").focus();
}

// Results, errors and keys

function showRunning(running) {
  const [from, to] = running ? [$("run"), $("cancel")] : [$("cancel"), $("run")];
  const focused = document.activeElement === from;
  to.hidden = false;
  from.hidden = true;
  if (focused) to.focus();
  $("result").setAttribute("aria-busy", String(running));
  if (!running) $("answer").classList.remove("streaming");
}

function clearResult() {
  state.groups = [];
  for (const id of ["error", "result", "answer", "reasoning-result", "threshold-field"]) $(id).hidden = true;
  for (const id of ["overlay", "groups", "answer", "reasoning-text", "status", "timing"]) $(id).replaceChildren();
}

function showError(error) {
  if (!(error instanceof UserError)) console.error(error);
  if (error.status === 401) {
    $("key-field").hidden = false;
    $("key").focus();
    showRecipe();
  }
  const failed = "Unexpected error. See the browser console for details.";
  $("error").textContent = error instanceof UserError ? error.message : failed;
  $("error").hidden = false;
  if (!$("answer").textContent && !state.groups.some((group) => group.items.length)) $("result").hidden = true;
}

// Stores the entered API key. Returns whether it is valid.
async function storeKey() {
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    const invalid = "An API key has only ASCII characters and no spaces. Copy it again.";
    showError(new UserError(key ? invalid : "Enter the API key.", 401));
    return false;
  }
  keyStore.write(key);
  $("error").hidden = true;
  await refreshModel();
  if (!$("error").hidden) return false;
  $("key-field").hidden = true;
  return true;
}

// Events

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  $("prompt").addEventListener("input", () => {
    state.prompts[promptKind()] = $("prompt").value;
    showRecipe();
  });
  $("form").addEventListener("change", showForm);
  $("recipes").addEventListener("change", showRecipe);
  $("copy").addEventListener("click", copyRecipe);
  $("threshold").addEventListener("input", () => {
    refreshFound();
    showRecipe();
  });
  $("cancel").addEventListener("click", stop);
  for (const id of ["choose", "replace"]) $(id).addEventListener("click", () => $("file").click());
  $("example").addEventListener("click", useExample);
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    if (file) useImage(file, file.name);
    $("file").value = "";
  });
  listenToDocument();
}

function listenToDocument() {
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stop();
    if (event.key === "Enter" && event.target === document.body) $("form").requestSubmit();
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (!file) return;
    event.preventDefault();
    useImage(file, file.name || "pasted.png", false);
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      if (isTextForPrompt(event)) return;
      event.preventDefault();
      document.body.classList.toggle("dragging", kind === "dragover");
    });
  }
  document.addEventListener("drop", (event) => {
    if (isTextForPrompt(event)) return;
    const [file] = event.dataTransfer.files;
    if (file) useImage(file, file.name);
    else showError(new UserError("Only files can be dropped. Save the image first, then drop the file."));
  });
  window.addEventListener("resize", () => document.querySelectorAll(".box, .dot").forEach(placeTag));
}

function isTextForPrompt(event) {
  return event.target === $("prompt") && !event.dataTransfer.types.includes("Files");
}

listen();
showForm();
refreshModel();
