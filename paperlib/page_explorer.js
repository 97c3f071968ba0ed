"use strict";
// A matrix is L * L levels (see page_explorer.py), row by row: row = input label, column = output label.
const data = JSON.parse(document.getElementById("data").textContent), L = data.classes.length, SHOWN = Math.min(24, L);
const NETWORKS = ["trained", "random", "rotated"], $ = id => document.getElementById(id);
const state = {encoder: 0, tap: "", stop: "typical", network: "trained", threshold: data.threshold, cell: null};
let levels, colours, orders = {};

function matrixAt(number) { return levels.subarray(number * L * L, (number + 1) * L * L); }

// Number of the cluster of each recognised label, else -1: a label joins the first cluster whose members it confuses
// with itself both ways, else it opens the next one (snp.cluster_labels).
function clustersOf(matrix, threshold) {
  const cluster = new Int16Array(L).fill(-1), members = [];
  for (let label = 0; label < L; label++) {
    if (matrix[label * L + label] < threshold) continue;
    const mutual = other => matrix[label * L + other] >= threshold && matrix[other * L + label] >= threshold;
    let joins = members.findIndex(part => part.every(mutual));
    if (joins < 0) joins = members.push([]) - 1;
    members[joins].push(label);
    cluster[label] = joins;
  }
  return {cluster, members};
}

function statisticsOf(matrix, threshold) {
  const {members} = clustersOf(matrix, threshold);
  let ones = 0, labels = 0, internal = 0;
  for (const level of matrix) ones += level >= threshold;
  for (const {length} of members) { labels += length; internal += length * (length - 1); }
  const noise = ones - labels;
  return {labels, clusters: members.length, internal, external: noise - internal, snr: noise ? labels * (L - 1) / noise : null};
}

// Labels of clusters first, large clusters before small ones, then the labels with the strongest columns.
function orderOf(matrix, threshold) {
  const {members} = clustersOf(matrix, threshold), strength = new Int16Array(L).fill(-128);
  for (let at = 0; at < matrix.length; at++) strength[at % L] = Math.max(strength[at % L], matrix[at]);
  const first = members.slice().sort((a, b) => b.length - a.length).flat(), own = new Set(first);
  const rest = [...Array(L).keys()].filter(label => !own.has(label));
  return first.concat(rest.sort((a, b) => strength[b] - strength[a]));
}

function viewOf(network) { return data.views.find(view => view.network === network && view.encoder === state.encoder && view.tap === state.tap); }

// What is shown of a network: its matrix, and the order of labels, which stays while the threshold moves.
function shownOf(network) {
  const view = viewOf(network), number = view.stops[state.stop], matrix = matrixAt(view.start + number);
  const key = [network, state.encoder, state.tap, number].join();
  orders[key] ??= orderOf(matrix, state.threshold);
  return {view, number, matrix, order: orders[key]};
}

function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

const number = (value, digits = 2) => value === null ? "–" : value.toFixed(digits).replace("-", "−");
const many = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const short = (name, longest) => name.length > longest ? name.slice(0, longest - 1) + "…" : name;

// The picture (or text) of one number: examples of labels come first, then test images.
function picture(at, name) {
  if (data.texts.length) return element("q", data.texts[at]);
  const side = 44, made = element("span", "", {class: "picture", role: "img", "aria-label": `picture of ${name}`});
  made.style.backgroundSize = `${data.columns * side}px auto`;
  made.style.backgroundPosition = `${-(at % data.columns) * side}px ${-Math.floor(at / data.columns) * side}px`;
  return made;
}

function examplesOf(label, most) {
  const found = data.examples.flatMap((other, at) => other === label ? [at] : []);
  return found.slice(0, data.texts.length ? 1 : most).map(at => picture(at, data.classes[label]));
}

function rgb(name) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
  return (hex.length === 3 ? [...hex].map(digit => digit + digit) : hex.match(/../g)).map(part => parseInt(part, 16));
}

function fieldColour(level) {
  const share = Math.min(1, Math.abs(level) / 99), end = level > 0 ? colours.plus : colours.minus;
  return colours.paper.map((value, channel) => value + (end[channel] - value) * share);
}

function booleanColour({matrix}, {cluster}) {
  return (input, output) => matrix[input * L + output] < state.threshold ? colours.paper
    : input === output ? colours.own
    : cluster[input] >= 0 && cluster[input] === cluster[output] ? colours.inside : colours.outside;
}

// Cells of the first `count` labels of an order, each a square of whole pixels; names take `margin` CSS pixels.
function draw(canvas, order, count, colour, margin = 0) {
  const width = Math.max(60, canvas.clientWidth), dpr = Math.min(3, window.devicePixelRatio || 1);
  const side = Math.max(1, Math.round((width - margin) * dpr / count)), edge = Math.round(margin * dpr), small = new ImageData(count, count);
  for (let y = 0, at = 0; y < count; y++) for (let x = 0; x < count; x++, at += 4) {
    const [r, g, b] = colour(order[y], order[x]);
    small.data[at] = r; small.data[at + 1] = g; small.data[at + 2] = b; small.data[at + 3] = 255;
  }
  canvas.width = canvas.height = edge + side * count;
  const context = canvas.getContext("2d");
  const sheet = draw.sheet ??= document.createElement("canvas");
  sheet.width = sheet.height = count;
  sheet.getContext("2d").putImageData(small, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(sheet, edge, edge, side * count, side * count);
  canvas.layout = {order, count, edge, side};
  return context;
}

function drawLarge(shown, clusters) {
  draw($("field"), shown.order, L, (input, output) => fieldColour(shown.matrix[input * L + output]));
  const longest = Math.max(...shown.order.slice(0, SHOWN).map(label => Math.min(22, data.classes[label].length)));
  const margin = Math.min($("boolean").clientWidth * .27, 14 + 6 * longest);
  const context = draw($("boolean"), shown.order, SHOWN, booleanColour(shown, clusters), margin);
  const {edge, side} = $("boolean").layout, end = edge + side * SHOWN, size = Math.min(side * .9, 13 * $("boolean").width / $("boolean").clientWidth);
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--line");
  for (let at = 0; at <= SHOWN; at++) for (const [x, y, u, v] of [[edge, edge + at * side, end, edge + at * side], [edge + at * side, edge, edge + at * side, end]]) {
    context.beginPath(); context.moveTo(x, y); context.lineTo(u, v); context.stroke();
  }
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  for (let at = 0; at < SHOWN; at++) {
    const label = shown.order[at], name = data.classes[label];
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue(clusters.cluster[label] >= 0 ? "--own" : "--dim");
    for (const turned of [false, true]) {
      context.save();
      context.translate(turned ? edge + (at + .5) * side : edge - 4, turned ? edge - 4 : edge + (at + .5) * side);
      if (turned) context.rotate(-Math.PI / 2);
      context.textAlign = turned ? "left" : "right";
      context.fillText(short(name, 22), 0, 0, edge - 6);
      context.restore();
    }
  }
  if (state.cell) for (const canvas of [$("field"), $("boolean")]) {
    const {order, count, edge, side} = canvas.layout, [y, x] = state.cell.map(label => order.indexOf(label));
    if (x >= count || y >= count) continue;
    const mark = canvas.getContext("2d");
    mark.lineWidth = Math.max(2, side / 8);
    mark.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    mark.strokeRect(edge + x * side - 1, edge + y * side - 1, side + 2, side + 2);
  }
}

function describeCell(shown, {cluster}) {
  const [input, output] = state.cell, level = shown.matrix[input * L + output];
  const kind = level < state.threshold ? "below the threshold" : input === output ? "recognised"
    : cluster[input] >= 0 && cluster[input] === cluster[output] ? "internal noise" : "external noise";
  const text = element("span", `${data.texts.length ? "texts" : "images"} of ${data.classes[input]} → answer ${data.classes[output]}: ${level > 0 ? "above " : ""}${number(level / 100)} of the largest entry, ${kind}`);
  $("cell").replaceChildren(...examplesOf(input, 1), text, ...(input === output ? [] : examplesOf(output, 1)));
}

function drawTiles() {
  for (const tile of $("tiles").children) {
    const shown = shownOf(tile.value), found = statisticsOf(shown.matrix, state.threshold);
    draw(tile.firstChild, shown.order, L, booleanColour(shown, clustersOf(shown.matrix, state.threshold)));
    const tap = shown.view.snr[state.threshold - 1], lines = [
      tile.value, shown.view.nodes[shown.number], many(found.labels, "label") + ", " + many(found.clusters, "cluster"),
      `noise ${found.internal} + ${found.external}`, `SNR ${number(found.snr)}; tap ${number(tap)}`];
    tile.lastChild.replaceChildren(element("b", lines[0]), ...lines.slice(1).map(line => element("div", line)));
    tile.setAttribute("aria-pressed", tile.value === state.network);
  }
}

function drawAbout(shown, clusters) {
  const found = statisticsOf(shown.matrix, state.threshold), {view} = shown, name = view.nodes[shown.number];
  const one = name.startsWith("head") ? `${name} as a whole, all its nodes together` : `${name} (${namesOf(view, shown.number)})`;
  $("which").textContent = `Encoder ${view.encoder}, ${view.tap}, ${view.network}: ${one}`;
  $("said").textContent = `${many(found.labels, "label")} in ${many(found.clusters, "cluster")}; noise ${found.internal} internal, ${found.external} external; ` +
    `SNR of the node ${number(found.snr)}, of all nodes of the tap ${number(view.snr[state.threshold - 1])}; the tap's readout is right on ${number(100 * view.accuracy, 1)} % of test ${data.texts.length ? "texts" : "images"}.`;
  for (const id of ["field", "boolean"]) $(id).setAttribute("aria-label", `${id} matrix: ${$("said").textContent} Arrow keys move from cell to cell.`);
  const parts = clusters.members.slice().sort((a, b) => b.length - a.length).map(members => {
    const made = element("div", "", {class: "group"});
    if (!data.texts.length) made.append(...members.slice(0, 6).flatMap(label => examplesOf(label, 1)), " ");
    made.append(members.map(label => data.classes[label]).join(", "));
    return made;
  });
  const owned = name.startsWith("head") ? view.owned[Number(name.slice(5))] : null;
  if (owned) parts.push(element("p", `It owns ${many(owned.length, "label")}, those that most of its nodes recognise, at ${number(data.threshold / 100)}: ${owned.map(label => data.classes[label]).join(", ")}.`, {class: "dim"}));
  $("clusters").replaceChildren(...(parts.length ? parts : [element("p", "none: no label is recognised")]));
}

function namesOf(view, matrix) { return Object.keys(view.stops).filter(name => view.stops[name] === matrix).join(", "); }

function drawDrivers({view, number}) {
  $("drivers").replaceChildren(...view.drivers[number].map(([image, taken]) => {
    const at = data.tests.indexOf(image), truth = data.truth[at], made = element("div");
    const word = element("span", data.classes[taken], {class: taken === truth ? "right" : "wrong"});
    made.append(picture(data.examples.length + at, data.classes[truth]), element("div", data.classes[truth]), "taken for ", word);
    return made;
  }));
}

function drawCurve() {
  const lines = NETWORKS.map(network => viewOf(network).snr), top = Math.ceil(Math.log2(Math.max(2, ...lines.flatMap(line => line.slice(0, 95)))));
  const x = threshold => 40 + threshold * 5, y = snr => 180 - 165 * (Math.log2(Math.max(snr, .5)) + 1) / (top + 1);
  const paint = ["--own", "--outside", "--plus"], parts = [];
  const svg = (tag, attributes, text = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.textContent = text;
    parts.push(made);
  };
  for (const at of [0, 20, 40, 60, 80, 100]) svg("text", {x: x(at), y: 196, "text-anchor": "middle"}, number(at / 100, 1));
  for (const snr of [...Array(top + 2).keys()].map(power => 2 ** (power - 1))) svg("text", {x: 32, y: y(snr) + 4, "text-anchor": "end"}, snr);
  svg("path", {d: `M40,15V180H540M40,${y(1)}H540`, class: "axis", fill: "none"});
  svg("text", {x: 290, y: 209, "text-anchor": "middle"}, "threshold");
  lines.forEach((line, which) => {
    const points = line.slice(0, 95).flatMap((snr, at) => snr === null ? [] : [`${x(at + 1)},${y(snr)}`]);
    svg("polyline", {points: points.join(" "), fill: "none", "stroke-width": 2, "stroke-dasharray": ["", "6 4", "2 3"][which], style: `stroke:var(${paint[which]})`});
    svg("text", {x: 52 + which * 70, y: 14, style: `fill:var(${paint[which]});font-weight:600`}, ["— ", "-- ", "·· "][which] + NETWORKS[which]);
  });
  svg("path", {d: `M${x(state.threshold)},15V180`, style: "stroke:var(--ink)"});
  $("curve").replaceChildren(...parts);
  const said = NETWORKS.map((network, which) => `${network} ${number(lines[which][state.threshold - 1])}`).join(", ");
  $("curve").setAttribute("aria-label", `SNR over the threshold; at ${number(state.threshold / 100)}: ${said}`);
  $("curveTitle").textContent = `All nodes of encoder ${state.encoder}, ${state.tap}, at ${number(state.threshold / 100)}: SNR ${said}`;
}

function drawRules() {
  const {thresholds, status, rows} = data.rules, distance = thresholds.map(at => Math.abs(at - state.threshold)), now = distance.indexOf(Math.min(...distance));
  const mark = at => at === now ? {class: "now"} : {}, head = element("tr");
  head.append(element("th", ""), ...thresholds.map((at, place) => element("th", number(at / 100, at % 10 ? 2 : 1), mark(place))), element("th", "effect"));
  const lines = [head];
  for (const claim of Object.keys(status)) {
    const own = rows.filter(row => row.claim === claim), line = element("tr", "", {class: "claim"});
    const met = thresholds.map((_, at) => own.filter(row => row.at[at][3]).length);
    line.append(element("td", `${claim}: ${met[now]} of ${own.length} rules met (${status[claim][now]})`), ...met.map((count, at) => element("td", count, mark(at))), element("td"));
    lines.push(line, ...own.map(row => {
      const made = element("tr"), [effect, low, high] = row.at[now], last = element("td", number(effect));
      last.append(element("small", `${number(low)} to ${number(high)}`));
      made.append(element("td", row.name), ...row.at.map((one, at) => element("td", one[3] ? "●" : "○", {...mark(at), "aria-label": one[3] ? "met" : "not met"})), last);
      return made;
    }));
  }
  $("rules").replaceChildren(...lines);
}

function drawCell(shown = shownOf(state.network), clusters = clustersOf(shown.matrix, state.threshold)) {
  drawLarge(shown, clusters);
  describeCell(shown, clusters);
}

function drawAll() {
  const shown = shownOf(state.network), clusters = clustersOf(shown.matrix, state.threshold);
  state.cell ??= [shown.order[0], shown.order[0]];
  $("level").textContent = number(state.threshold / 100);
  drawTiles(); drawCell(shown, clusters); drawAbout(shown, clusters); drawDrivers(shown); drawCurve(); drawRules();
}

function choose(change) {
  Object.assign(state, change);
  if (!(state.stop in viewOf(state.network).stops)) state.stop = "typical";
  if (!("threshold" in change || "cell" in change)) state.cell = null;
  fillStops();
  drawAll();
}

function fillStops() {
  const names = Object.keys(viewOf(state.network).stops), [nodes, heads] = [false, true].map(head => names.filter(name => name.startsWith("head ") === head));
  const groups = [["single nodes", nodes], ["whole heads", heads]].filter(([, part]) => part.length).map(([title, part]) => {
    const made = element("optgroup", "", {label: title});
    made.append(...part.map(name => new Option(name, name, false, name === state.stop)));
    return made;
  });
  $("stop").replaceChildren(...groups);
}

function pointed(event) {
  const {order, count, edge, side} = event.currentTarget.layout, box = event.currentTarget.getBoundingClientRect(), scale = event.currentTarget.width / box.width;
  const [x, y] = [event.clientX - box.left, event.clientY - box.top].map(value => Math.floor((value * scale - edge) / side));
  if (x < 0 || y < 0 || x >= count || y >= count) return;
  state.cell = [order[y], order[x]];
  drawCell();
}

function moved(event) {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  const {order, count} = event.currentTarget.layout;
  state.cell = state.cell.map((label, axis) => order[Math.min(count - 1, Math.max(0, order.indexOf(label) + step[axis]))]);
  drawCell();
}

function readColours() {
  colours = Object.fromEntries(["paper", "own", "inside", "outside", "plus", "minus"].map(name => [name, rgb("--" + name)]));
}

async function start() {
  const packed = Uint8Array.from(atob(data.levels), character => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  levels = new Int8Array(await new Response(stream).arrayBuffer());
  for (const name of ["encoder", "tap"]) {
    const values = [...new Set(data.views.map(view => view[name]))];
    $(name).replaceChildren(...values.map(value => new Option(value, value)));
    $(name).value = state[name] = values.at(-1);
    $(name).onchange = () => choose({[name]: name === "encoder" ? Number($(name).value) : $(name).value});
  }
  for (const network of NETWORKS) {
    const tile = element("button", "", {value: network});
    tile.append(element("canvas", "", {"aria-hidden": "true"}), element("div"));
    tile.onclick = () => choose({network});
    $("tiles").append(tile);
  }
  $("stop").onchange = () => choose({stop: $("stop").value});
  $("threshold").value = state.threshold;
  $("threshold").oninput = () => { state.threshold = Number($("threshold").value); drawAll(); };
  $("again").onclick = () => { orders = {}; drawAll(); };
  for (const id of ["field", "boolean"]) Object.assign($(id), {onpointermove: pointed, onpointerdown: pointed, onkeydown: moved});
  matchMedia("(prefers-color-scheme: dark)").onchange = () => { readColours(); drawAll(); };
  window.onresize = drawAll;
  readColours();
  choose({});
  document.body.dataset.ready = "true";
}
start();
