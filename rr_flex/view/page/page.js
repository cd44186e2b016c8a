"use strict";
const runs = JSON.parse(document.getElementById("data").textContent);
const darkScreen = matchMedia("(prefers-color-scheme: dark)");
let printing = false;

// Points of matplotlib's viridis and cividis, dark to bright.
const VIRIDIS = ["440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725"];
const CIVIDIS = ["00224e", "123570", "3b496c", "575d6d", "707173", "8a8678", "a59c74", "c3b369", "e1cc55", "fee838"];
const PUOR = ["b35806", "e08214", "fdb863", "f0e6dc", "e4e2ee", "b2abd2", "8073ac", "542788"];

const dark = () => darkScreen.matches && !printing;
// Before a page prints, its styles are still the screen's.
const PRINTED = { "--quiet": "#5c5c5c", "--rule": "#d5d5d5", "--mark": "#d55e00" };
const ink = name => printing ? PRINTED[name] : getComputedStyle(document.documentElement).getPropertyValue(name);
// The faintest mass is the colour nearest to the page's own.
const massStops = () => dark() ? VIRIDIS : [...VIRIDIS].reverse();

function colourAt(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  const channel = at => [low, low + 1].map(stop => parseInt(stops[stop].slice(at, at + 2), 16));
  return "rgb(" + [0, 2, 4].map(channel).map(([a, b]) => Math.round(a + (b - a) * part)).join(",") + ")";
}

function bytes(text) {
  return Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
}

function float16(text) {
  const raw = bytes(text), numbers = new Float32Array(raw.length / 2);
  for (let i = 0; i < numbers.length; i++) {
    const half = raw[2 * i] | raw[2 * i + 1] << 8, power = half >> 10 & 31, digits = half & 1023;
    numbers[i] = power ? 2 ** (power - 15) * (1 + digits / 1024) : 2 ** -14 * digits / 1024;
  }
  return numbers;
}

const thousands = number => number.toLocaleString("en");
const percent = share => share >= 0.1 ? (100 * share).toFixed(1) + " %" : (100 * share).toPrecision(2) + " %";

// A canvas as sharp as the screen, `height` CSS pixels for its width.
function sharp(canvas, heightOf) {
  const width = canvas.clientWidth, height = heightOf(width), ratio = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.height = height + "px";
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = "12px system-ui, sans-serif";
  return { pen, width, height };
}

// ---- block maps

const MARGIN = { left: 58, top: 6, right: 14, bottom: 40 };

function blockMaps(root, maps) {
  const canvas = root.querySelector("canvas"), readout = root.querySelector(".readout");
  const pick = Object.fromEntries(["layer", "head", "view"].map(name => [name, root.querySelector("select." + name)]));
  const cell = { q: maps.block_size[0] * maps.blocks_per_cell, k: maps.block_size[1] * maps.blocks_per_cell };
  let shown = null, at = null, frame = null;

  function load() {
    const layer = maps.layers.find(each => each.layer === Number(pick.layer.value));
    const head = layer.heads[Number(pick.head.value)];
    shown = { true: float16(head.true), estimated: float16(head.estimated), kept: bytes(head.kept) };
  }

  function colour(index) {
    const view = pick.view.value, kept = shown.kept[index];
    if (!kept) return null;
    if (view === "kept") return colourAt(dark() ? ["4a4f55", "6fc0ff"] : ["d9d9d9", "08519c"], (kept - 1) / 254);
    if (view === "difference") return colourAt(PUOR, 0.5 + 5 * (shown.estimated[index] - shown.true[index]));
    return colourAt(massStops(), 1 + Math.log10(Math.max(shown[view][index], 1e-4)) / 4);
  }

  function draw() {
    const { left, top, right, bottom } = MARGIN;
    const { pen, width, height } = sharp(canvas, width => width - left - right + top + bottom);
    const side = width - left - right;
    const place = tokens => Math.round(tokens / maps.length * side);
    for (let row = 0; row < maps.rows; row++) {
      const y = place(row * cell.q), bottomEdge = place(Math.min((row + 1) * cell.q, maps.length));
      for (let column = 0; column < maps.columns; column++) {
        const fill = colour(row * maps.columns + column);
        if (!fill) continue;
        const x = place(column * cell.k), rightEdge = place(Math.min((column + 1) * cell.k, maps.length));
        pen.fillStyle = fill;
        pen.fillRect(left + x, top + y, rightEdge - x, bottomEdge - y);
      }
    }
    pen.strokeStyle = ink("--rule");
    pen.strokeRect(left - 0.5, top - 0.5, side + 1, side + 1);
    pen.fillStyle = ink("--quiet");
    const step = 2 ** Math.ceil(Math.log2(maps.length / 5));
    for (let tokens = 0; tokens <= maps.length; tokens += step) {
      pen.textAlign = "right"; pen.textBaseline = "middle";
      pen.fillText(thousands(tokens), left - 6, top + Math.min(Math.max(place(tokens), 5), side - 5));
      pen.textAlign = "center"; pen.textBaseline = "top";
      pen.fillText(thousands(tokens), left + Math.min(place(tokens), side - 8), top + side + 5);
    }
    pen.fillText("key (token)", left + side / 2, top + side + 22);
    pen.save();
    pen.translate(12, top + side / 2); pen.rotate(-Math.PI / 2); pen.textBaseline = "middle";
    pen.fillText("query (token)", 0, 0);
    pen.restore();
    if (at) {
      const x = place(at.column * cell.k), y = place(at.row * cell.q);
      pen.lineWidth = 2; pen.strokeStyle = ink("--mark");
      pen.strokeRect(left + x, top + y, place(Math.min((at.column + 1) * cell.k, maps.length)) - x,
        place(Math.min((at.row + 1) * cell.q, maps.length)) - y);
    }
    frame = { left, top, side };
    legend();
  }

  function legend() {
    const view = pick.view.value, box = root.querySelector(".legend");
    box.replaceChildren();
    const bar = (stops, low, high, what) => {
      const gradient = document.createElement("span");
      gradient.className = "bar";
      gradient.style.background = "linear-gradient(90deg," + stops.map(stop => "#" + stop).join(",") + ")";
      const scale = document.createElement("span");
      scale.append(low + " ", gradient, " " + high + " " + what);
      box.append(scale);
    };
    if (view === "kept") {
      for (const [share, name] of [[1, "kept"], [0, "dropped"]]) {
        const item = document.createElement("span"), swatch = document.createElement("span");
        swatch.className = "swatch";
        swatch.style.background = colourAt(dark() ? ["4a4f55", "6fc0ff"] : ["d9d9d9", "08519c"], share);
        item.append(swatch, " " + name);
        box.append(item);
      }
    } else if (view === "difference") bar(PUOR, "−0.1", "+0.1", "of the row's mass");
    else bar(massStops(), "≤ 0.01 %", "100 %", "of the row's mass, log scale");
  }

  function textOf(first, last) {
    const tokens = maps.tokens.slice(first, last + 1).join("");
    return tokens.length <= 700 ? tokens : tokens.slice(0, 340) + "\n …\n" + tokens.slice(-340);
  }

  function tell() {
    readout.replaceChildren();
    const add = (tag, text) => {
      const element = document.createElement(tag);
      element.textContent = text;
      readout.append(element);
      return element;
    };
    if (!at) return;
    const index = at.row * maps.columns + at.column, kept = shown.kept[index];
    const q = [at.row * cell.q, Math.min((at.row + 1) * cell.q, maps.length) - 1];
    const k = [at.column * cell.k, Math.min((at.column + 1) * cell.k, maps.length) - 1];
    const range = ([first, last]) => thousands(first) + "–" + thousands(last);
    const many = maps.blocks_per_cell > 1;
    const block = index => many ? `${index * maps.blocks_per_cell}–${(index + 1) * maps.blocks_per_cell - 1}` : index;
    add("p", `layer ${pick.layer.value}, head ${pick.head.value}: query block ${block(at.row)}, key block ${block(at.column)}`);
    if (!kept) add("p", "Hidden by the mask.");
    else {
      const share = (kept - 1) / 254, table = add("table", "");
      const state = share === 1 ? "kept" : share === 0 ? "dropped" : percent(share) + " of its blocks kept";
      for (const [name, value] of [["true mass", percent(shown.true[index])],
        ["estimated", percent(shown.estimated[index])], ["state", state]]) {
        const row = table.insertRow();
        row.insertCell().textContent = name;
        row.insertCell().textContent = value;
      }
    }
    add("p", `queries ${range(q)}:`);
    add("blockquote", textOf(...q));
    add("p", `keys ${range(k)}:`);
    add("blockquote", textOf(...k));
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const q = (event.clientY - box.top - frame.top) / frame.side * maps.length;
    const k = (event.clientX - box.left - frame.left) / frame.side * maps.length;
    if (q < 0 || k < 0 || q >= maps.length || k >= maps.length) return;
    move(Math.floor(q / cell.q), Math.floor(k / cell.k));
  }

  function move(row, column) {
    row = Math.min(Math.max(row, 0), maps.rows - 1);
    column = Math.min(Math.max(column, 0), maps.columns - 1);
    if (at && at.row === row && at.column === column) return;
    at = { row, column };
    draw();
    tell();
  }

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("keydown", event => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(at ? at.row + step[0] : 0, at ? at.column + step[1] : 0);
  });
  for (const select of Object.values(pick)) select.addEventListener("change", () => { load(); draw(); tell(); });
  load();
  draw();
  const show = (layer, head) => {
    if (!maps.layers.some(each => each.layer === layer)) return false;
    pick.layer.value = layer; pick.head.value = head;
    load(); draw(); tell();
    return true;
  };
  return { draw, show };
}

// ---- one cell a head

function headGrid(root, measures, show) {
  const names = Object.keys(measures), layers = Object.keys(measures[names[0]]).map(Number).sort((a, b) => a - b);
  const heads = measures[names[0]][layers[0]].length;
  const title = document.createElement("h3"), select = document.createElement("select");
  title.textContent = "Every head";
  for (const name of names) select.add(new Option(name, name));
  const label = document.createElement("label"), canvas = document.createElement("canvas");
  const legend = document.createElement("div");
  label.append("measure ", select);
  const pickers = document.createElement("div");
  pickers.className = "pickers";
  pickers.append(label);
  legend.className = "legend";
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "One cell a layer and head; the table of layers below holds the means");
  root.append(title, pickers, canvas, legend);
  const left = 58, bottom = 36, row = Math.max(6, Math.min(14, 700 / layers.length));
  let hovered = null;

  function draw() {
    const values = measures[select.value], all = layers.flatMap(layer => values[layer]);
    const low = Math.min(...all), high = Math.max(...all);
    const { pen, width, height } = sharp(canvas, () => row * layers.length + bottom);
    const column = (width - left) / heads;
    layers.forEach((layer, i) => values[layer].forEach((value, head) => {
      pen.fillStyle = colourAt(CIVIDIS, high > low ? (value - low) / (high - low) : 0.5);
      pen.fillRect(left + head * column, i * row, Math.ceil(column), Math.ceil(row));
    }));
    pen.fillStyle = ink("--quiet");
    pen.textBaseline = "middle"; pen.textAlign = "right";
    const step = Math.ceil(12 / row);
    layers.forEach((layer, i) => { if (i % step === 0) pen.fillText(layer, left - 6, i * row + row / 2); });
    pen.textAlign = "center"; pen.textBaseline = "top";
    const headStep = Math.ceil(24 / column);
    for (let head = 0; head < heads; head += headStep)
      pen.fillText(head, left + (head + 0.5) * column, layers.length * row + 4);
    pen.fillText("head", left + (width - left) / 2, layers.length * row + 20);
    pen.save();
    pen.translate(12, layers.length * row / 2); pen.rotate(-Math.PI / 2); pen.textBaseline = "middle";
    pen.fillText("layer", 0, 0);
    pen.restore();
    legend.replaceChildren();
    const bar = document.createElement("span");
    bar.className = "bar";
    bar.style.background = "linear-gradient(90deg," + CIVIDIS.map(stop => "#" + stop).join(",") + ")";
    const scale = document.createElement("span");
    scale.append(low.toPrecision(3) + " ", bar, " " + high.toPrecision(3));
    legend.append(scale);
    legend.append(hovered ? `layer ${hovered.layer}, head ${hovered.head}: ${values[hovered.layer][hovered.head].toPrecision(4)}`
      : show ? "Point at a head; a click shows its map where the file has it." : "Point at a head.");
  }

  function find(event) {
    const box = canvas.getBoundingClientRect(), column = (box.width - left) / heads;
    const i = Math.floor((event.clientY - box.top) / row), head = Math.floor((event.clientX - box.left - left) / column);
    return i >= 0 && i < layers.length && head >= 0 && head < heads ? { layer: layers[i], head } : null;
  }

  canvas.addEventListener("pointermove", event => { hovered = find(event); draw(); });
  canvas.addEventListener("click", event => { const found = find(event); if (found && show) show(found.layer, found.head); });
  select.addEventListener("change", draw);
  draw();
  return { draw };
}

// ---- tables

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const falling = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", falling ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value === undefined ? null : Number(row.cells[column].dataset.value);
    const order = (a, b) => key(a) !== null && key(b) !== null ? key(a) - key(b)
      : row(a).localeCompare(row(b), "en", { numeric: true });
    const row = each => each.cells[column].textContent;
    const sorted = [...table.tBodies[0].rows].sort((a, b) => falling ? order(b, a) : order(a, b));
    table.tBodies[0].append(...sorted);
  }));
}

const drawn = [];
runs.forEach((run, number) => {
  let maps = null;
  if (run.maps) drawn.push(maps = blockMaps(document.getElementById("maps" + number), run.maps));
  if (Object.keys(run.heads).length)
    drawn.push(headGrid(document.getElementById("heads" + number), run.heads, maps && maps.show));
});
document.querySelectorAll(".table table").forEach(sortable);
const redraw = () => drawn.forEach(each => each.draw());
addEventListener("resize", redraw);
darkScreen.addEventListener("change", redraw);
addEventListener("beforeprint", () => { printing = true; redraw(); });
addEventListener("afterprint", () => { printing = false; redraw(); });
document.documentElement.dataset.ready = "yes";
