// One run: the requests that it makes, what comes in piece by piece, how long it takes, and its end.

const FINDS = ["detect", "point"];
const MAX_OBJECTS = 50; // the server's limit where a request names none

async function run() {
  if (!$("key-row").hidden && !(await takeKey())) return;
  await state.opened;
  const missing = !state.picture ? ["Choose an image first: drop one, paste one, or use the example.", "choose"]
    : task() === "query" && !$("prompt").value.trim() ? ["Type a question.", "prompt"]
    : FINDS.includes(task()) && !namesOf($("prompt").value).length ? ["Type what to look for.", "prompt"] : null;
  if (missing) {
    $(missing[1]).focus();
    return showError(new Refusal(missing[0]));
  }
  stop();
  clearResult();
  const [ask, controller, clock] = [currentAsk(), new AbortController(), startClock()];
  state.running = controller;
  showRunning(true);
  try {
    await (FINDS.includes(ask.task) ? find(ask, controller.signal) : tell(ask, controller.signal, clock));
    clock.stop("");
  } catch (error) {
    const cancelled = controller.signal.aborted;
    controller.abort(); // whatever of it still runs
    clock.stop(state.running === controller ? `${cancelled ? "cancelled" : "failed"} after ` : null);
    if (state.running !== controller) return; // another run has the page
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

// Boxes or points, drawn as they come; each name is a request of its own.
async function find(ask, signal) {
  const groups = ask.names.map((name) => ({name, items: [], truncated: false}));
  state.groups = groups;
  $("result").hidden = false;
  $("threshold-row").hidden = !state.model?.has_scores;
  $("status").textContent = "Looking…";
  const image_url = state.picture.uri;
  await Promise.all(groups.map(async (group) => {
    const response = await post(`/v1/${ask.task}`, {...bodyOf(ask, group.name), image_url, stream: true}, signal);
    await consume(response, signal, (event) => {
      if (event.object || event.point) group.items.push(event.object ?? event.point);
      group.truncated = group.items.length >= MAX_OBJECTS;
      refreshFound();
    });
  }));
  const count = groups.reduce((sum, group) => sum + group.items.length, 0);
  const what = ask.task === "detect" ? ["object", "objects"] : ["point", "points"];
  $("status").textContent = count ? `${count} ${what[count === 1 ? 0 : 1]}` : "Nothing found";
}

function refreshFound() {
  const threshold = Number($("threshold").value);
  $("threshold-value").textContent = threshold.toFixed(2);
  if (state.picture) showFound(state.groups, state.picture, Boolean(state.model?.has_scores), threshold);
}

// An answer or a caption, written as it comes.
async function tell(ask, signal, clock) {
  const answer = $("answer");
  $("result").hidden = answer.hidden = false;
  answer.classList.add("streaming");
  $("status").textContent = ask.reasoning && ask.task === "query" ? "Thinking…" : "Reading the image…";
  const body = {...bodyOf(ask), image_url: state.picture.uri, stream: true};
  const response = await post(`/v1/${ask.task}`, body, signal);
  await consume(response, signal, (event) => {
    if (event.reasoning) {
      $("thoughts").hidden = false;
      $("thoughts-text").textContent = event.reasoning.text.trim();
    }
    if (event.chunk) {
      clock.first();
      $("status").textContent = ask.task === "query" ? "Answer" : "Caption";
      answer.append(answer.textContent ? event.chunk : event.chunk.trimStart());
    }
  });
  if (!answer.textContent) $("status").textContent = "The model has nothing to say";
}

async function consume(response, signal, take) {
  for await (const event of eventsOf(response)) {
    if (signal.aborted) throw new DOMException("cancelled", "AbortError");
    if (event.error) throw new Refusal(sentence(event.error.message));
    take(event);
    if (event.completed) return;
  }
  throw new Refusal("The answer broke off before its end. Run again.");
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
