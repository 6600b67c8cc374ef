"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const METRIC = Object.fromEntries(DATA.metrics.map((one) => [one.name, one]));

/* --- small helpers --- */

function node(tag, attributes = {}, ...children) {
  const made = tag.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", tag.slice(4))
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const percent = (rate) => (100 * rate).toFixed(1);
const short = (value) => Number(value.toPrecision(4)).toString();
const rgb = (colour) => `rgb(${colour.join(",")})`;

/* The scale of the other figures: straight lines between its stops. */
function colourOf(value, low, high) {
  const place = Math.min(Math.max((value - low) / (high - low), 0), 1) * (DATA.scale.length - 1);
  const left = Math.min(Math.floor(place), DATA.scale.length - 2);
  return DATA.scale[left].map((part, channel) => Math.round(part + (DATA.scale[left + 1][channel] - part) * (place - left)));
}
function isDark(colour) {
  const [red, green, blue] = colour.map((part) => part / 255).map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179;
}

/* --- state: what is looked at, in the address so that it can be shared --- */

const state = { metric: DATA.metrics[0]?.name, protocol: 0, dataset: null, category: null, variant: null, seed: null };
const shown = { intervals: true, heat: true, mask: true };
function readAddress() {
  const told = new URLSearchParams(location.hash.slice(1));
  if (!told.has("metric")) return;
  state.metric = METRIC[told.get("metric")] ? told.get("metric") : state.metric;
  state.protocol = DATA.protocols[told.get("protocol")] ? Number(told.get("protocol")) : 0;
  state.dataset = told.get("dataset");
  state.category = told.get("category");
  state.variant = told.has("variant") ? Number(told.get("variant")) : null;
  state.seed = told.has("seed") ? Number(told.get("seed")) : null;
}
function writeAddress() {
  const told = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) if (value !== null && value !== undefined) told.set(name, value);
  history.replaceState(null, "", `#${told}`);
}
const cellsOf = (dataset, category, variant) =>
  DATA.cells.filter((cell) => cell.protocol === state.protocol && cell.dataset === dataset && cell.category === category && cell.variant === variant);
const nameOf = (variant) => DATA.variants[variant].join(" · ");
const findMatrix = (metric, dataset) =>
  DATA.matrices.find((one) => one.metric === metric && one.protocol === state.protocol && one.dataset === dataset);

/* --- matrices --- */

const sorting = new Map();

function drawMatrix(matrix, target, label, choose) {
  const key = `${matrix.metric} ${matrix.dataset}`;
  const order = sorting.get(key) ?? { column: null, down: true };
  const rows = [...matrix.rows];
  if (order.column !== null) {
    const sign = order.down ? -1 : 1;
    rows.sort((a, b) => {
      if (order.column < 0) return sign * a.labels.join(" ").localeCompare(b.labels.join(" "), "en", { numeric: true });
      const [x, y] = [a.cells[order.column].value, b.cells[order.column].value];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (x - y);
    });
  }
  const header = (name, column) => {
    const active = order.column === column;
    const press = () => {
      sorting.set(key, { column, down: active ? !order.down : column >= 0 });
      drawMatrix(matrix, target, label, choose);
      target.querySelectorAll("thead button")[column + 1].focus();
    };
    return node("th", { scope: "col", class: column < 0 ? null : "num", "aria-sort": active ? (order.down ? "descending" : "ascending") : "none" },
      node("button", { type: "button", onclick: press }, name));
  };
  const table = node("table", { class: "matrix" },
    node("caption", {}, `${matrix.title} in percent`, node("small", {}, label)),
    node("thead", {}, node("tr", {}, header(matrix.header.join(" · "), -1), ...matrix.columns.map(header))),
    node("tbody", {}, ...rows.map((row) => node("tr", { class: row.variant === state.variant ? "chosen" : null },
      node("th", { scope: "row" }, node("b", {}, row.labels[0]), ...row.labels.slice(1).map((text) => node("span", {}, text))),
      ...row.cells.map((cell, column) => node("td", {}, drawValue(matrix, row, cell, matrix.columns[column], choose)))))));
  const steps = DATA.scale.map((colour) => rgb(colour)).join(",");
  target.replaceChildren(
    node("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${matrix.title}, ${label}` }, table,
      node("div", { class: "scale", "aria-hidden": "true" }, percent(matrix.low), node("i", { style: `background:linear-gradient(90deg,${steps})` }), `${percent(matrix.high)} %`)),
    node("ul", { class: "notes" }, ...matrix.notes.map((text) => node("li", {}, text))));
}

function drawValue(matrix, row, cell, column, choose) {
  const who = row.labels.join(" ");
  if (cell.value === undefined) {
    const hole = cell.state === "hole";
    const text = hole ? `— ${cell.note}` : "n/a";
    return node("button", { type: "button", class: `value ${hole ? "hole" : "none"}`, title: cell.reason ?? cell.note ?? "the metric does not exist here",
      "aria-label": `${who}, ${column}: ${hole ? cell.note : "not available"}`, onclick: () => choose(column, row.variant, true) }, node("span", {}, text));
  }
  const colour = colourOf(cell.value, matrix.low, matrix.high);
  const spread = cell.std === undefined ? "" : ` ± ${percent(cell.std)}`;
  const range = cell.interval ? `${percent(cell.interval[0])}–${percent(cell.interval[1])}` : "";
  const pressed = matrix.dataset === null ? column === state.dataset : column === state.category;
  return node("button", { type: "button", class: `value${cell.rank ? ` ${cell.rank}` : ""}`,
    style: `--fill:${rgb(colour)};--front:${isDark(colour) ? "#fff" : "#000"}`, "aria-pressed": String(pressed && row.variant === state.variant),
    title: [cell.rank === "best" ? "best of its column" : cell.rank === "second" ? "second of its column" : "", range && `95 % interval ${range}`].filter(Boolean).join("; ") || null,
    "aria-label": `${who}, ${column}: ${percent(cell.value)} percent${spread}${range ? `, interval ${range}` : ""}${cell.rank === "best" ? ", best of its column" : ""}`,
    onclick: () => choose(column, row.variant, false) },
    node("b", {}, percent(cell.value)), cell.marks ? node("sup", {}, cell.marks) : null,
    shown.intervals && (spread || range) ? node("small", {}, range || spread.trim()) : null,
    shown.intervals && spread && range ? node("small", {}, spread.trim()) : null);
}

function radios(name, choices, chosen, change) {
  return node("fieldset", { class: "segments" }, node("legend", { class: "skip" }, name), ...choices.map(([value, text]) =>
    node("label", {}, node("input", { type: "radio", name, value, checked: String(value) === String(chosen), onchange: () => change(value) }), node("span", {}, text))));
}
function tick(text, field, change) {
  return node("label", {}, node("input", { type: "checkbox", checked: shown[field], onchange: (event) => { shown[field] = event.target.checked; change(); } }), text);
}

function drawControls() {
  const parts = [radios("Metric", DATA.metrics.map((one) => [one.name, one.title]), state.metric, (value) => { state.metric = value; draw(); })];
  if (DATA.protocols.length > 1) {
    const options = DATA.protocols.map((one, place) => node("option", { value: place, selected: place === state.protocol }, one.id));
    const change = (event) => { Object.assign(state, { protocol: Number(event.target.value), dataset: null, category: null, variant: null, seed: null }); draw(); };
    parts.push(node("label", {}, "Protocol", node("select", { onchange: change }, ...options)));
  }
  parts.push(tick("Intervals", "intervals", draw));
  $("controls").replaceChildren(...parts);
}

function draw() {
  const matrix = findMatrix(state.metric, null);
  if (matrix) drawMatrix(matrix, $("matrix"), "mean over categories", (dataset, variant) => openDataset(dataset, variant));
  else $("matrix").replaceChildren(node("p", { class: "muted" }, DATA.metrics.length ? "No row has this metric under this protocol." : "There is nothing to show yet."));
  drawDrill();
  drawPareto();
  writeAddress();
}

/* --- from a dataset to a category to an image --- */

function openDataset(dataset, variant) {
  const categories = [...new Set(DATA.cells.filter((cell) => cell.dataset === dataset && cell.protocol === state.protocol).map((cell) => cell.category))];
  Object.assign(state, { dataset, variant, category: categories.length === 1 ? categories[0] : null, seed: null });
  draw();
  $("drill-heading").focus({ preventScroll: true });
  $("drill").scrollIntoView();
}
function openCell(category, variant) {
  if (category === "mean") return;
  Object.assign(state, { category, variant, seed: null });
  draw();
  $("cell-heading")?.focus({ preventScroll: true });
  $("cell").scrollIntoView();
}

function drawDrill() {
  const { dataset, category, variant } = state;
  $("drill").hidden = dataset === null;
  if (dataset === null) return;
  const step = (text, action) => node("li", {}, action ? node("button", { type: "button", onclick: action }, text) : node("span", { "aria-current": "page" }, text));
  const trail = [step("All datasets", () => { Object.assign(state, { dataset: null, category: null, variant: null, seed: null }); draw(); $("results").scrollIntoView(); })];
  trail.push(step(dataset, category === null ? null : () => openDataset(dataset, variant)));
  if (category !== null) trail.push(step(category));
  $("crumbs").replaceChildren(node("ol", {}, ...trail));
  $("drill-heading").textContent = dataset;
  const matrix = findMatrix(state.metric, dataset);
  if (matrix) drawMatrix(matrix, $("categories"), dataset, openCell);
  else $("categories").replaceChildren();
  $("cell").hidden = category === null;
  if (category !== null) drawCell(cellsOf(dataset, category, variant));
}

function drawCell(cells) {
  const target = $("cell");
  const heading = node("h3", { id: "cell-heading", tabindex: "-1" }, `${state.category} — ${nameOf(state.variant)}`);
  if (!cells.length) {
    target.replaceChildren(heading, node("p", { class: "muted" }, "This cell has no number; see below for the reason."));
    return;
  }
  const cell = cells.find((one) => one.seed === state.seed) ?? cells[0];
  const seeds = cells.length > 1
    ? node("label", { class: "controls" }, "Seed", node("select", { onchange: (event) => { state.seed = Number(event.target.value); draw(); } },
        ...cells.map((one) => node("option", { value: one.seed, selected: one === cell }, String(one.seed)))))
    : node("span", { class: "muted small" }, `seed ${cell.seed}`);
  const figures = DATA.metrics.filter((one) => one.name in cell.metrics).map((one) => {
    const bound = cell.bounds[one.name];
    return node("li", { title: bound > 0 ? `largest possible error ${(100 * bound).toPrecision(2)} points` : null }, node("b", {}, percent(cell.metrics[one.name])), node("span", {}, one.title));
  });
  const costs = [["images_per_second", "images/s"], ["fit_seconds", "s fit"], ["peak_rss_mib", "MiB memory"], ["peak_gpu_mib", "MiB GPU memory"]]
    .filter(([name]) => name in cell.costs).map(([name, unit]) => `${short(cell.costs[name])} ${unit}`);
  const facts = [["Layers", cell.layers.join(", ")], ["Parameters", Object.entries(cell.params).map(([name, value]) => `${name} ${JSON.stringify(value)}`).join(", ")],
    ["Cost", costs.join(", ")], ["Marked", cell.stamps.join("; ")], ["Cell", cell.id]].filter(([, text]) => text);
  const plots = node("div", { class: "plots" });
  const pictures = node("div");
  target.replaceChildren(node("header", {}, heading, seeds), node("ul", { class: "figures" }, ...figures), plots, pictures,
    node("details", {}, node("summary", {}, "How this cell was run"), node("dl", {}, ...facts.flatMap(([name, text]) => [node("dt", {}, name), node("dd", {}, text)]))));
  const update = drawPlots(cell, plots, (threshold) => markPictures(pictures, threshold));
  drawPictures(cell, pictures);
  if (update) update();
}

/* --- charts --- */

const MARGIN = { top: 10, right: 10, bottom: 34, left: 48 };

function frame(width, height, x, y, label) {
  const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
  const across = (value) => MARGIN.left + inner.width * x.place(value);
  const down = (value) => MARGIN.top + inner.height * (1 - y.place(value));
  const svg = node("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const value of y.ticks) {
    svg.append(node("svg:line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: down(value), y2: down(value) }),
      text(MARGIN.left - 6, down(value) + 4, y.format(value), "end"));
  }
  for (const value of x.ticks) {
    svg.append(node("svg:line", { class: "grid", x1: across(value), x2: across(value), y1: MARGIN.top, y2: height - MARGIN.bottom }),
      text(across(value), height - MARGIN.bottom + 15, x.format(value), "middle"));
  }
  svg.append(node("svg:line", { class: "axis", x1: MARGIN.left, x2: width - MARGIN.right, y1: height - MARGIN.bottom, y2: height - MARGIN.bottom }),
    text(MARGIN.left + inner.width / 2, height - 4, x.label, "middle"));
  if (y.label) svg.append(node("svg:text", { transform: `translate(9 ${MARGIN.top + inner.height / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
  return { svg, across, down, width, height };
}
const text = (x, y, words, anchor) => node("svg:text", { x, y, "text-anchor": anchor }, words);
const path = (points, { across, down }, className) => node("svg:path", { class: className, d: points.map(([x, y], place) => `${place ? "L" : "M"}${across(x).toFixed(1)} ${down(y).toFixed(1)}`).join("") });
function linear(low, high, ticks, label, format = (value) => String(value)) {
  return { place: (value) => (value - low) / (high - low || 1), ticks, label, format };
}
function niceTicks(low, high, most) {
  const rough = (high - low) / most || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((one) => one * power).find((one) => one >= rough);
  const ticks = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-6; value += step) ticks.push(Number(value.toPrecision(12)));
  return ticks;
}
const RATES = [0, 0.25, 0.5, 0.75, 1];
const legend = (...items) => node("div", { class: "legend" }, ...items.map(([colour, words]) => node("span", {}, node("i", { style: `background:${colour}` }), words)));

/* Draws the curves of a cell; returns what redraws all that depends on the threshold. */
function drawPlots(cell, target, changed) {
  const plots = [];
  let update = null;
  const { roc, histogram, curves } = cell;
  if (roc) {
    const points = [[0, 0], ...roc.false.map((value, place) => [value / roc.normal, roc.true[place] / roc.anomalous])];
    const chart = frame(320, 250, linear(0, 1, RATES, "false-positive rate"), linear(0, 1, RATES, "true-positive rate"), `Image ROC curve, area ${percent(cell.metrics.image_auroc)} percent`);
    const dot = node("svg:circle", { r: 5, class: "one point" });
    chart.svg.append(path([[0, 0], [1, 1]], chart, "dashed"), path(points, chart, "line one"), dot);
    plots.push(node("figure", {}, node("h4", {}, "Images: ROC"), chart.svg));

    const bars = Math.max(...histogram.normal, ...histogram.anomalous, 1);
    const count = histogram.normal.length, low = histogram.low, high = histogram.high;
    const counts = frame(320, 190, linear(low, high, niceTicks(low, high, 4), "image score", short), linear(0, bars, niceTicks(0, bars, 3).filter(Number.isInteger), "images"), "Histogram of image scores, normal and anomalous");
    const group = node("svg:g", { class: "bars" });
    for (const [kind, values] of [["n", histogram.normal], ["a", histogram.anomalous]]) {
      values.forEach((value, place) => {
        const left = counts.across(low + ((high - low) * place) / count), right = counts.across(low + ((high - low) * (place + 1)) / count);
        if (value) group.append(node("svg:rect", { class: kind, x: left + 0.5, width: right - left - 1, y: counts.down(value), height: counts.down(0) - counts.down(value) }));
      });
    }
    const mark = node("svg:line", { class: "mark", y1: MARGIN.top, y2: counts.height - MARGIN.bottom });
    counts.svg.append(group, mark);
    const slider = node("input", { type: "range", min: 0, max: roc.threshold.length - 1, step: 1, value: roc.threshold.length - 1 - roc.best, id: "threshold" });
    const told = node("output", { for: "threshold" });
    const table = node("table", { class: "confusion" });
    plots.push(node("figure", {}, node("h4", {}, "Image scores"), legend(["var(--normal)", `normal (${roc.normal})`], ["var(--anomalous)", `anomalous (${roc.anomalous})`]), counts.svg,
      node("div", { class: "threshold" }, node("label", { for: "threshold" }, "Threshold ", told), slider), table));
    update = () => {
      const place = roc.threshold.length - 1 - Number(slider.value), threshold = roc.threshold[place];
      const [found, raised] = [roc.true[place], roc.false[place]];
      const [missed, kept] = [roc.anomalous - found, roc.normal - raised];
      const f1 = (2 * found) / (2 * found + raised + missed || 1);
      told.textContent = `${short(threshold)}${place === roc.best ? " (best F1)" : ""}: precision ${percent(found / (found + raised || 1))}, recall ${percent(found / roc.anomalous)}, F1 ${percent(f1)}`;
      slider.setAttribute("aria-valuetext", told.textContent);
      dot.setAttribute("cx", chart.across(raised / roc.normal));
      dot.setAttribute("cy", chart.down(found / roc.anomalous));
      for (const end of ["x1", "x2"]) mark.setAttribute(end, counts.across(threshold));
      table.replaceChildren(node("thead", {}, node("tr", {}, node("th", { scope: "col" }, "is"), node("th", { scope: "col", class: "num" }, "called normal"), node("th", { scope: "col", class: "num" }, "called anomalous"))),
        node("tbody", {}, node("tr", {}, node("th", { scope: "row" }, "normal"), node("td", {}, String(kept)), node("td", { class: raised ? "wrong" : null }, String(raised))),
          node("tr", {}, node("th", { scope: "row" }, "anomalous"), node("td", { class: missed ? "wrong" : null }, String(missed)), node("td", {}, String(found)))));
      changed(threshold);
    };
    slider.addEventListener("input", update);
  }
  if (curves.false_positive_rate) {
    const limit = DATA.protocols[cell.protocol].aupro_limit;
    const [rate, roc_, pro] = [curves.false_positive_rate, curves.true_positive_rate, curves.region_overlap];
    const chart = frame(320, 250, linear(0, 1, RATES, "false-positive rate of pixels"), linear(0, 1, RATES, "rate"), "Pixel ROC and PRO curves");
    const pairs = (values) => [[0, 0], ...rate.map((x, place) => [x, values[place]])];
    chart.svg.append(node("svg:line", { class: "dashed", x1: chart.across(limit), x2: chart.across(limit), y1: MARGIN.top, y2: 250 - MARGIN.bottom }),
      path(pairs(roc_), chart, "line one"), path(pairs(pro), chart, "line two"));
    plots.push(node("figure", {}, node("h4", {}, "Pixels: ROC and PRO"), legend(["var(--accent)", "ROC"], ["var(--anomalous)", "PRO"]), chart.svg,
      node("figcaption", {}, `PRO is the mean overlap of the defect regions; AUPRO integrates it up to ${limit}, the dashed line.`)));
  }
  target.replaceChildren(...plots);
  return update;
}

/* --- pictures --- */

function stack(picture) {
  const image = (kind, data, words) => node("img", { class: kind, src: `data:image/webp;base64,${data}`, alt: words, loading: "lazy", decoding: "async" });
  return [image("photo", DATA.photos[picture.id], ""), image("heat", picture.heat, ""), picture.mask ? image("mask", picture.mask, "") : null];
}
const kindOf = (picture) => (picture.label ? picture.defect.replaceAll("_", " ") : "normal");

function drawPictures(cell, target) {
  if (!cell.pictures.length) {
    target.replaceChildren(node("p", { class: "muted small" }, "No pictures are kept of this cell."));
    return;
  }
  const list = (label) => node("ul", { class: "pictures" }, ...cell.pictures.filter((picture) => picture.label === label).map((picture) =>
    node("li", { "data-score": picture.score, "data-label": picture.label }, node("figure", {},
      node("button", { type: "button", class: "stack", "aria-label": `${kindOf(picture)} ${picture.name}, score ${short(picture.score)}: enlarge`, onclick: () => view(picture) }, ...stack(picture)),
      node("figcaption", {}, node("b", { class: "verdict" }), node("br"), `${kindOf(picture)} · ${short(picture.score)}`)))));
  const layers = () => { target.classList.toggle("with-heat", shown.heat); target.classList.toggle("with-mask", shown.mask); };
  target.replaceChildren(
    node("div", { class: "heading", style: "margin:1.6rem 0 0" }, node("h3", { style: "margin:0" }, "What it finds hard"),
      node("div", { class: "controls" }, tick("Heat map", "heat", layers), tick("Mask outline", "mask", layers))),
    node("h4", { style: "margin-top:.9rem" }, "Anomalous images with the lowest scores"), list(1),
    node("h4", { style: "margin-top:1.3rem" }, "Normal images with the highest scores"), list(0),
    DATA.credits[state.dataset] ? node("p", { class: "credit" }, DATA.credits[state.dataset]) : null);
  layers();
}
function markPictures(target, threshold) {
  for (const item of target.querySelectorAll("li[data-score]")) {
    const called = Number(item.dataset.score) >= threshold - Math.abs(threshold) * 1e-5, anomalous = item.dataset.label === "1";
    item.classList.toggle("is-wrong", called !== anomalous);
    const verdict = item.querySelector(".verdict");
    verdict.textContent = anomalous ? (called ? "found" : "✗ missed") : called ? "✗ false alarm" : "passed";
    verdict.classList.toggle("wrong", called !== anomalous);
  }
}

function view(picture) {
  const same = DATA.cells.filter((cell) => cell.protocol === state.protocol && cell.dataset === state.dataset && cell.category === state.category)
    .flatMap((cell) => cell.pictures.filter((one) => one.id === picture.id && one.name === picture.name).map((one) => [cell, one]));
  const dialog = $("viewer");
  const item = (title, note, ...layers) => node("li", {}, node("figure", {}, node("div", { class: "stack" }, ...layers), node("figcaption", {}, node("b", {}, title), node("br"), note)));
  const [photo, , mask] = stack(picture);
  dialog.replaceChildren(
    node("header", {}, node("h3", { id: "viewer-heading" }, `${picture.name} — ${kindOf(picture)}`), node("button", { type: "button", class: "plain", onclick: () => dialog.close() }, "Close")),
    node("p", { class: "muted small" }, same.length > 1 ? `Among the hardest images of ${same.length} of the runs on ${state.category}.` : `Among the hardest images of this run alone on ${state.category}.`),
    node("ul", { class: "others with-mask" }, item("the image", picture.mask ? "with the outline of its mask" : "", photo, mask),
      ...same.map(([cell, one]) => item(nameOf(cell.variant), `score ${short(one.score)}${cell.seed ? `, seed ${cell.seed}` : ""}`, ...stack(one)))));
  for (const place of dialog.querySelectorAll("li:not(:first-child)")) place.classList.add("with-heat");
  dialog.showModal();
}
$("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });

/* --- accuracy against cost --- */

const COSTS = [["images_per_second", "Images per second", true], ["peak_rss_mib", "Peak memory in MiB", false], ["peak_gpu_mib", "Peak GPU memory in MiB", false]];
const cost = { name: null, dataset: null };

function costPoints(matrix, dataset, name) {
  const column = matrix.columns.indexOf(dataset);
  return matrix.rows.flatMap((row) => {
    const values = DATA.cells.filter((cell) => cell.protocol === state.protocol && cell.dataset === dataset && cell.variant === row.variant && name in cell.costs).map((cell) => cell.costs[name]);
    const rate = row.cells[column]?.value;
    if (rate === undefined || !values.length) return [];
    return [{ row, rate, x: values.reduce((sum, value) => sum + value, 0) / values.length }];
  });
}

function drawPareto() {
  const matrix = findMatrix(state.metric, null);
  const known = COSTS.filter(([name]) => DATA.cells.some((cell) => cell.costs[name] > 0));
  $("cost").hidden = !matrix || !known.length;
  if ($("cost").hidden) return;
  const chosen = known.find(([name]) => name === cost.name) ?? known[0];
  const [name, label, moreIsBetter] = chosen;
  const dataset = matrix.columns.includes(cost.dataset) ? cost.dataset : matrix.columns[0];
  $("cost-controls").replaceChildren(
    radios("Cost", known.map(([value, words]) => [value, words.replace(/ in MiB/, "")]), name, (value) => { cost.name = value; drawPareto(); }),
    node("label", {}, "Dataset", node("select", { onchange: (event) => { cost.dataset = event.target.value; drawPareto(); } },
      ...matrix.columns.map((one) => node("option", { selected: one === dataset }, one)))));
  const points = costPoints(matrix, dataset, name);
  if (!points.length) {
    $("pareto").replaceChildren(node("p", { class: "muted" }, `No complete ${matrix.title} on ${dataset}.`));
    return;
  }
  const width = Math.max(Math.min($("cost").clientWidth || 900, 1150) - 42, 280), height = width < 560 ? 300 : 400;
  const logs = points.map((point) => Math.log10(point.x));
  const pad = Math.max((Math.max(...logs) - Math.min(...logs)) * 0.12, 0.06);
  const [low, high] = [Math.min(...logs) - pad, Math.max(...logs) + pad];
  const rates = points.map((point) => point.rate), room = Math.max((Math.max(...rates) - Math.min(...rates)) * 0.15, 0.005);
  const [bottom, top] = [Math.min(...rates) - room, Math.min(Math.max(...rates) + room, 1.002)];
  let ticks = [1, 2, 5].flatMap((one) => [-2, -1, 0, 1, 2, 3, 4, 5, 6].map((power) => one * 10 ** power)).filter((value) => Math.log10(value) >= low && Math.log10(value) <= high).sort((a, b) => a - b);
  if (ticks.length < 2) ticks = niceTicks(10 ** low, 10 ** high, width < 560 ? 3 : 5);
  const chart = frame(width, height, { place: (value) => (Math.log10(value) - low) / (high - low), ticks, label: `${label} (log scale)`, format: short },
    linear(bottom, top, niceTicks(bottom, top, 5), `${matrix.title} [%]`, (value) => Number((100 * value).toFixed(2)).toString()), `${matrix.title} against ${label.toLowerCase()} on ${dataset}`);
  const better = (a, b) => (moreIsBetter ? a.x >= b.x : a.x <= b.x) && a.rate >= b.rate && (a.x !== b.x || a.rate !== b.rate);
  const front = points.filter((point) => !points.some((other) => better(other, point))).sort((a, b) => a.x - b.x);
  if (front.length > 1) chart.svg.append(path(front.map((point) => [point.x, point.rate]), chart, "front"));
  const methods = [...new Set(points.map((point) => point.row.labels[0]))];
  const hues = ["var(--accent)", "var(--anomalous)", "#009e73", "#cc79a7", "#b08900", "#7a5cc0", "#56b4e9", "#888"];
  const taken = [];
  for (const point of [...points].sort((a, b) => b.rate - a.rate)) {
    const [x, y] = [chart.across(point.x), chart.down(point.rate)], best = front.includes(point);
    const words = `${point.row.labels.join(" · ")}: ${percent(point.rate)} % at ${short(point.x)} ${label.toLowerCase()}${best ? ", on the Pareto front" : ""}`;
    const open = () => openDataset(dataset, point.row.variant);
    chart.svg.append(node("svg:circle", { class: "point", cx: x, cy: y, r: best ? 7 : 5, fill: hues[methods.indexOf(point.row.labels[0]) % hues.length], "fill-opacity": best ? 1 : 0.55,
      tabindex: 0, role: "button", "aria-label": words, onclick: open, onkeydown: (event) => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } } }, node("svg:title", {}, words)));
    const caption = point.row.labels.slice(1).join(" · "), wide = caption.length * 5.9, left = x + 11 + wide > width;
    const box = [left ? x - 11 - wide : x + 11, y - 8, left ? x - 11 : x + 11 + wide, y + 8];
    if (taken.some((other) => box[0] < other[2] && other[0] < box[2] && box[1] < other[3] && other[1] < box[3])) continue;
    taken.push(box);
    chart.svg.append(text(left ? x - 11 : x + 11, y + 4, caption, left ? "end" : "start"));
  }
  chart.svg.removeAttribute("role"); /* holds buttons */
  $("pareto").replaceChildren(node("div", { class: "panel" }, legend(...methods.map((method, place) => [hues[place % hues.length], method])), chart.svg,
    node("p", { class: "muted small" }, name === "images_per_second"
      ? "Test images per second while predicting: reading what the method is given, and the method; stored features come without the backbone's own time. The dashed line joins what nothing beats in both; up and right is better."
      : "The highest memory of the worker's process while it fitted and predicted. The dashed line joins what nothing beats in both; up and left is better.")));
}

/* --- sortable lists --- */

/* Numbers by size, text by its letters, a text below every number. */
function compareTexts(a, b) {
  const [first, second] = [a, b].map((text) => (text.trim() === "" ? NaN : Number(text)));
  if (Number.isNaN(first) !== Number.isNaN(second)) return Number.isNaN(first) ? -1 : 1;
  return Number.isNaN(first) ? a.localeCompare(b, "en", { numeric: true }) : first - second;
}
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = node("button", { type: "button" }, ...head.childNodes);
    head.replaceChildren(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.querySelectorAll("thead th")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows], value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      rows.sort((a, b) => (down ? -1 : 1) * compareTexts(value(a), value(b)));
      table.tBodies[0].append(...rows);
    });
  });
}

/* --- theme, copying --- */

const system = matchMedia("(prefers-color-scheme: dark)");
const themes = { auto: "Auto", light: "Light", dark: "Dark" };
let theme = "auto";
try { theme = localStorage.getItem("adgrid-theme") ?? "auto"; } catch { /* a file may have no storage */ }
function applyTheme() {
  document.documentElement.dataset.theme = theme === "auto" ? (system.matches ? "dark" : "light") : theme;
  $("theme").textContent = themes[theme] ?? "Auto";
  $("theme").setAttribute("aria-label", `Colour theme: ${themes[theme]}; press to change`);
}
$("theme").addEventListener("click", () => {
  const names = Object.keys(themes);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  try { localStorage.setItem("adgrid-theme", theme); } catch { /* as above */ }
  applyTheme();
});
system.addEventListener("change", applyTheme);
$("copy").addEventListener("click", async () => {
  const range = document.createRange();
  range.selectNodeContents($("command"));
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  try { await navigator.clipboard.writeText($("command").textContent); } catch { document.execCommand("copy"); }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
});

let resized;
addEventListener("resize", () => { clearTimeout(resized); resized = setTimeout(drawPareto, 150); });
addEventListener("hashchange", () => { readAddress(); drawControls(); draw(); });
applyTheme();
readAddress();
drawControls();
draw();
