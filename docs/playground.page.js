"use strict";
// The page around the model: the picture, the question, the answer, and what happened in between. The model itself is
// in playground.llava.js and the files that it names, and runs in a worker, so that the page stays quick meanwhile.

const $ = id => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
};
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const pick = list => list[Math.floor(Math.random() * list.length)];

// ---------------------------------------------------------------------------------------------------------------------
// The model in its worker

const model = (() => {
  const source = $("port").textContent,
    jobs = new Map();
  let last = 0,
    send;
  const hear = ({ job, word, done, error, stopped }) => {
    if (!jobs.has(job)) return;
    const { resolve, reject, onword } = jobs.get(job);
    if (word) return onword?.(word);
    jobs.delete(job);
    if (error) reject(new Error(error));
    else resolve(stopped ? null : done);
  };
  try {
    const url = URL.createObjectURL(
      new Blob([source, "\nconst handle = serve(m => postMessage(m));\nonmessage = e => handle(e.data);"]),
    );
    const worker = new Worker(url);
    worker.onmessage = event => hear(event.data);
    send = (message, transfer = []) => worker.postMessage(message, transfer);
  } catch {
    // a browser that allows no worker here: the same in the page itself
    const handle = new Function(`${source}\nreturn serve;`)()(hear);
    send = message => void handle(message);
  }
  const run = (message, onword, transfer) => {
    const job = ++last;
    const promise = new Promise((resolve, reject) => jobs.set(job, { resolve, reject, onword }));
    send({ job, ...message }, transfer);
    return Object.assign(promise, { stop: () => jobs.has(job) && send({ stop: job }) });
  };
  return { run };
})();

// The bugs that can be planted, and the stage at which each shows first.
const BUGS = {
  channels: { stage: "pixels", says: "Red and blue are swapped",
    means: "Some programs store a colour as red, green, blue, others the other way round. Here they are mixed up." },
  flatten: { stage: "vision.1", says: "The eye’s heads are laid out wrongly",
    means: "The eye looks in several ways at once, its heads. Here their results are not put side by side, but one " +
      "behind the other: all numbers are there, in the wrong places." },
  class: { stage: "projector", says: "The class token is kept",
    means: "In front of the patches the eye keeps one vector for the whole picture. Who forgets to drop it moves " +
      "every patch on by one place, and loses the last." },
  late: { stage: "projector", says: "The eye is read one block late",
    means: "LLaVA reads the eye one block before its end. Here it reads the end itself, which it was not trained on." },
  rope: { stage: "llama.1", says: "The words have no order",
    means: "The decoder turns its numbers by an angle that says where each word stands (RoPE). Here that angle is " +
      "always zero: it has the words, but not their order." },
};

const files = JSON.parse($("configs").textContent);
const ready = (() => {
  const text = atob($("weights").textContent),
    bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const loading = model.run({ load: { ...files, weights: bytes.buffer } }, null, [bytes.buffer]);
  return loading.then(done => ({ ...done, bugs: BUGS }));
})();
const plain = ({ width, height, data }) => ({ width, height, data });

// For tests and for the curious: llava.ask(imageData, question), llava.stages(imageData, question), llava.paint(scene).
window.llava = {
  ready,
  async ask(image, question, options = {}) {
    await ready;
    return (await model.run({ kind: "answer", image: plain(image), question, ...options })).text;
  },
  async answer(image, question, options = {}, onword) {
    await ready;
    return model.run({ kind: "answer", image: plain(image), question, ...options }, onword);
  },
  async stages(image, question, options = {}) {
    await ready;
    return model.run({ kind: "stages", image: plain(image), question, ...options });
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// The little world, drawn as tiny/scenes.py draws it

const COLOURS = {
  red: [217, 40, 44],
  orange: [244, 132, 22],
  yellow: [250, 212, 48],
  green: [44, 158, 68],
  blue: [38, 98, 222],
  purple: [146, 58, 184],
};
const SHAPES = ["circle", "square", "triangle", "star"];
const SIZES = { small: 0.18, large: 0.27 }; // diameter, as a fraction of the picture's side
const REACH = 0.57; // how far a tip is from the centre, in diameters
const PLACES = [
  "top left",
  "top middle",
  "top right",
  "middle left",
  "centre",
  "middle right",
  "bottom left",
  "bottom middle",
  "bottom right",
];
const SIDE = 224;
const LIGHT = { top: [236, 234, 229], bottom: [224, 221, 214] },
  DARK = { top: [44, 46, 52], bottom: [33, 34, 40] };

function outline({ shape, x, y, diameter, tilt }) {
  const [corners, radii] = {
    circle: [60, [0.5]],
    square: [4, [0.6]],
    triangle: [3, [REACH]],
    star: [10, [REACH, 0.25]],
  }[shape];
  const start = tilt + (shape === "square" ? Math.PI / 4 : 0);
  return Array.from({ length: corners }, (_, i) => {
    const angle = start + (2 * Math.PI * i) / corners,
      radius = diameter * radii[i % radii.length];
    return [x + radius * Math.sin(angle), y - radius * Math.cos(angle)];
  });
}

function paint(context, side, { things, ground }) {
  const rgb = colour => `rgb(${colour.join()})`,
    shade = context.createLinearGradient(0, 0, 0, side);
  shade.addColorStop(0.25, rgb(ground.top));
  shade.addColorStop(0.75, rgb(ground.bottom));
  context.fillStyle = shade;
  context.fillRect(0, 0, side, side);
  for (const thing of things) {
    context.fillStyle = rgb(thing.rgb ?? COLOURS[thing.colour]);
    context.beginPath();
    for (const [x, y] of outline(thing)) context.lineTo(x * side, y * side);
    context.fill();
  }
}

const seen = make("canvas", { width: SIDE, height: SIDE }).getContext("2d", { willReadFrequently: true });
window.llava.paint = scene => {
  paint(seen, SIDE, scene);
  return seen.getImageData(0, 0, SIDE, SIDE);
};

const cell = thing => 3 * clamp(Math.floor(thing.y * 3), 0, 2) + clamp(Math.floor(thing.x * 3), 0, 2);
const placeOf = number => (number === 4 ? "in the centre" : `at the ${PLACES[number]}`);
const sizeOf = thing => (thing.diameter < (SIZES.small + SIZES.large) / 2 ? "small" : "large");
const words = thing => `${sizeOf(thing)} ${thing.colour} ${thing.shape}`;
const inOrder = things => [...things].sort((a, b) => cell(a) - cell(b));
const listed = parts => [parts.slice(0, -1).join(", "), parts.at(-1)].filter(Boolean).join(" and ");

// What is on a picture, in the words that tiny was taught: "a small red circle in the centre and …."
function sentence(things) {
  return `${listed(inOrder(things).map(t => `a ${words(t)} ${placeOf(cell(t))}`))}.`;
}

function randomScene() {
  const cells = PLACES.map((_, i) => i)
      .sort(() => Math.random() - 0.5)
      .slice(0, 2 + Math.floor(Math.random() * 3)),
    looks = new Set();
  const things = cells.map(number => {
    let look;
    do look = [pick(SHAPES), pick(Object.keys(COLOURS)), pick(["small", "large"])];
    while (looks.has(look.join()));
    looks.add(look.join());
    return placed(number, ...look);
  });
  return { things, ground: Math.random() < 0.3 ? DARK : LIGHT };
}

function placed(number, shape, colour, size, jitter = 1) {
  const diameter = SIZES[size] * (1 + (jitter * (Math.random() - 0.5)) / 10),
    slack = jitter * (1 / 6 - REACH * diameter - 0.004);
  const [x, y] = [number % 3, Math.floor(number / 3)].map(i => (i + 0.5) / 3 + slack * (2 * Math.random() - 1));
  return { shape, colour, x, y, diameter, tilt: jitter * (Math.random() - 0.5) * 0.4 };
}

// The kinds of questions, each about one of the shapes: kind → a function that writes one for this picture.
function nameOf(thing, things, hide = []) {
  const parts = { size: sizeOf, colour: t => t.colour, shape: t => t.shape };
  for (const used of [
    ["shape"],
    ["colour"],
    ["colour", "shape"],
    ["size", "shape"],
    ["size", "colour"],
    ["size", "colour", "shape"],
  ]) {
    const same = things.filter(other => used.every(part => parts[part](other) === parts[part](thing)));
    if (same.length === 1 && !used.some(part => hide.includes(part)))
      return [
        "the",
        ...["size", "colour"].filter(p => used.includes(p)).map(p => parts[p](thing)),
        used.includes("shape") ? thing.shape : "object",
      ].join(" ");
  }
  return hide.includes("place") ? `the ${words(thing)}` : `the object ${placeOf(cell(thing))}`;
}
const QUESTIONS = {
  describe: () => "Describe the image.",
  colour: (thing, things) => `What colour is ${nameOf(thing, things, ["colour"])}?`,
  shape: (thing, things) => `What shape is ${nameOf(thing, things, ["shape"])}?`,
  "how many": (thing, _, turn) =>
    `How many ${["objects", `${thing.colour} objects`, `${thing.shape}s`][turn % 3]} are there?`,
  where: (thing, things) => `Where is ${nameOf(thing, things, ["place"])}?`,
  "left or above": (thing, things) => {
    const other = things.find(t => t !== thing && cell(t) !== cell(thing));
    if (!other) return null;
    const beside = cell(thing) % 3 !== cell(other) % 3;
    const names = [thing, other].map(t => nameOf(t, things, ["place"]));
    return `Is ${names[0]} ${beside ? "left of" : "above"} ${names[1]}?`;
  },
  "is there": (thing, _, turn) => {
    const colour = turn % 2 ? pick(Object.keys(COLOURS)) : thing.colour;
    return `Is there ${/^[aeiou]/.test(colour) ? "an" : "a"} ${colour} ${thing.shape}?`;
  },
};

// ---------------------------------------------------------------------------------------------------------------------
// What is on the page

const state = {
  scene: {
    ground: matchMedia("(prefers-color-scheme: dark)").matches ? DARK : LIGHT,
    things: [
      placed(1, "circle", "blue", "small", 0),
      placed(3, "triangle", "green", "large", 0),
      placed(5, "star", "yellow", "large", 0),
      placed(6, "square", "red", "small", 0),
    ],
  },
  own: null, // a picture of one's own: its middle square
  chosen: null, // the shape that the tools are about
  question: "Describe the image.",
  turn: 0,
  bug: "",
  change: "",
  words: [], // of the answer, as they come
  done: null, // the answer, once it is complete
  before: null, // the answer before a shape was moved
  lit: true, // whether one word is to show where it looked
  pinned: null, // the number of that word
  pointed: null, // the number of the word that is pointed at
  patch: 24, // where one points on the road
  token: null, // or there: a position of the prompt, a piece of the vocabulary
};
const grid = files.config.vision_config.image_size / files.config.vision_config.patch_size;

const NO_SHAPES =
  "tiny has seen nothing but drawings of coloured shapes, so what it says of your picture means nothing. " +
  "It sees the middle square.";
const NO_WORD = "Where it looked lights up on the picture, and here stands what else it could have been.";

// The picture as the model gets it.
const image = () => state.own ?? window.llava.paint(state.scene);

// ---- the board

const big = $("picture").getContext("2d");
function drawBoard() {
  const side = Math.round($("board").clientWidth * Math.min(devicePixelRatio || 1, 3));
  if ($("picture").width !== side) $("picture").width = $("picture").height = side;
  if (state.own) {
    const { bitmap, left, top, short } = state.own;
    big.drawImage(bitmap, left, top, short, short, 0, 0, side, side);
  } else paint(big, side, state.scene);
  drawThings();
  const drawn = state.scene.things.length ? `You drew ${sentence(state.scene.things)}` : "You drew nothing.";
  $("caption").textContent = state.own ? NO_SHAPES : drawn;
  for (const control of $("tools").querySelectorAll("button, input")) control.disabled = !!state.own;
  $("back").hidden = !state.own;
  $("fresh").hidden = $("ground").hidden = !!state.own;
  if (state.own) $("hint").hidden = true;
  drawTools();
}

function drawThings() {
  const board = $("things"),
    side = $("board").clientWidth,
    dark = state.scene.ground.top[0] < 128;
  board.hidden = !!state.own;
  board.style.setProperty("--ring", dark ? "#fff" : "#222");
  const kept = [...board.querySelectorAll(".thing")];
  state.scene.things.forEach((thing, i) => {
    let button = kept.find(b => b.thing === thing);
    if (!button) {
      button = make("button", { type: "button", class: "thing" });
      button.thing = thing;
      board.append(button);
    }
    const size = Math.max(44 / side, thing.diameter * 1.14);
    Object.assign(button.style, {
      left: `${100 * thing.x}%`,
      top: `${100 * thing.y}%`,
      width: `${100 * size}%`,
      height: `${100 * size}%`,
      zIndex: i + 1,
    });
    button.setAttribute("aria-label", `${words(thing)}, ${placeOf(cell(thing))}`);
    button.setAttribute("aria-pressed", String(thing === state.chosen));
  });
  for (const button of kept) if (!state.scene.things.includes(button.thing)) button.remove();
  let handle = $("handle");
  if (!handle) board.append((handle = make("div", { id: "handle", "aria-hidden": "true" })));
  handle.hidden = !state.chosen;
  if (state.chosen) {
    const { x, y, diameter } = state.chosen,
      reach = Math.max(22 / side, diameter * 0.57) * Math.SQRT1_2;
    Object.assign(handle.style, {
      left: `${100 * clamp(x + reach, 0.03, 0.97)}%`,
      top: `${100 * clamp(y + reach, 0.03, 0.97)}%`,
      zIndex: 99,
    });
  }
}

function drawTools() {
  const thing = state.own ? null : state.chosen;
  for (const swatch of $("colours").children) {
    swatch.disabled = !thing;
    swatch.setAttribute("aria-pressed", String(thing?.colour === swatch.title));
  }
  $("size").disabled = $("remove").disabled = !thing;
  if (thing) $("size").value = Math.round(100 * thing.diameter);
}

function changed(moving = false) {
  // the picture is another one
  $("hint").hidden = true;
  if (!moving) state.before = state.done;
  drawBoard();
  refresh();
}

function choose(thing) {
  state.chosen = thing;
  drawThings();
  drawTools();
}

function addThing(shape) {
  const free = PLACES.map((_, i) => i).filter(i => !state.scene.things.some(t => cell(t) === i));
  const colour = pick(
    Object.keys(COLOURS).filter(c => !state.scene.things.some(t => t.colour === c && t.shape === shape)),
  );
  const thing = placed(free.length ? pick(free) : 4, shape, colour ?? "red", "large");
  state.scene.things.push(thing);
  state.chosen = thing;
  changed();
}

function removeThing(thing) {
  if (!thing) return;
  const things = state.scene.things,
    i = things.indexOf(thing),
    focused = document.activeElement?.thing === thing;
  things.splice(i, 1);
  state.chosen = null;
  changed();
  if (focused) ($("things").querySelectorAll(".thing")[Math.min(i, things.length - 1)] ?? $("add").firstChild).focus();
}

function move(thing, x, y) {
  [thing.x, thing.y] = [clamp(x, 0.04, 0.96), clamp(y, 0.04, 0.96)];
}

$("things").addEventListener("pointerdown", event => {
  const thing = event.target.thing ?? (event.target.id === "handle" ? state.chosen : null),
    board = $("board").getBoundingClientRect();
  if (event.button || !thing) return void (event.target === $("things") && choose(null));
  const resize = event.target.id === "handle",
    at = e => [(e.clientX - board.left) / board.width, (e.clientY - board.top) / board.height];
  const [x0, y0] = at(event),
    from = { ...thing },
    target = event.target;
  const far = ([x, y]) => Math.hypot(x - from.x, y - from.y);
  choose(thing);
  target.setPointerCapture(event.pointerId);
  state.before = state.done;
  $("board").classList.add("dragging");
  const moved = e => {
    const [x, y] = at(e);
    if (resize) thing.diameter = clamp((from.diameter * far([x, y])) / far([x0, y0]), 0.08, 0.45);
    else move(thing, from.x + x - x0, from.y + y - y0);
    changed(true);
  };
  const ended = () => {
    $("board").classList.remove("dragging");
    target.removeEventListener("pointermove", moved);
    changed(true);
  };
  target.addEventListener("pointermove", moved);
  target.addEventListener("lostpointercapture", ended, { once: true });
});
$("things").addEventListener("focusin", event => event.target.thing && choose(event.target.thing));
$("things").addEventListener("keydown", event => {
  const thing = event.target.thing,
    step = event.shiftKey ? 1 / 12 : 1 / 56;
  if (!thing || event.ctrlKey || event.metaKey || event.altKey) return;
  const next = (list, value) => list[(list.indexOf(value) + 1) % list.length],
    start = state.done;
  const act = {
    ArrowLeft: () => move(thing, thing.x - step, thing.y),
    ArrowRight: () => move(thing, thing.x + step, thing.y),
    ArrowUp: () => move(thing, thing.x, thing.y - step),
    ArrowDown: () => move(thing, thing.x, thing.y + step),
    "+": () => (thing.diameter = clamp(thing.diameter + 0.02, 0.08, 0.45)),
    "-": () => (thing.diameter = clamp(thing.diameter - 0.02, 0.08, 0.45)),
    c: () => (thing.colour = next(Object.keys(COLOURS), thing.colour)),
    s: () => (thing.shape = next(SHAPES, thing.shape)),
    Delete: () => removeThing(thing),
    Backspace: () => removeThing(thing),
  }[event.key === "=" ? "+" : event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
  if (event.repeat) changed(true);
  else {
    state.before = start;
    changed(true);
  }
});

for (const shape of SHAPES) {
  const points = outline({ shape, x: 0.5, y: 0.5, diameter: 0.8, tilt: 0 })
    .map(p => p.map(n => n.toFixed(3)).join())
    .join(" ");
  const button = make("button", {
    type: "button",
    class: "icon",
    title: `Add a ${shape}`,
    "aria-label": `Add a ${shape}`,
  });
  button.innerHTML = `<svg viewBox="0 0 1 1" aria-hidden="true"><polygon points="${points}"/></svg>`;
  button.onclick = () => addThing(shape);
  $("add").append(button);
}
for (const [colour, rgb] of Object.entries(COLOURS)) {
  const button = make("button", {
    type: "button",
    class: "swatch",
    title: colour,
    "aria-label": colour,
    style: `--colour: rgb(${rgb.join()})`,
  });
  button.onclick = () => {
    state.chosen.colour = colour;
    changed();
  };
  $("colours").append(button);
}
$("size").oninput = () => {
  state.chosen.diameter = $("size").value / 100;
  changed(true);
};
$("size").onpointerdown = () => (state.before = state.done);
$("remove").onclick = () => removeThing(state.chosen);
$("fresh").onclick = () => {
  Object.assign(state, { scene: randomScene(), chosen: null, before: null, done: null });
  drawBoard();
  refresh();
};
$("ground").onclick = () => {
  state.scene.ground = state.scene.ground.top[0] < 128 ? LIGHT : DARK;
  changed();
};

// ---- a picture of one's own

async function open(file) {
  if (!file) return;
  try {
    const bitmap = await createImageBitmap(file),
      { width, height } = bitmap,
      short = Math.min(width, height);
    const shrink = Math.min(1, Math.sqrt(4e6 / (width * height))),
      w = Math.max(1, Math.round(width * shrink)),
      h = Math.max(1, Math.round(height * shrink));
    const context = make("canvas", { width: w, height: h }).getContext("2d");
    context.drawImage(bitmap, 0, 0, w, h);
    const { data } = context.getImageData(0, 0, w, h);
    state.own = { width: w, height: h, data, bitmap, short, left: (width - short) / 2, top: (height - short) / 2 };
    Object.assign(state, { chosen: null, pinned: null, before: null, done: null, words: [] });
    drawBoard();
    drawAnswer();
    refresh();
  } catch {
    refuse("caption", `${file.name} is not a picture that this browser can read.`);
  }
}
$("file").onchange = () => {
  open($("file").files[0]);
  $("file").value = "";
};
$("back").onclick = () => {
  Object.assign(state, { own: null, before: null, done: null });
  drawBoard();
  refresh();
};
for (const name of ["dragenter", "dragover", "dragleave", "drop"])
  document.addEventListener(name, event => {
    if (![...(event.dataTransfer?.types ?? [])].includes("Files")) return;
    event.preventDefault();
    $("board").classList.toggle("drop", name === "dragenter" || name === "dragover");
    if (name === "drop") open(event.dataTransfer.files[0]);
  });

// ---------------------------------------------------------------------------------------------------------------------
// Asking: one answer at a time. What changes in the meantime waits, and only the newest of it.

let wanted = false,
  running = null,
  comparing = null;
const LIMIT = 96; // words; a bug can keep it talking

function refresh(anew = false) {
  wanted = true;
  if (anew) running?.stop(); // another question: nobody wants to hear the rest
  if (!running) next();
}

async function next() {
  await ready;
  while (wanted && !running) {
    wanted = false;
    const { question, bug, change } = state,
      said = [],
      began = performance.now(),
      fresh = !state.done;
    const job = { kind: "answer", image: plain(image()), question, limit: LIMIT };
    running = model.run({ ...job, bug, change }, word => {
      said.push(word);
      if (said.length === 1) document.body.dataset.first = (performance.now() - began).toFixed(1); // and the way back
      if (!fresh || question !== state.question || bug !== state.bug || change !== state.change) return;
      state.words = said;
      drawAnswer();
    });
    try {
      const done = await running;
      if (done) {
        Object.assign(state, { words: said, done: { ...done, words: said, question, first: said[0].ms } });
        comparing = bug || change ? await model.run(job) : null;
        if (!wanted) drawComparison();
        answered();
      }
    } catch (error) {
      refuse("time", error.message);
    } finally {
      running = null;
    }
  }
}

// Says what cannot be done, where it is seen and where a screen reader hears it.
function refuse(place, text) {
  clearTimeout(speaking);
  $(place).textContent = $("said").textContent = text;
}

function ask(question) {
  Object.assign(state, { question, before: null, done: null, words: [], pinned: null, pointed: null });
  $("question").value = question;
  drawAnswer();
  refresh(true);
}

$("ask").onsubmit = event => {
  event.preventDefault();
  for (const button of $("kinds").children) button.setAttribute("aria-pressed", "false");
  if ($("question").value.trim()) ask($("question").value.trim());
};
for (const kind of Object.keys(QUESTIONS)) {
  const button = make("button", { type: "button", "aria-pressed": String(kind === "describe") }, kind);
  button.onclick = () => {
    const things = inOrder(state.scene.things),
      subject = state.chosen ?? things[state.turn++ % things.length];
    const question =
      kind === "describe" ? QUESTIONS.describe() : subject && QUESTIONS[kind](subject, things, state.turn);
    for (const other of $("kinds").children) other.setAttribute("aria-pressed", String(other === button));
    if (question) ask(question);
    else refuse("time", "For this question there have to be more shapes on the picture.");
  };
  $("kinds").append(button);
}

// ---- the answer

let speaking = 0;
function answered() {
  const { done } = state,
    ms = n => `${n < 10 ? n.toFixed(1) : Math.round(n)} ms`;
  const cut = done.words.at(-1).end ? "" : " Cut off here: it would go on.";
  $("time").textContent =
    `First word after ${ms(done.first)}, all ${done.words.length} after ${ms(done.ms)}, in this browser.${cut}`;
  document.body.dataset.answer = done.text;
  document.body.dataset.ms = done.ms.toFixed(1);
  clearTimeout(speaking);
  speaking = setTimeout(() => ($("said").textContent = `tiny says: ${done.text}`), 700); // once, when it is settled
  if (state.lit && state.pinned === null) {
    // to begin with, the word that looked most closely at one place
    const peaks = done.looks.map((look, i) => (done.words[i].end ? -1 : Math.max(...look)));
    state.pinned = peaks.indexOf(Math.max(...peaks));
  }
  if (!("ready" in document.body.dataset)) setTimeout(() => refresh(), 300); // the first time was a cold start
  document.body.dataset.ready = "";
  drawAnswer();
  const road = $("road").getBoundingClientRect();
  if (!$("board").classList.contains("dragging") || (road.bottom > 0 && road.top < innerHeight)) drawRoad();
}

const shownWord = () => {
  const i = state.pointed ?? state.pinned;
  return i === null ? null : Math.min(i, state.words.length - 1);
};
const readable = text => (text === "\n" ? "line break" : text.trim() || "space");

function drawAnswer() {
  const box = $("answer"),
    { words: said, before } = state,
    shown = shownWord();
  const added =
    before?.question === state.question
      ? news(
          before.words.map(word => word.id),
          said.map(word => word.id),
        )
      : new Set();
  while (box.children.length > said.length) box.lastChild.remove();
  said.forEach((word, i) => {
    const button = box.children[i] ?? box.appendChild(make("button", { type: "button" }));
    const text = word.end ? "end" : word.text.trim() || "·";
    if (button.textContent !== text) button.textContent = text;
    const following = said[i + 1],
      gap = following && (following.text.startsWith(" ") || following.end);
    button.className = [gap ? "gap" : "", word.end ? "end" : "", added.has(i) ? "new" : ""].filter(Boolean).join(" ");
    button.style.setProperty("--p", word.p.toFixed(3));
    button.setAttribute("aria-pressed", String(i === shown));
    button.tabIndex = i === (state.pinned === null ? 0 : Math.min(state.pinned, said.length - 1)) ? 0 : -1;
  });
  const how = state.bug ? labels[state.bug] : state.change ? labels[state.change] : "";
  $("warning").hidden = !how;
  $("warning").firstChild.textContent = how && `${how}.`;
  drawChanged();
  drawWord();
}

// Which of the new words do not stand in the old answer: those outside the longest common row of both.
function news(old, said) {
  const best = Array.from({ length: old.length + 1 }, () => new Uint16Array(said.length + 1)),
    added = new Set();
  for (let i = old.length - 1; i >= 0; i--)
    for (let j = said.length - 1; j >= 0; j--)
      best[i][j] = old[i] === said[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
  for (let i = 0, j = 0; j < said.length;) {
    if (i < old.length && old[i] === said[j]) [i, j] = [i + 1, j + 1];
    else if (i < old.length && best[i + 1][j] >= best[i][j + 1]) i++;
    else added.add(j++);
  }
  return added;
}

// What a move has changed, in words.
function drawChanged() {
  const { before, done } = state,
    old = before?.question === state.question && done && before.text !== done.text ? before.text.split(" ") : [];
  const said = old.length ? done.text.split(" ") : [],
    pairs = said.map((word, i) => [old[i], word]).filter(([a, b]) => a !== b);
  $("changed").textContent = !pairs.length
    ? ""
    : before.text.length < 30
      ? `Before you changed the picture: “${before.text}”.`
      : old.length === said.length && pairs.length <= 3
        ? `New: ${pairs.map(([a, b]) => `“${b}”, before it was “${a}”`.replaceAll(/[.,](?=”)/g, "")).join("; ")}.`
        : "New words are marked.";
}

const percent = p => (p >= 0.9995 ? "100%" : p < 0.0005 ? "< 0.1%" : `${(100 * p).toFixed(1)}%`);

function drawWord() {
  const shown = shownWord(),
    word = state.words[shown],
    bars = $("bars");
  $("chosen").textContent = word ? `“${word.end ? "the end" : readable(word.text)}”` : "Point at a word";
  drawHeat(word ? shown : null);
  const before = state.before?.question === state.question ? state.before : null;
  const same = before && state.words.slice(0, shown).every((w, i) => w.id === before.words[i]?.id); // led here
  const old =
    word && same
      ? new Map(
          [before.words[shown], ...(before.words[shown]?.others ?? [])]
            .filter(Boolean)
            .map(w => (Array.isArray(w) ? [w[0].trim(), w[1]] : [w.text.trim(), w.p])),
        )
      : new Map();
  $("before").hidden = !old.size;
  bars.hidden = !word;
  if (!word) return;
  const rows = [
    [word.end ? "the end" : word.text, word.p, true],
    ...word.others.map(([text, p]) => [text === "</s>" ? "the end" : text, p, false]),
  ];
  bars.replaceChildren(
    ...rows.flatMap(([text, p, chosen]) => {
      const track = make("dd", { class: "track" }, make("i", { style: `width: ${100 * p}%` }));
      const was = old.get(text.trim());
      if (was > 0.005) track.append(make("b", { style: `left: calc(${100 * was}% - 1px)` }));
      return [
        make("dt", chosen ? { class: "chosen" } : {}, readable(text)),
        track,
        make("dd", { class: "share" }, percent(p)),
      ];
    }),
  );
}

// Where a word looked: what is lit was looked at more than by the other words.
function drawHeat(i) {
  const canvas = $("heat"),
    context = canvas.getContext("2d"),
    look = i === null ? null : state.done?.looks[i];
  canvas.width = canvas.height = grid;
  const note = text => ($("looked").textContent = text);
  if (!look) {
    if (i === null) note(NO_WORD);
    return;
  }
  const most = Math.max(1e-9, ...state.done.looks.map(row => Math.max(...row))),
    pixels = context.createImageData(grid, grid);
  const veil = !state.own && state.scene.ground.top[0] < 128 ? 0 : 255,
    dim = veil ? 0.66 : 0.62;
  look.forEach((weight, patch) => {
    pixels.data.set([veil, veil, veil, 255 * dim * (1 - Math.sqrt(weight / most))], 4 * patch);
  });
  context.putImageData(pixels, 0, 0);
  const best = look.indexOf(Math.max(...look)),
    centre = { x: ((best % grid) + 0.5) / grid, y: (Math.floor(best / grid) + 0.5) / grid },
    share = state.done.share[i];
  note(
    look[best] > 0
      ? `Looked most ${placeOf(cell(centre))}: there the picture stays bright. ` +
          `${percent(share)} of its attention went to the picture, the rest to words.`
      : "Looked at no place more than the other words did, so all of the picture is pale.",
  );
}

$("answer").addEventListener("click", event => {
  const i = [...$("answer").children].indexOf(event.target);
  if (i < 0) return;
  state.pinned = state.pinned === i && event.detail ? null : i;
  state.lit = state.pinned !== null;
  state.pointed = null;
  drawAnswer();
  drawRoad();
});
$("answer").addEventListener("pointerover", event => {
  const i = [...$("answer").children].indexOf(event.target);
  if (event.pointerType !== "mouse" || i < 0) return;
  state.pointed = i;
  drawAnswer();
});
$("answer").addEventListener("pointerleave", () => {
  state.pointed = null;
  drawAnswer();
});
$("answer").addEventListener("keydown", event => {
  const buttons = [...$("answer").children],
    i = buttons.indexOf(event.target);
  const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: buttons.length - 1 }[event.key];
  if (event.key === "Escape") Object.assign(state, { pinned: null, pointed: null, lit: false });
  else if (to === undefined || !buttons[to]) return;
  else Object.assign(state, { pinned: to, lit: true });
  event.preventDefault();
  drawAnswer();
  if (to !== undefined) buttons[to].focus();
  drawRoad();
});

// ---------------------------------------------------------------------------------------------------------------------
// Breaking it

const labels = { cover: "The picture is covered", shuffle: "The patches are shuffled" };
const meanings = {
  cover: "Instead of the picture the eye gets one plain colour.",
  shuffle: "The picture is cut into its squares, and these are laid down in another order: see below, at the patches.",
};
function drawSwitch(bugs) {
  for (const [name, { says, means }] of Object.entries(bugs)) [labels[name], meanings[name]] = [says, means];
  for (const [name, text] of [["", "As it is"], ...Object.entries(labels)]) {
    const input = make("input", { type: "radio", name: "switch", value: name });
    input.checked = !name;
    input.onchange = () => breakIt(name);
    $("switch").append(make("label", { class: "choice" }, input, text));
  }
}

function breakIt(name) {
  const isChange = name === "cover" || name === "shuffle";
  Object.assign(state, { bug: isChange ? "" : name, change: isChange ? name : "", before: null, done: null });
  for (const input of $("switch").querySelectorAll("input")) input.checked = input.value === name;
  $("means").textContent = meanings[name] ?? "";
  if (!name) drawComparison((comparing = null));
  refresh(true);
}
$("mend").onclick = () => {
  breakIt("");
  $("question").focus();
};

// Which stage diverges first from what it should be, as tests/parity.py tells it.
function diverges(wrong, right) {
  for (const name of Object.keys(right)) {
    const a = wrong[name],
      b = right[name];
    if (!a || a.length !== b.length) return { name, by: 1 };
    let worst = 0,
      most = 0;
    for (let i = 0; i < b.length; i++) {
      worst = Math.max(worst, Math.abs(a[i] - b[i]));
      most = Math.max(most, Math.abs(b[i]));
    }
    if (worst > 1e-5 * most) return { name, by: worst / most };
  }
  return null;
}

// A stage's name in words.
function called(stage) {
  const [part, block] = stage.split("."),
    what = { vision: "the eye", llama: "the decoder" }[part];
  if (!what) return { pixels: "what goes into the eye", projector: "the bridge between eye and decoder" }[part] ?? part;
  return Number(block) ? `what block ${block} of ${what} makes` : `the start of ${what}`;
}

function drawComparison() {
  $("compare").hidden = !comparing;
  $("verdict").textContent = "";
  if (!comparing || !state.done) return;
  const name = state.bug || state.change,
    wrong = state.done.text.split(" "),
    other = news(comparing.text.split(" "), wrong),
    cut = state.done.words.at(-1).end ? "" : " …";
  $("right").textContent = comparing.text;
  $("how").textContent = labels[name];
  $("wrong").replaceChildren(
    ...wrong.flatMap((word, i) => [i ? " " : "", other.has(i) ? make("mark", {}, word) : word]),
    cut,
  );
  const same = comparing.text === state.done.text,
    first = diverges(state.done.stages, comparing.stages);
  $("verdict").textContent =
    (same
      ? "The answer is the same, word for word: who looks only at answers would never find this. "
      : state.change
        ? "It answers all the same. "
        : "No error, no warning: only other words. ") +
    (first
      ? `Compare the numbers with the right ones, stage after stage: the first that diverges is ${first.name}, ` +
        `${called(first.name)}, by ${percent(Math.min(1, first.by))} of its largest number.`
      : "");
}

// ---------------------------------------------------------------------------------------------------------------------
// The road

const pieces = [];
for (const [piece, id] of Object.entries(files.tokenizer.model.vocab)) pieces[id] = piece;
for (const { id, content } of files.tokenizer.added_tokens) pieces[id] = content;
const colour = name =>
  getComputedStyle(document.documentElement).getPropertyValue(name).trim().split(/\s+/).map(Number);

function matrix(canvas, data, width, rows = data.length / width) {
  const low = colour("--low"),
    mid = colour("--mid"),
    high = colour("--high"),
    context = canvas.getContext("2d");
  const sorted = Float32Array.from(data, Math.abs).sort(),
    scale = sorted[Math.floor(0.99 * sorted.length)] || 1;
  [canvas.width, canvas.height] = [width, rows];
  const pixels = context.createImageData(width, rows);
  for (let i = 0; i < data.length; i++) {
    const part = clamp(data[i] / scale, -1, 1),
      end = part < 0 ? low : high,
      t = Math.abs(part) ** 0.8;
    for (let c = 0; c < 3; c++) pixels.data[4 * i + c] = mid[c] + (end[c] - mid[c]) * t;
    pixels.data[4 * i + 3] = 255;
  }
  context.putImageData(pixels, 0, 0);
}

const views = Object.fromEntries(
  [...document.querySelectorAll(".view")].map(view => [
    view.dataset.view,
    {
      box: view,
      canvas: view.querySelector("canvas"),
      cursor: view.querySelector("i"),
      shape: view.parentElement.querySelector("code"),
    },
  ]),
);

function small(pixels) {
  // the pixel values of the tower as a picture again
  const { image_mean: mean, image_std: std } = files.preprocessor,
    size = files.config.vision_config.image_size;
  const out = new ImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++)
      out.data[4 * i + c] = Math.round(255 * (pixels[c * size * size + i] * std[c] + mean[c]));
    out.data[4 * i + 3] = 255;
  }
  return out;
}

function drawRoad() {
  const { done } = state;
  if (!done) return;
  const { vision_config: eye, text_config: voice } = files.config,
    size = eye.image_size,
    patch = eye.patch_size;
  const context = (view, side) => {
    view.canvas.width = view.canvas.height = side;
    return view.canvas.getContext("2d");
  };
  const shown = small(done.stages.pixels),
    gap = 1;
  context(views.pixels, size).putImageData(shown, 0, 0);
  const cut = context(views.patches, size + gap * (grid - 1));
  for (let i = 0; i < grid * grid; i++) {
    const x = i % grid,
      y = Math.floor(i / grid);
    cut.putImageData(shown, x * gap, y * gap, x * patch, y * patch, patch, patch);
  }
  matrix(views.tower.canvas, fromTower(done).slice(eye.hidden_size), eye.hidden_size); // without the class token
  matrix(views.projector.canvas, done.stages.projector, voice.hidden_size);
  matrix(views.merge.canvas, done.stages.merge, voice.hidden_size);
  matrix(views.decoder.canvas, done.stages[`llama.${voice.num_hidden_layers}`], voice.hidden_size);
  const { logits } = chosenWord(done),
    mean = logits.reduce((a, b) => a + b) / logits.length;
  matrix(
    views.words.canvas,
    logits.map(x => x - mean),
    COLUMNS,
  );
  const shapes = {
    pixels: `3 × ${size} × ${size}`,
    patches: `${grid * grid} × ${3 * patch * patch}`,
    tower: `${grid * grid} × ${eye.hidden_size}`,
    projector: `${grid * grid} × ${voice.hidden_size}`,
    merge: `${done.labels.length} × ${voice.hidden_size}`,
    decoder: `${done.labels.length} × ${voice.hidden_size}`,
    words: `${logits.length}`,
  };
  for (const [name, text] of Object.entries(shapes)) views[name].shape.textContent = text;
  drawProbe();
}

const COLUMNS = 20; // in which the vocabulary is shown
const chosenWord = done => done.words[shownWord() ?? 0] ?? done.words[0];
const fromTower = ({ stages }) => stages[Object.keys(stages).findLast(name => name.startsWith("vision."))];

// Where one points: on a patch, everywhere at once; on a word of the prompt; on a piece of the vocabulary.
function drawProbe() {
  const { done, patch, token } = state,
    put = (name, left, top, width, height) => {
      const style = views[name].cursor.style;
      views[name].cursor.hidden = left === null;
      for (const [side, value] of Object.entries({ left, top, width, height })) style[side] = `${100 * value}%`;
    };
  if (!done) return;
  const first = done.labels.indexOf(null),
    row = Math.floor(patch / grid),
    column = patch % grid,
    T = done.labels.length;
  const at = token?.position ?? first + patch,
    onPatch = done.labels[at] === null;
  for (const name of ["pixels", "patches"]) put(name, onPatch ? column / grid : null, row / grid, 1 / grid, 1 / grid);
  for (const name of ["tower", "projector"]) put(name, onPatch ? 0 : null, patch / (grid * grid), 1, 1 / (grid * grid));
  for (const name of ["merge", "decoder"]) put(name, 0, at / T, 1, 1 / T);
  const { logits, id } = chosenWord(done),
    rows = Math.ceil(logits.length / COLUMNS),
    piece = token?.piece ?? id;
  put("words", (piece % COLUMNS) / COLUMNS, Math.floor(piece / COLUMNS) / rows, 1 / COLUMNS, 1 / rows);
  const spread = (data, width, index) => {
    const part = data.subarray(index * width, (index + 1) * width);
    return `${width} numbers from ${Math.min(...part).toFixed(1)} to ${Math.max(...part).toFixed(1)}`;
  };
  const { vision_config: eye, text_config: voice } = files.config;
  const order = [...logits.keys()].sort((a, b) => logits[b] - logits[a]).indexOf(piece) + 1;
  const text = [`Word “${readable(pieces[piece].replaceAll("▁", " "))}”: score ${logits[piece].toFixed(1)},`];
  text.push(`number ${order} of ${logits.length}.`);
  if (onPatch)
    text.unshift(
      `Patch ${patch + 1} of ${grid * grid}, row ${row + 1}, column ${column + 1}.`,
      `Out of the eye: ${spread(fromTower(done), eye.hidden_size, patch + 1)}.`,
      `Out of the projector: ${spread(done.stages.projector, voice.hidden_size, patch)}.`,
      `In the prompt it stands at position ${at + 1} of ${T}.`,
    );
  else
    text.unshift(
      `Position ${at + 1} of ${T}: “${readable(done.labels[at])}”, a piece of the prompt,`,
      `${spread(done.stages.merge, voice.hidden_size, at)}.`,
    );
  $("reading").textContent = text.join(" ");
  $("probe").value = patch;
  $("probe").setAttribute("aria-valuetext", `row ${row + 1}, column ${column + 1}`);
}

for (const [name, { box }] of Object.entries(views)) {
  const point = event => {
    if (!state.done) return;
    const area = box.getBoundingClientRect(),
      x = clamp((event.clientX - area.left) / area.width, 0, 0.999),
      y = clamp((event.clientY - area.top) / area.height, 0, 0.999);
    const { labels: prompt, words: said } = state.done,
      first = prompt.indexOf(null);
    state.token = null;
    if (name === "pixels" || name === "patches") state.patch = Math.floor(y * grid) * grid + Math.floor(x * grid);
    else if (name === "tower" || name === "projector") state.patch = Math.floor(y * grid * grid);
    else if (name === "words") {
      const { length } = said[0].logits,
        at = Math.floor(y * Math.ceil(length / COLUMNS)) * COLUMNS + Math.floor(x * COLUMNS);
      state.token = { piece: Math.min(length - 1, at) };
    } else {
      const position = Math.floor(y * prompt.length);
      if (prompt[position] === null) state.patch = position - first;
      else state.token = { position };
    }
    drawProbe();
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("keydown", event => {
    const across = { ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? 0,
      down = { ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0;
    if (!state.done || !(across || down) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    step(name, across, down);
    drawProbe();
  });
  box.addEventListener("focus", () => $("reading").setAttribute("aria-live", "polite")); // heard while one walks there
  box.addEventListener("blur", () => $("reading").setAttribute("aria-live", "off"));
}

// An arrow key on the road: one patch, row or piece further.
function step(name, across, down) {
  const { labels: prompt, words: said } = state.done,
    first = prompt.indexOf(null),
    { length } = said[0].logits;
  if (name === "words") {
    const piece = state.token?.piece ?? chosenWord(state.done).id;
    state.token = { piece: clamp(piece + across + COLUMNS * down, 0, length - 1) };
  } else if (name === "merge" || name === "decoder") {
    const position = clamp((state.token?.position ?? first + state.patch) + across + down, 0, prompt.length - 1);
    state.token = prompt[position] === null ? null : { position };
    if (!state.token) state.patch = position - first;
  } else {
    const rows = name === "pixels" || name === "patches" ? grid : 1;
    state.patch = clamp(state.patch + across + rows * down, 0, grid * grid - 1);
    state.token = null;
  }
}
$("probe").oninput = () => {
  Object.assign(state, { patch: Number($("probe").value), token: null });
  drawProbe();
};

// ---------------------------------------------------------------------------------------------------------------------

$("probe").max = grid * grid - 1;
$("question").value = state.question;
new ResizeObserver(drawBoard).observe($("board"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawRoad);
drawBoard();
ready.then(
  ({ parameters, bugs }) => {
    $("parameters").textContent = `${(parameters / 1e6).toFixed(1)} million`;
    drawSwitch(bugs);
    refresh();
  },
  error => ($("time").textContent = `The model could not be loaded: ${error.message}`),
);
