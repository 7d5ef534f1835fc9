// Draws results over the image and lists them in tables. Text of users and models is inserted as text, never as HTML.

const COLORS = [
  "#ff8a4c", "#4fa3ff", "#36d399", "#e583f2", "#f5c531", "#ff7a93", "#3ccbe8", "#b3a1ff", "#b6d94c", "#e0b08c",
];

const $ = (id) => document.getElementById(id);

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

// groups: [{name, items}]. An item is a box {x_min, ...} or a point {x, y}, in fractions of the image, with confidence.
function showFound(groups, image, scored, threshold) {
  const marks = [];
  const lists = groups.map((group, index) => {
    const color = COLORS[index % COLORS.length];
    const shown = group.items.filter((item) => !scored || item.confidence >= threshold);
    const pairs = shown.map((item) => pairOf(item, group.name, color, image, scored));
    marks.push(...pairs.map((pair) => pair.mark));
    return listOfGroup(group, pairs.map((pair) => pair.tableRow), color, scored);
  });
  $("overlay").replaceChildren(...marks);
  $("groups").replaceChildren(...lists);
  marks.forEach(placeTag);
}

function pairOf(item, name, color, image, scored) {
  const score = scored ? item.confidence.toFixed(2) : "";
  const mark = markOf(item);
  mark.style.setProperty("--color", color);
  mark.append(make("span", "tag", `${name} ${score}`.trim()));
  const tableRow = make("tr");
  if (scored) tableRow.append(scoreCell(item.confidence, score));
  tableRow.append(...pixelsOf(item, image).map((value) => make("td", "", value.toFixed(0))));
  for (const element of [mark, tableRow]) {
    element.addEventListener("pointerenter", () => mark.classList.add("marked"));
    element.addEventListener("pointerleave", () => mark.classList.remove("marked"));
  }
  return {mark, tableRow};
}

function markOf(item) {
  const mark = make("div", "x" in item ? "dot" : "box");
  const percent = (value) => `${100 * Math.min(1, Math.max(0, value))}%`;
  mark.style.left = percent(item.x ?? item.x_min);
  mark.style.top = percent(item.y ?? item.y_min);
  if (!("x" in item)) {
    mark.style.right = percent(1 - item.x_max);
    mark.style.bottom = percent(1 - item.y_max);
  }
  return mark;
}

// Moves a label that extends beyond the image. The label of a box moves below the box, or into it if there is no space,
// and along its edge. The label of a point moves to its left.
function placeTag(mark) {
  const tag = mark.querySelector(".tag");
  const isBox = mark.classList.contains("box");
  tag.classList.remove("below", "inside", "leftwards");
  tag.style.marginLeft = "";
  const frame = $("overlay").getBoundingClientRect();
  const rect = tag.getBoundingClientRect();
  const over = Math.max(0, rect.right - frame.right);
  if (isBox && rect.top < frame.top) {
    const room = frame.bottom - mark.getBoundingClientRect().bottom;
    tag.classList.add(room > rect.height ? "below" : "inside");
  }
  tag.classList.toggle("leftwards", !isBox && over > 0);
  if (isBox && over) tag.style.marginLeft = `${-Math.min(over, rect.left - frame.left)}px`;
}

function pixelsOf(item, {width, height}) {
  if ("x" in item) return [item.x * width, item.y * height];
  return [item.x_min * width, item.y_min * height, item.x_max * width, item.y_max * height];
}

function scoreCell(confidence, text) {
  const cell = make("td");
  const [bar, filled] = [make("span", "bar"), make("span")];
  filled.style.width = `${100 * confidence}%`;
  bar.append(filled);
  cell.append(bar, text);
  return cell;
}

function listOfGroup(group, rows, color, scored) {
  const section = make("section", "group");
  section.style.setProperty("--color", color);
  const head = make("h2", "group-head");
  const all = group.items.length;
  const count = rows.length === all ? String(all) : `${rows.length} of ${all}`;
  head.append(make("span", "swatch"), make("span", "name", group.name), make("span", "count", count));
  section.append(head);
  if (rows.length) section.append(tableOf(rows, scored, "x" in group.items[0]));
  if (group.truncated) section.append(make("p", "note", "There may be more objects: the list reached its limit."));
  return section;
}

function tableOf(rows, scored, points) {
  const titles = [...(scored ? ["confidence"] : []), ...(points ? ["x", "y"] : ["x1", "y1", "x2", "y2"])];
  const table = make("table", scored ? "scored" : "");
  const head = make("tr");
  head.append(...titles.map((title) => make("th", "", title)));
  const [top, body] = [make("thead"), make("tbody")];
  top.append(head);
  body.append(...rows);
  table.append(top, body);
  return table;
}

function seconds(milliseconds) {
  if (milliseconds < 995) return `${Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 2 : 1)} s`;
}
