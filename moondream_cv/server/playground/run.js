// One run: its requests, the streamed results, the time and the status.

const FINDS = ["detect", "point"];
const MAX_OBJECTS = 50; // the default limit of the server

async function run() {
  if (!$("key-field").hidden && !(await storeKey())) return;
  await state.opened;
  const missing = !state.image ? ["Choose an image first: drop one, paste one, or use the example.", "choose"]
    : task() === "query" && !$("prompt").value.trim() ? ["Enter a question.", "prompt"]
    : FINDS.includes(task()) && !namesOf($("prompt").value).length ? ["Enter the objects to find.", "prompt"] : null;
  if (missing) {
    $(missing[1]).focus();
    return showError(new UserError(missing[0]));
  }
  stop();
  clearResult();
  const [request, controller, clock] = [currentRequest(), new AbortController(), startClock()];
  state.running = controller;
  showRunning(true);
  try {
    if (FINDS.includes(request.task)) await find(request, controller.signal);
    else await generate(request, controller.signal, clock);
    clock.stop("");
  } catch (error) {
    const cancelled = controller.signal.aborted;
    controller.abort(); // stop requests that are still running
    clock.stop(state.running === controller ? `${cancelled ? "cancelled" : "failed"} after ` : null);
    if (state.running !== controller) return; // a newer run has started
    $("status").textContent = cancelled ? "Cancelled" : "Failed";
    if (!cancelled) showError(error);
  } finally {
    if (state.running === controller) {
      state.running = null;
      showRunning(false);
    }
  }
}

function stop() {
  state.running?.abort();
}

// Requests boxes or points, one request per name, and draws them as they arrive.
async function find(request, signal) {
  const groups = request.names.map((name) => ({name, items: [], truncated: false}));
  state.groups = groups;
  $("result").hidden = false;
  $("threshold-field").hidden = !state.model?.has_scores;
  $("status").textContent = "Detecting…";
  const image_url = state.image.uri;
  await Promise.all(groups.map(async (group) => {
    const body = {...bodyOf(request, group.name), image_url, stream: true};
    const response = await post(`/v1/${request.task}`, body, signal);
    await consume(response, signal, (event) => {
      if (event.object || event.point) group.items.push(event.object ?? event.point);
      group.truncated = group.items.length >= MAX_OBJECTS;
      refreshFound();
    });
  }));
  const count = groups.reduce((sum, group) => sum + group.items.length, 0);
  const what = request.task === "detect" ? ["object", "objects"] : ["point", "points"];
  $("status").textContent = count ? `${count} ${what[count === 1 ? 0 : 1]}` : "Nothing found";
}

function refreshFound() {
  const threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(2);
  if (state.image) showFound(state.groups, state.image, Boolean(state.model?.has_scores), threshold);
}

// Requests an answer or a caption and shows the text as it arrives.
async function generate(request, signal, clock) {
  const answer = $("answer");
  $("result").hidden = answer.hidden = false;
  answer.classList.add("streaming");
  $("status").textContent = request.reasoning && request.task === "query" ? "Reasoning…" : "Processing the image…";
  const body = {...bodyOf(request), image_url: state.image.uri, stream: true};
  const response = await post(`/v1/${request.task}`, body, signal);
  await consume(response, signal, (event) => {
    if (event.reasoning) {
      $("reasoning-result").hidden = false;
      $("reasoning-text").textContent = event.reasoning.text.trim();
    }
    if (event.chunk) {
      clock.first();
      $("status").textContent = request.task === "query" ? "Answer" : "Caption";
      answer.append(answer.textContent ? event.chunk : event.chunk.trimStart());
    }
  });
  if (!answer.textContent) $("status").textContent = "The model returned no text";
}

async function consume(response, signal, handle) {
  for await (const event of eventsOf(response)) {
    if (signal.aborted) throw new DOMException("cancelled", "AbortError");
    if (event.error) throw new UserError(sentence(event.error.message));
    handle(event);
    if (event.completed) return;
  }
  throw new UserError("The answer is incomplete. Run again.");
}

function startClock() {
  const started = performance.now();
  let first = "";
  const show = (text) => ($("timing").textContent = text + seconds(performance.now() - started) + first);
  const timer = setInterval(() => show(""), 100);
  show("");
  return {
    first: () => (first = first || ` · first word after ${seconds(performance.now() - started)}`),
    stop: (text) => {
      clearInterval(timer);
      if (text !== null) show(text);
    },
  };
}
