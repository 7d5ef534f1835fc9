// Converts files (chosen, dropped or pasted) and the built-in example to images that can be shown and sent.

const SENT_UNCHANGED = ["image/jpeg", "image/png", "image/webp"];
const LONGEST_SIDE = 2048; // pixels; applies if the file is too large to send
const BODY_OVERHEAD = 16384; // bytes of a request body in addition to the image
const maxBody = Number(document.querySelector("meta[name=max-body]").content);

// Returns {name, file, url, uri, mime, width, height, own, note}. `own`: the user has exactly this file.
async function openImage(file, name, own) {
  const url = URL.createObjectURL(file);
  const element = new Image();
  element.src = url;
  try {
    await element.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new UserError(`${name} is not an image that this browser can display. Choose a JPEG, PNG or WebP file.`);
  }
  const [width, height] = [element.naturalWidth, element.naturalHeight];
  const image = {name, file, url, mime: file.type, width, height, own, note: ""};
  const fits = 4 * Math.ceil(file.size / 3) + BODY_OVERHEAD <= maxBody;
  if (!fits) await redraw(image, element, "jpg", "image/jpeg", Math.min(1, LONGEST_SIDE / Math.max(width, height)));
  else if (!SENT_UNCHANGED.includes(file.type)) await redraw(image, element, "png", "image/png", 1);
  image.uri = await dataUri(image.file);
  return image;
}

async function redraw(image, element, suffix, mime, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext("2d").drawImage(element, 0, 0, canvas.width, canvas.height);
  const reason = suffix === "jpg" ? `exceeds the limit of the server (${bytes(maxBody)})` : "is not JPEG, PNG or WebP";
  const name = `${image.name.replace(/\.[^.]*$/, "")}-sent.${suffix}`;
  const file = await blobOf(canvas, mime);
  const facts = `${canvas.width} × ${canvas.height}, ${bytes(file.size)}`;
  const note = `The file ${reason}. ${name} is sent instead: ${facts}.`;
  Object.assign(image, {name, file, mime, own: false, note});
}

function blobOf(canvas, mime) {
  return new Promise((resolve) => canvas.toBlob(resolve, mime, 0.92));
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new UserError("The file cannot be read. Check that it still exists."));
    reader.readAsDataURL(file);
  });
}

function bytes(count) {
  return count < 1e6 ? `${Math.ceil(count / 1000)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

// Draws a scene that both Moondream 2 and the tiny model can process.
function drawExample() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [640, 480];
  const pen = canvas.getContext("2d");
  const fill = (color, draw) => {
    pen.fillStyle = color;
    pen.beginPath();
    draw();
    pen.fill();
  };
  const polygon = (points) => points.forEach(([x, y]) => pen.lineTo(x, y));
  const star = Array.from({length: 10}, (_, i) => {
    const [radius, angle] = [i % 2 ? 36 : 80, ((i - 2.5) * Math.PI) / 5];
    return [370 + radius * Math.cos(angle), 320 + radius * Math.sin(angle)];
  });
  fill("#eef0ea", () => pen.rect(0, 0, 640, 480));
  fill("rgb(215 35 35)", () => pen.arc(150, 140, 70, 0, 2 * Math.PI));
  fill("rgb(40 80 215)", () => pen.rect(330, 60, 100, 100));
  fill("rgb(40 80 215)", () => pen.rect(500, 330, 70, 70));
  fill("rgb(40 160 60)", () => polygon([[180, 290], [255, 420], [105, 420]]));
  fill("rgb(245 215 40)", () => polygon(star));
  return blobOf(canvas, "image/png");
}
