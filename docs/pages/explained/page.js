// The page's three pictures. Numbers come from proac.js; prototypes.js holds uniform_prototypes(K, 3) for each K.
"use strict";

const PIXELS = 12; // of each class
const element = (id) => document.getElementById(id);
const theme = new URLSearchParams(location.search).get("theme");
if (theme) document.documentElement.dataset.theme = theme;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (k, classes) => `hsl(${(360 * k) / classes + 15} 68% ${style("--lightness")}%)`;

// A small generator, so that the page looks the same at each visit (mulberry32's recurrence).
function generator(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

const state = {classes: 6, temperature: 0.3, anchor: -1, turn: [0.5, -0.35], seed: 1, running: false, keySeed: 5};

function scatter() {
  const random = generator(state.seed);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  state.prototypes = PROTOTYPES[state.classes];
  state.labels = state.prototypes.flatMap((_, k) => Array(PIXELS).fill(k));
  // every class somewhere else than its prototype, and spread out
  const centres = state.prototypes.map(() => ProAC.unit([normal(), normal(), normal()]));
  state.features = state.labels.map((k) => ProAC.unit(centres[k].map((value) => value + 0.45 * normal())));
  drawKeys();
}

function drawKeys() {
  const random = generator(state.keySeed);
  state.keys = state.labels.map(() => random());
}

const evaluate = () => ProAC.loss(state.features, state.labels, state.prototypes, state.temperature);

function descend() {
  const {gradient} = evaluate();
  const steepest = Math.max(...gradient.map((g) => Math.sqrt(ProAC.dot(g, g))), 1e-9);
  const rate = Math.min(2, 0.15 / steepest);
  state.features = state.features.map((x, i) => ProAC.unit(x.map((value, d) => value - rate * gradient[i][d])));
}

// A canvas at the screen's resolution: its context, and its size in CSS pixels.
function prepare(id) {
  const canvas = element(id);
  const ratio = window.devicePixelRatio || 1;
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.clearRect(0, 0, width, height);
  return {context, width, height};
}

function turned([x, y, z]) {
  const [a, b] = state.turn;
  [x, z] = [x * Math.cos(a) + z * Math.sin(a), z * Math.cos(a) - x * Math.sin(a)];
  return [x, y * Math.cos(b) - z * Math.sin(b), z * Math.cos(b) + y * Math.sin(b)];
}

function drawSphere() {
  const {context, width, height} = prepare("sphere");
  const radius = 0.44 * Math.min(width, height);
  const place = (v) => {
    const [x, y, z] = turned(v);
    return [width / 2 + radius * x, height / 2 - radius * y, z];
  };
  const disc = ([x, y], size, fill, edge) => {
    context.beginPath();
    context.arc(x, y, size, 0, 2 * Math.PI);
    context.fillStyle = fill;
    context.fill();
    if (edge) {
      context.strokeStyle = edge;
      context.lineWidth = 2;
      context.stroke();
    }
  };
  const line = (from, to, stroke, thickness) => {
    context.beginPath();
    context.moveTo(from[0], from[1]);
    context.lineTo(to[0], to[1]);
    context.strokeStyle = stroke;
    context.lineWidth = thickness;
    context.stroke();
  };
  disc([width / 2, height / 2], radius, style("--back"), style("--line"));
  context.strokeStyle = style("--line");
  context.lineWidth = 1;
  for (let i = 0; i < 6; i++) {
    // circles of latitude and of longitude
    for (const circle of [latitude(-1 + (i + 0.5) / 3), longitude((Math.PI * i) / 6)]) {
      context.beginPath();
      circle.forEach((v, n) => {
        const [x, y, z] = place(v);
        if (n === 0 || z < 0) context.moveTo(x, y);
        else context.lineTo(x, y);
      });
      context.stroke();
    }
  }
  const found = evaluate();
  const away = (v) => (place(v)[2] < 0 ? 0.28 : 1); // what is behind is pale
  if (state.anchor >= 0) {
    const {own, others, shares} = found.classes[state.anchor];
    const centre = place(state.prototypes[state.anchor]);
    const largest = Math.max(...shares);
    others.forEach((j, n) => {
      context.globalAlpha = 0.04 + (0.9 * shares[n]) / largest;
      line(centre, place(state.features[j]), style("--text"), 1.4);
    });
    context.globalAlpha = 0.9;
    own.forEach((i) => line(centre, place(state.features[i]), colour(state.anchor, state.classes), 1.4));
  }
  const sizes = found.gradient.map((g) => Math.sqrt(ProAC.dot(g, g)));
  const longest = Math.max(...sizes, 1e-12);
  state.features.forEach((x, i) => {
    context.globalAlpha = away(x);
    const k = state.labels[i];
    if (element("arrows").checked && sizes[i] > 0.02 * longest) {
      const reach = (0.32 * Math.sqrt(sizes[i] / longest)) / sizes[i];
      const tip = place(ProAC.unit(x.map((value, d) => value - reach * found.gradient[i][d])));
      line(place(x), tip, colour(k, state.classes), 1.6);
      disc(tip, 2.1, colour(k, state.classes));
    }
    disc(place(x), 4, colour(k, state.classes));
  });
  state.prototypes.forEach((p, k) => {
    context.globalAlpha = away(p);
    disc(place(p), 10, colour(k, state.classes), style("--text"));
  });
  context.globalAlpha = 1;

  const cosine = (k, i) => found.similarity[k][i] * state.temperature;
  const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const own = mean(state.labels.map((k, i) => cosine(k, i)));
  const hardest = mean(found.classes.map((c, k) => Math.max(...c.others.map((j) => cosine(k, j)))));
  element("loss").value = found.value.toFixed(3);
  element("own").value = own.toFixed(2);
  element("hardest").value = hardest.toFixed(2);
}

const round = (turns) => Array.from({length: 73}, (_, n) => turns((Math.PI * n) / 36));
const latitude = (y) => round((a) => [Math.sqrt(1 - y * y) * Math.cos(a), y, Math.sqrt(1 - y * y) * Math.sin(a)]);
const longitude = (b) => round((a) => [Math.cos(a) * Math.cos(b), Math.sin(a), Math.cos(a) * Math.sin(b)]);

function drawSet() {
  const {context, width, height} = prepare("set");
  const k = Number(element("set-class").value);
  const others = state.labels.length - PIXELS;
  element("count").max = others;
  const count = Math.min(Number(element("count").value), others);
  element("count-out").value = `${count} of ${others}`;
  const order = state.labels.map((_, i) => i).sort((i, j) => state.keys[i] - state.keys[j]);
  const columns = Math.ceil(order.length / (width < 600 ? 4 : 2));
  const size = Math.min(width / columns, height / Math.ceil(order.length / columns));
  let taken = 0;
  order.forEach((i, n) => {
    const [x, y] = [(n % columns) * size, Math.floor(n / columns) * size];
    const label = state.labels[i];
    const negative = label !== k && taken++ < count;
    context.globalAlpha = label === k || negative ? 1 : 0.22;
    context.lineWidth = 2;
    context.strokeStyle = context.fillStyle = colour(label, state.classes);
    if (label === k) context.strokeRect(x + 3, y + 3, size - 6, size - 6);
    else context.fillRect(x + 2, y + 2, size - 4, size - 4);
  });
  context.globalAlpha = 1;
  const all = evaluate().classes[k].logZ;
  const sampling = {keys: state.keys, count};
  const set = ProAC.loss(state.features, state.labels, state.prototypes, state.temperature, sampling).classes[k].logZ;
  element("log-z-all").value = all.toFixed(3);
  element("log-z-set").value = set.toFixed(3);
  element("log-z-scaled").value = (set + Math.log(others / count)).toFixed(3);
}

const TILE = {channels: 256, stages: 8, pixels: 16, classes: 8, tiles: 3}; // one tile: eight stages, then its sums

const SIMILARITIES = (() => {
  const random = generator(3); // a drawing: these are no real ones
  return Array.from({length: TILE.tiles}, () => Array.from({length: TILE.classes}, () => Array.from({length: TILE.pixels}, () => random() ** 2)));
})();

function drawTile() {
  const {context, width, height} = prepare("tile");
  const narrow = width < 620;
  const time = Number(element("time").value);
  const each = TILE.stages + 2;
  const tile = Math.floor(time / each), within = time % each;
  const done = Math.min(within, TILE.stages); // stages of this tile that were multiplied
  element("time-out").value = within <= TILE.stages - 1 ? `tile ${tile + 1}, stage ${within + 1}` : `tile ${tile + 1}, sums`;
  const [text, soft, edge, accent] = ["--text", "--soft", "--line", "--accent"].map(style);
  const caption = (words, x, y, fill = text) => {
    context.fillStyle = fill;
    context.font = '14px system-ui, "DejaVu Sans", sans-serif';
    context.fillText(words, x, y);
  };
  const cells = (x, y, w, h, columns, rows, paint) => {
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        context.fillStyle = paint(r, c);
        context.fillRect(x + (c * w) / columns + 0.5, y + (r * h) / rows + 0.5, w / columns - 1, h / rows - 1);
      }
  };
  const column = narrow ? width : width / 3 - 12;
  const at = (n) => (narrow ? [0, (n * height) / 3] : [n * (width / 3 + 6), 0]);
  const room = narrow ? height / 3 - 52 : height - 60;

  // memory: the features, channel by channel
  let [x, y] = at(0);
  caption("memory: features, channels x pixels", x, y + 16);
  const block = column / TILE.tiles;
  for (let t = 0; t < TILE.tiles; t++)
    cells(x + t * block, y + 28, block - 6, room, TILE.pixels, TILE.stages, (r) => {
      if (t < tile || (t === tile && r < done)) return edge; // was read, and is not needed again
      return t === tile && r === done && within < TILE.stages ? accent : soft;
    });
  caption("blue: the stage that is on its way", x, y + room + 48, soft);

  // registers: S of this tile
  [x, y] = at(1);
  caption("registers: S, classes x pixels", x, y + 16);
  cells(x, y + 28, column * 0.9, room * (narrow ? 1 : 0.6), TILE.pixels, TILE.classes, (r, c) => {
    context.globalAlpha = 0.12 + (0.88 * SIMILARITIES[tile][r][c] * done) / TILE.stages;
    return colour(r, TILE.classes);
  });
  context.globalAlpha = 1;
  caption(`sum over ${Math.round((done * TILE.channels) / TILE.stages)} of ${TILE.channels} channels`, x, y + (narrow ? room : room * 0.6) + 48, soft);

  // what leaves: sums of each class
  [x, y] = at(2);
  caption("out: sums for each class", x, y + 16);
  const finished = tile + (within > TILE.stages ? 1 : 0);
  const bar = (room * (narrow ? 1 : 0.6)) / TILE.classes;
  for (let k = 0; k < TILE.classes; k++) {
    const share = 0.35 + 0.6 * Math.abs(Math.sin(3 * k + 1));
    context.fillStyle = edge;
    context.fillRect(x, y + 28 + k * bar + 1, column * 0.85, bar - 3);
    context.fillStyle = colour(k, TILE.classes);
    context.fillRect(x, y + 28 + k * bar + 1, (column * 0.85 * share * finished) / TILE.tiles, bar - 3);
  }
  caption(`${finished} of ${TILE.tiles} tiles are in them`, x, y + (narrow ? room : room * 0.6) + 48, soft);
  const stagesRead = tile * TILE.stages + Math.min(within + 1, TILE.stages);
  element("read").value = `${Math.round((100 * stagesRead) / (TILE.tiles * TILE.stages))} %, each number once`;
  element("written").value = "nothing";
}

function fillChoices() {
  const options = state.prototypes.map((_, k) => `<option value="${k}">class ${k + 1}</option>`).join("");
  element("anchor").innerHTML = `<option value="-1">no class</option>${options}`;
  element("set-class").innerHTML = options;
  state.anchor = -1;
}

function draw() {
  element("classes-out").value = state.classes;
  element("temperature-out").value = state.temperature.toFixed(2);
  drawSphere();
  drawSet();
  drawTile();
}

function listen() {
  const on = (id, event, act) => element(id).addEventListener(event, () => (act(element(id)), draw()));
  on("classes", "input", (slider) => {
    state.classes = Number(slider.value);
    scatter();
    fillChoices();
  });
  on("temperature", "input", (slider) => (state.temperature = Math.exp(Number(slider.value))));
  on("anchor", "change", (choice) => (state.anchor = Number(choice.value)));
  on("arrows", "change", () => {});
  on("step", "click", descend);
  on("again", "click", () => {
    state.seed += 1;
    scatter();
  });
  on("run", "click", (button) => {
    state.running = !state.running;
    button.textContent = state.running ? "stop" : "run";
    if (state.running) requestAnimationFrame(frame);
  });
  on("set-class", "change", () => {});
  on("count", "input", () => {});
  on("keys", "click", () => {
    state.keySeed += 1;
    drawKeys();
  });
  on("time", "input", () => {});
  let timer = null;
  on("play", "click", (button) => {
    button.textContent = timer ? "play" : "stop";
    if (timer) timer = clearInterval(timer);
    else
      timer = setInterval(() => {
        element("time").value = (Number(element("time").value) + 1) % (Number(element("time").max) + 1);
        drawTile();
      }, 350);
  });
  const sphere = element("sphere");
  sphere.addEventListener("pointermove", (event) => {
    if (!event.buttons) return;
    state.turn = [state.turn[0] + event.movementX / 150, state.turn[1] + event.movementY / 150];
    drawSphere();
  });
  window.addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}

function frame() {
  if (!state.running) return;
  descend();
  draw();
  requestAnimationFrame(frame);
}

scatter();
fillChoices();
state.temperature = Math.exp(Number(element("temperature").value));
listen();
draw();
