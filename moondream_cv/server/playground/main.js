// The page itself: what is chosen, what runs, and what happens at which event.

const PROMPTS = {
  object: ["What to look for", "red circle, blue square", "Several names are separated by commas."],
  question: ["Question", "How many blue squares are there?", ""],
};
const state = {
  model: null, // the entry of /v1/models
  again: 0, // the timer after which the server is asked for it again
  picture: null,
  opened: null, // the promise of the picture that was asked for last
  opening: 0, // counts the pictures that were asked for: only the last one is shown
  prompts: {object: "", question: ""},
  groups: [], // what was found, as view.js takes it
  running: null, // the AbortController of the request that runs
};

const task = () => document.querySelector("input[name=task]:checked").value;
const promptKind = () => (task() === "query" ? "question" : "object");
const namesOf = (text) => [...new Set(text.split(",").map((name) => name.trim()).filter(Boolean))];

function currentAsk() {
  const text = $("prompt").value.trim();
  const names = namesOf(text);
  return {
    url: base,
    task: task(),
    names: names.length ? names : namesOf(PROMPTS.object[1]),
    text: text || PROMPTS.question[1],
    length: $("length").value,
    reasoning: $("reasoning").checked,
    file: state.picture?.name ?? "photo.jpg",
    mime: state.picture?.mime ?? "image/jpeg",
    keyed: !$("key-row").hidden || keyStore.read() !== "",
    threshold: state.model?.has_scores ? Number($("threshold").value) : 0,
  };
}

// The model

async function refreshModel() {
  clearTimeout(state.again);
  try {
    const reply = await (await call("/v1/models")).json();
    showModel(reply.models[0]);
    if (!state.model.skills.length) state.again = setTimeout(refreshModel, 2000); // it is still being loaded
  } catch (error) {
    showLamp("failed", error.status === 401 ? "API key needed" : "not reachable");
    if (error.status === 401) showError(error);
    else state.again = setTimeout(refreshModel, 5000);
  }
}

function showModel(model) {
  state.model = model;
  const loaded = model.skills.length > 0;
  showLamp(loaded ? "ready" : "", model.name);
  $("skills").textContent = loaded ? model.skills.join(" · ") : "is being loaded…";
  document.title = `${model.name} · moondream-cv`;
  const radios = [...document.querySelectorAll("input[name=task]")];
  for (const radio of radios) {
    radio.disabled = loaded && !model.skills.includes(radio.value);
    radio.parentElement.title = radio.disabled ? `${model.name} cannot ${radio.value}` : "";
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
  $("prompt-row").hidden = task() === "caption";
  $("reasoning-row").hidden = task() !== "query";
  $("length-row").hidden = task() !== "caption";
  $("prompt-label").textContent = label;
  $("prompt").placeholder = placeholder;
  $("prompt").value = state.prompts[promptKind()];
  $("prompt-hint").textContent = hint;
  showRecipe();
}

function showRecipe() {
  const kind = document.querySelector("input[name=recipe]:checked").value;
  $("code").textContent = RECIPES[kind](currentAsk());
  $("recipe-hint").textContent = RECIPE_HINTS[kind];
}

async function copyRecipe() {
  try {
    await navigator.clipboard.writeText($("code").textContent);
  } catch { // browsers keep the clipboard from pages that come over plain http
    getSelection().selectAllChildren($("code"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => ($("copy").textContent = "Copy"), 1500);
}

// The picture

function usePicture(file, name, own = true) {
  state.opened = takePicture(file, name, own);
  return state.opened;
}

async function takePicture(file, name, own) {
  const turn = ++state.opening;
  stop();
  try {
    const picture = await openPicture(file, name, own);
    if (turn !== state.opening) return URL.revokeObjectURL(picture.url);
    if (state.picture) URL.revokeObjectURL(state.picture.url);
    state.picture = picture;
    clearResult();
    showPicture(picture);
  } catch (error) {
    if (turn === state.opening) showError(error);
  }
}

function showPicture(picture) {
  $("drop").hidden = true;
  $("frame").hidden = $("about").hidden = false;
  $("frame").style.setProperty("--ratio", picture.width / picture.height);
  $("frame").style.setProperty("--width", picture.width);
  $("image").src = picture.url;
  $("image").alt = picture.name;
  $("file-name").textContent = picture.name;
  $("file-facts").textContent = `${picture.width} × ${picture.height} · ${bytes(picture.file.size)}`;
  $("sent").textContent = picture.note;
  $("sent").hidden = !picture.note;
  $("save").hidden = picture.own;
  if (!picture.own) {
    URL.revokeObjectURL($("save").href);
    $("save").href = URL.createObjectURL(picture.file);
    $("save").download = picture.name;
  }
  showRecipe();
}

async function useExample() {
  for (const kind of Object.keys(PROMPTS)) state.prompts[kind] = state.prompts[kind] || PROMPTS[kind][1];
  showForm();
  await usePicture(await drawExample(), "example.png", false);
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
  $("error").hidden = $("result").hidden = $("answer").hidden = $("thoughts").hidden = $("threshold-row").hidden = true;
  for (const id of ["overlay", "groups", "answer", "thoughts-text", "status", "timing"]) $(id).replaceChildren();
}

function showError(error) {
  if (!(error instanceof Refusal)) console.error(error);
  if (error.status === 401) {
    $("key-row").hidden = false;
    $("key").focus();
    showRecipe();
  }
  const failed = "This page failed. The browser's console says more.";
  $("error").textContent = error instanceof Refusal ? error.message : failed;
  $("error").hidden = false;
  if (!$("answer").textContent && !state.groups.some((group) => group.items.length)) $("result").hidden = true;
}

// Keep the key that was typed; whether it opens the server.
async function takeKey() {
  const key = $("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) {
    showError(new Refusal(key ? "An API key has no spaces and no accents. Copy it again." : "Type the API key.", 401));
    return false;
  }
  keyStore.write(key);
  $("error").hidden = true;
  await refreshModel();
  if (!$("error").hidden) return false;
  $("key-row").hidden = true;
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
    if (file) usePicture(file, file.name);
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
    usePicture(file, file.name || "pasted.png", false);
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
    if (file) usePicture(file, file.name);
    else showError(new Refusal("That was not a file. Save the image first, then drop the file."));
  });
  window.addEventListener("resize", () => document.querySelectorAll(".box, .dot").forEach(placeTag));
}

function isTextForPrompt(event) {
  return event.target === $("prompt") && !event.dataTransfer.types.includes("Files");
}

listen();
showForm();
refreshModel();
