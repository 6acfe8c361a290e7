// The picture with its slider, the maps of its words, their faders and the painted mask. What Python says
// arrives in props.value; what the hand does leaves through window.p2pHand (hand.js).
const $ = selector => element.querySelector(selector);
const stack = $(".stack"), below = $(".below"), faders = $(".faders"), map = $(".map");
const canvas = $("canvas"), pen = canvas.getContext("2d"), paint = $(".paint"), clear = $(".clear");
let names = "", weights = {}, mask = "", photo = "", edited = "", waiting = null;   // edited: the source of the edit shown

const hand = () => ({weights: {...weights}, mask, photo});   // photo: the uploaded picture that is edited
const tell = () => window.p2pHand(hand(), true);
const soon = window.p2pSoon = () => { clearTimeout(waiting); waiting = setTimeout(tell, 120); };   // not at every pixel of a drag
const light = src => { stack.classList.toggle("lit", !!src); if (src) map.src = src; };

function fader(word) {
  const box = document.createElement("div"), label = document.createElement("div");
  const text = document.createElement("span"), shown = document.createElement("output");
  const range = Object.assign(document.createElement("input"),
                              {type: "range", min: -2, max: 4, step: 0.1, value: weights[word.name] ?? 1});
  box.className = "fader"; label.className = "word"; label.tabIndex = 0;
  range.setAttribute("aria-label", "weight of " + word.name);
  text.textContent = word.name; shown.value = (+range.value).toFixed(1);
  label.append(text, shown); box.append(label, range);
  box.show = (fresh, done) => {
    word = fresh.map || done ? fresh : {...fresh, map: word.map};   // until there is another
    label.classList.toggle("mapped", !!word.map);
    if (label.matches(":hover, :focus")) light(word.map);
  };
  for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focus", true], ["blur", false]])
    label.addEventListener(event, () => light(on && word.map));
  range.addEventListener("input", () => {
    shown.value = (+range.value).toFixed(1);
    weights[word.name] = +range.value;
    soon();
  });
  range.addEventListener("dblclick", () => { range.value = 1; range.dispatchEvent(new Event("input")); });
  return box;
}

function showWords(words, reset, done) {
  const now = JSON.stringify(words.map(word => word.name));
  if (reset || now !== names) {
    names = now;
    // The hand may have moved since this was asked for: only a replay sets faders that it has set.
    const moved = words.map(word => [word.name, reset ? word.weight : weights[word.name] ?? 1]);
    weights = Object.fromEntries(moved.filter(([name, weight]) => weight !== 1));
    light("");   // a label that is removed is not left
    faders.replaceChildren(...words.map(fader));
  }
  words.forEach((word, i) => faders.children[i].show(word, done));
}

function wipe() {
  pen.clearRect(0, 0, canvas.width, canvas.height);
  mask = ""; clear.hidden = true;
}

function drawMask(png) {
  wipe();
  if (!png) return;
  const image = new Image();
  image.onload = () => {   // bright where the edit may act: what is dark is not painted
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = pen.getImageData(0, 0, canvas.width, canvas.height);
    for (let i = 0; i < pixels.data.length; i += 4) pixels.data[i + 3] = pixels.data[i] > 127 ? 255 : 0;
    pen.putImageData(pixels, 0, 0);
  };
  image.src = "data:image/png;base64," + png;
  mask = png; clear.hidden = false;
}

function maskOf() {
  const sheet = Object.assign(document.createElement("canvas"), {width: canvas.width, height: canvas.height});
  const ink = sheet.getContext("2d");
  ink.fillRect(0, 0, sheet.width, sheet.height);
  ink.drawImage(canvas, 0, 0);
  return sheet.toDataURL("image/png").split(",")[1];
}

function show() {
  const view = props.value;
  if (!view || !view.said) return;
  $(".said").textContent = view.said;
  if (view.refused) return stack.classList.remove("preview");   // what is shown stays
  $(".notes").replaceChildren(...view.notes.map(note => Object.assign(document.createElement("li"), {textContent: note})));
  stack.hidden = below.hidden = !view.source;
  if (view.edit) edited = view.source;
  else if (view.done || view.source !== edited) edited = "";   // else its last edit stays till there is another
  stack.classList.toggle("plain", !edited);
  stack.classList.toggle("preview", !view.done);
  $(".compare").hidden = !edited;
  if (view.source) $(".under").src = view.source;
  if (view.edit) $(".over").src = view.edit;
  if (view.ratio && stack.style.getPropertyValue("--ratio") !== view.ratio) {
    stack.style.setProperty("--ratio", view.ratio);
    const [w, h] = view.ratio.split("/").map(Number);
    canvas.width = 256; canvas.height = Math.round(256 * h / w);
    wipe();
  }
  if (view.hand) drawMask(view.hand.mask);
  if (view.words.length || view.hand) showWords(view.words, !!view.hand, view.done);
  photo = view.photo;
  window.p2pPhoto?.(photo);
  window.p2pHand(hand(), false);
}

$(".at").addEventListener("input", event => stack.style.setProperty("--at", event.target.value + "%"));
paint.addEventListener("click", () => {
  const on = stack.classList.toggle("painting");
  paint.setAttribute("aria-pressed", on);
});
clear.addEventListener("click", () => { wipe(); tell(); });
const place = event => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) * canvas.width / box.width, (event.clientY - box.top) * canvas.height / box.height];
};
let last = null;
canvas.addEventListener("pointerdown", event => { canvas.setPointerCapture(event.pointerId); last = place(event); stroke(event); });
canvas.addEventListener("pointermove", event => { if (last) stroke(event); });
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => {
  if (!last) return;
  last = null; mask = maskOf(); clear.hidden = false; tell();
});
function stroke(event) {
  const [x, y] = place(event);
  Object.assign(pen, {lineWidth: canvas.width / 9, lineCap: "round", strokeStyle: "#fff"});
  pen.beginPath(); pen.moveTo(...last); pen.lineTo(x, y); pen.stroke();
  last = [x, y];
}
watch("value", show);
show();
