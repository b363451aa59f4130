"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const shown = new Set(data.runs.map((run) => run.name));
const redraws = []; // what has to be drawn again when other runs are shown

// Paul Tol's bright scheme: told apart with any colour vision, on light and dark ground.
const COLOURS = ["#4477aa", "#ee6677", "#228833", "#bfa72e", "#3fb2d6", "#aa3377", "#8a8f98"];
const DASHES = ["", "7 4", "2 3", "10 4 2 4"];
const colour = (run) => COLOURS[run.group % COLOURS.length];
const dashes = (run) => DASHES[Math.floor(run.group / COLOURS.length) % DASHES.length];

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function drawing(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function format(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "number" || Number.isInteger(value)) return String(value);
  return String(Number(value.toPrecision(4)));
}

function short(field) {
  const name = field.split(".").pop();
  const twice = data.fields.filter((each) => each.split(".").pop() === name).length > 1;
  return twice ? field.split(".").slice(-2).join(".") : name;
}

function describe() {
  document.getElementById("title").textContent = data.title;
  const order = data.score.maximize ? "more is better" : "less is better";
  const source = data.config ? `${data.config}, ` : "";
  document.getElementById("about").textContent =
    `${source}ranked by the best ${data.score.name} (${order}); written ${data.created}`;
  const counts = new Map();
  for (const run of data.runs) counts.set(run.state, (counts.get(run.state) || 0) + 1);
  const parts = [...counts].map(([state, count]) => `${count} ${state}`);
  document.getElementById("counts").textContent = `${data.runs.length} runs: ${parts.join(", ")}`;
}

// A run is looked at: its row, curves and points stand out.
function activate(name) {
  for (const svg of document.querySelectorAll("svg")) svg.classList.toggle("choosing", name !== null);
  for (const each of document.querySelectorAll("[data-run]")) {
    each.classList.toggle("active", each.dataset.run === name);
  }
}

function watch(node, name) {
  node.dataset.run = name;
  node.addEventListener("mouseenter", () => activate(name));
  node.addEventListener("mouseleave", () => activate(null));
  return node;
}

// ---- Tables ----

function swatch(run) {
  const svg = drawing("svg", { class: "swatch", viewBox: "0 0 18 4", "aria-hidden": "true" });
  svg.style.width = "18px";
  svg.style.display = "inline-block";
  svg.append(drawing("line", {
    x1: 0, x2: 18, y1: 2, y2: 2, stroke: colour(run), "stroke-width": 4, "stroke-dasharray": dashes(run),
  }));
  return svg;
}

const columns = [
  { title: "run", value: (run) => run.name },
  { title: "state", value: (run) => run.state },
  { title: `best ${data.score.name}`, value: (run) => run.score },
  { title: "loss", value: (run) => run.loss },
  { title: "step", value: (run) => run.step, text: (run) => `${run.step}/${run.total}` },
  ...data.fields.map((field) => ({
    title: short(field), hint: field, value: (run) => run.fields[field],
  })),
];

function compare(one, other) {
  if (typeof one === "number" && typeof other === "number") return one - other;
  return String(one).localeCompare(String(other), "en", { numeric: true });
}

function bestRun() {
  const scored = data.runs.filter((run) => run.score !== null);
  scored.sort((a, b) => (data.score.maximize ? b.score - a.score : a.score - b.score));
  return scored.length ? scored[0].name : null;
}

function runTable() {
  const table = document.getElementById("runs");
  const best = bestRun();
  const head = element("tr");
  const body = element("tbody");
  head.append(element("th", { scope: "col" }, "shown"));
  const isNumber = columns.map((column) =>
    data.runs.every((run) => column.value(run) === null || typeof column.value(run) === "number"));
  let sorted = null;

  columns.forEach((column, index) => {
    const button = element("button", { type: "button", title: column.hint || column.title }, column.title);
    const cell = element("th", { scope: "col", "aria-sort": "none" }, button);
    if (isNumber[index]) cell.className = "number";
    button.addEventListener("click", () => {
      const down = sorted && sorted.index === index && !sorted.down;
      sorted = { index, down };
      for (const each of head.querySelectorAll("[aria-sort]")) each.setAttribute("aria-sort", "none");
      cell.setAttribute("aria-sort", down ? "descending" : "ascending");
      fill();
    });
    head.append(cell);
  });

  function row(run) {
    const box = element("input", { type: "checkbox", "aria-label": `show ${run.name} in the charts` });
    box.checked = shown.has(run.name);
    const line = watch(element("tr"), run.name);
    line.classList.toggle("hidden-run", !box.checked);
    line.classList.toggle("best", run.name === best);
    box.addEventListener("change", () => {
      if (box.checked) shown.add(run.name); else shown.delete(run.name);
      line.classList.toggle("hidden-run", !box.checked);
      for (const redraw of redraws) redraw();
    });
    line.append(element("td", {}, box));
    columns.forEach((column, index) => {
      const text = column.text ? column.text(run) : format(column.value(run));
      const cell = element(index ? "td" : "th", index ? {} : { scope: "row" });
      if (isNumber[index]) cell.className = "number";
      if (index === 0) cell.append(swatch(run));
      cell.append(index === 0 && run.name === best ? `${text} (best)` : text);
      if (index === 0 && run.tags.length) {
        cell.append(" ", ...run.tags.map((tag) => element("span", { class: "tag" }, tag)));
      }
      if (index === 0 && run.error) cell.append(element("span", { class: "error" }, run.error));
      if (index === 1) cell.className = `state-${run.state}`;
      line.append(cell);
    });
    return line;
  }

  function fill() {
    const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const text = (run) => [run.name, run.state, ...run.tags, ...Object.values(run.fields)].join(" ").toLowerCase();
    const runs = data.runs.filter((run) => words.every((word) => text(run).includes(word)));
    if (sorted) {
      const value = columns[sorted.index].value;
      runs.sort((a, b) => {
        // What is not known comes last, whichever way.
        if (value(a) === null || value(b) === null) return (value(a) === null) - (value(b) === null);
        return (sorted.down ? -1 : 1) * compare(value(a), value(b));
      });
    }
    body.replaceChildren(...runs.map(row));
  }

  function showAll(yes) {
    shown.clear();
    if (yes) for (const run of data.runs) shown.add(run.name);
    fill();
    for (const redraw of redraws) redraw();
  }

  document.getElementById("filter").addEventListener("input", fill);
  document.getElementById("all").addEventListener("click", () => showAll(true));
  document.getElementById("none").addEventListener("click", () => showAll(false));
  fill();
  table.replaceChildren(element("thead", {}, head), body);
}

function seedTable() {
  if (!data.seeds.some((row) => row.runs > 1)) return;
  document.getElementById("seeds-section").hidden = false;
  const titles = ["runs that differ in the seed alone", "runs", `mean best ${data.score.name}`, "standard deviation"];
  const head = element("tr", {}, ...titles.map((title, index) =>
    element("th", index ? { scope: "col", class: "number" } : { scope: "col" }, title)));
  const lines = data.seeds.map((row) => element("tr", {},
    element("th", { scope: "row" }, swatch(row), row.name),
    ...[row.runs, row.mean, row.deviation].map((value) => element("td", { class: "number" }, format(value)))));
  document.getElementById("seeds").replaceChildren(
    element("thead", {}, head), element("tbody", {}, ...lines));
}
