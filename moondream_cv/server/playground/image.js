// Files, pasted and dropped ones too, and the drawn example → pictures that can be shown and sent.

const SENT_AS_THEY_ARE = ["image/jpeg", "image/png", "image/webp"];
const LONGEST_SIDE = 2048; // pixels, of a picture whose file is too large to be sent
const ROOM = 16384; // bytes of a body for everything but the image
const maxBody = Number(document.querySelector("meta[name=max-body]").content);

// A picture: {name, file, url, uri, mime, width, height, own, note}. `own` says that the user has this very file.
async function openPicture(file, name, own) {
  const url = URL.createObjectURL(file);
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    URL.revokeObjectURL(url);
    throw new Refusal(`${name} is not an image that this browser can show. Choose a JPEG, PNG or WebP file.`);
  }
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const picture = {name, file, url, mime: file.type, width, height, own, note: ""};
  const fits = 4 * Math.ceil(file.size / 3) + ROOM <= maxBody;
  if (!fits) await redraw(picture, image, "jpg", "image/jpeg", Math.min(1, LONGEST_SIDE / Math.max(width, height)));
  else if (!SENT_AS_THEY_ARE.includes(file.type)) await redraw(picture, image, "png", "image/png", 1);
  picture.uri = await dataUri(picture.file);
  return picture;
}

async function redraw(picture, image, suffix, mime, scale) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(picture.width * scale));
  canvas.height = Math.max(1, Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const why = suffix === "jpg" ? `larger than the server takes (${bytes(maxBody)})` : "no JPEG, PNG or WebP";
  const name = `${picture.name.replace(/\.[^.]*$/, "")}-sent.${suffix}`;
  const file = await blobOf(canvas, mime);
  const facts = `${canvas.width} × ${canvas.height}, ${bytes(file.size)}`;
  const note = `The file is ${why}, so ${name} is sent in its place: ${facts}.`;
  Object.assign(picture, {name, file, mime, own: false, note});
}

function blobOf(canvas, mime) {
  return new Promise((resolve) => canvas.toBlob(resolve, mime, 0.92));
}

function dataUri(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Refusal("The file cannot be read. Was it moved or changed?"));
    reader.readAsDataURL(file);
  });
}

function bytes(count) {
  return count < 1e6 ? `${Math.ceil(count / 1000)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

// A scene that Moondream 2 and the tiny model both know how to look at.
function drawExample() {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [640, 480];
  const pen = canvas.getContext("2d");
  const fill = (colour, draw) => {
    pen.fillStyle = colour;
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
