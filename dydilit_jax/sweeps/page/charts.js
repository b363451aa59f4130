// ---- Scales and axes ----

function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of [1, 2, 5]) {
      const value = Number((digit * 10 ** power).toPrecision(6));
      if (value >= low * (1 - 1e-9) && value <= high * (1 + 1e-9)) found.push(value);
    }
  }
  return found.length > 1 ? found.filter((_, i) => i % Math.ceil(found.length / 7) === 0) : [low, high];
}

// From values to a place between `from` and `to`; values that are no numbers stand side by side.
function scale(values, from, to, logarithmic) {
  if (!values.every((value) => typeof value === "number")) {
    const kinds = [...new Set(values)].sort(compare);
    const place = (value) => from + ((kinds.indexOf(value) + 0.5) / kinds.length) * (to - from);
    return { place, marks: kinds };
  }
  let low = Math.min(...values);
  let high = Math.max(...values);
  const few = [...new Set(values)].sort((one, other) => one - other);
  if (low === high) [low, high] = logarithmic ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const way = logarithmic && low > 0 ? Math.log : (value) => value;
  const place = (value) => from + ((way(value) - way(low)) / (way(high) - way(low))) * (to - from);
  // A few settings, such as seeds, are marked as they are.
  if (few.length === 1 || (few.length < 7 && few.every(Number.isInteger))) return { place, marks: few };
  return { place, marks: way === Math.log ? logTicks(low, high) : ticks(low, high, 6) };
}

const WIDTH = 640, HEIGHT = 340, LEFT = 62, RIGHT = 16, TOP = 14, BOTTOM = 40;

function axes(svg, across, up, acrossTitle, upTitle) {
  for (const mark of up.marks) {
    const y = up.place(mark);
    svg.append(
      drawing("line", { class: "rule", x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y }),
      drawing("text", { x: LEFT - 8, y: y + 4, "text-anchor": "end" }, format(mark)));
  }
  for (const mark of across.marks) {
    svg.append(drawing("text", {
      x: across.place(mark), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle",
    }, format(mark)));
  }
  svg.append(
    drawing("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }),
    drawing("text", { x: WIDTH - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, acrossTitle),
    drawing("text", { x: 4, y: 11 }, upTitle));
}

function chart(container, className = "chart") {
  const box = element("div", { class: className });
  const controls = element("div", { class: "controls" });
  const place = element("div");
  const readout = element("p", { class: "readout", "aria-live": "polite" });
  box.append(controls, place, readout);
  container.append(box);
  return { controls, place, readout };
}

function picker(controls, title, options, chosen, changed) {
  const select = element("select");
  for (const option of options) select.append(element("option", { value: option }, option));
  select.value = chosen;
  select.addEventListener("change", changed);
  controls.append(element("label", {}, `${title} `, select));
  return select;
}

// ---- Charts ----

function curveChart(metric) {
  const { controls, place, readout } = chart(document.getElementById("curves"));
  const select = picker(controls, "Metric", data.metrics, metric, draw);
  const logarithmic = element("input", { type: "checkbox" });
  logarithmic.addEventListener("change", draw);
  controls.append(element("label", {}, logarithmic, " logarithmic"));

  function draw() {
    const name = select.value;
    const log = logarithmic.checked;
    const runs = data.runs.filter((run) => shown.has(run.name) && run.curves[name]);
    const points = (run) => run.curves[name].filter(([, value]) => !log || value > 0);
    const all = runs.flatMap(points);
    if (!all.length) {
      place.replaceChildren(element("p", { class: "empty" }, `no ${name} to show`));
      return;
    }
    const across = scale(all.map(([step]) => step), LEFT, WIDTH - RIGHT, false);
    const up = scale(all.map(([, value]) => value), HEIGHT - BOTTOM, TOP + 8, log);
    const svg = drawing("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "data-metric": name,
      "aria-label": `${name} by step of ${runs.length} runs; the table of runs has its numbers`,
    });
    axes(svg, across, up, "step", name);
    for (const run of runs) {
      const places = points(run).map(([step, value]) => [across.place(step), up.place(value)]);
      const group = watch(drawing("g", { class: "run" }), run.name);
      group.append(drawing("path", {
        class: "series", stroke: colour(run), "stroke-dasharray": dashes(run),
        d: places.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(2)},${y.toFixed(2)}`).join(""),
      }));
      const radius = places.length > 60 ? 1.2 : 2.4;
      points(run).forEach(([step, value], i) => {
        group.append(drawing("circle", {
          cx: places[i][0].toFixed(2), cy: places[i][1].toFixed(2), r: radius, fill: colour(run),
          "data-step": step, "data-value": value,
        }));
      });
      svg.append(group);
    }
    svg.addEventListener("mousemove", (event) => nearest(event, svg, runs));
    svg.addEventListener("mouseleave", () => { readout.textContent = ""; });
    place.replaceChildren(svg);
  }

  function nearest(event, svg) {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * WIDTH;
    const y = ((event.clientY - box.top) / box.height) * HEIGHT;
    let found = null;
    for (const point of svg.querySelectorAll("circle")) {
      const away = Math.hypot(point.cx.baseVal.value - x, point.cy.baseVal.value - y);
      if (!found || away < found.away) found = { away, point };
    }
    if (!found) return;
    const { step, value } = found.point.dataset;
    readout.textContent =
      `${found.point.parentNode.dataset.run}: ${select.value} ${format(Number(value))} at step ${step}`;
  }

  redraws.push(draw);
  draw();
}

// Two decades or more of positive numbers are told apart on a logarithmic axis alone.
function wantsLog(values) {
  const numbers = values.every((value) => typeof value === "number" && value > 0);
  return numbers && Math.max(...values) / Math.min(...values) >= 30;
}

function known(value) {
  return typeof value === "number" ? value : String(value);
}

function scatterChart(chosen) {
  const { controls, place, readout } = chart(document.getElementById("fields"));
  const select = picker(controls, "Field", data.fields, chosen, draw);

  function draw() {
    const field = select.value;
    const runs = data.runs.filter((run) => shown.has(run.name) && run.score !== null);
    if (!runs.length) {
      place.replaceChildren(element("p", { class: "empty" }, `no run shown has a ${data.score.name}`));
      return;
    }
    const values = runs.map((run) => known(run.fields[field]));
    const across = scale(values, LEFT + 14, WIDTH - RIGHT - 14, wantsLog(values));
    const up = scale(runs.map((run) => run.score), HEIGHT - BOTTOM - 6, TOP + 12, false);
    const svg = drawing("svg", {
      viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "data-scatter": field,
      "aria-label": `best ${data.score.name} against ${field} of ${runs.length} runs`,
    });
    axes(svg, across, up, field, `best ${data.score.name}`);
    runs.forEach((run, i) => {
      const point = watch(drawing("circle", {
        class: "run", cx: across.place(values[i]).toFixed(2), cy: up.place(run.score).toFixed(2), r: 5,
        fill: colour(run), "fill-opacity": 0.85,
      }), run.name);
      const text = `${run.name}: ${format(values[i])}, ${format(run.score)}`;
      point.append(drawing("title", {}, text));
      point.addEventListener("mouseenter", () => { readout.textContent = text; });
      svg.append(point);
    });
    place.replaceChildren(svg);
  }

  redraws.push(draw);
  draw();
}

function parallelChart() {
  const { controls, place, readout } = chart(document.getElementById("fields"), "chart wide");
  const fields = data.fields.slice(0, 9);
  const more = data.fields.length - fields.length;
  controls.append(element("span", { class: "readout" },
    `Parallel coordinates${more ? ` of the first ${fields.length} fields` : ""}: a line for each run`));

  function draw() {
    const runs = data.runs.filter((run) => shown.has(run.name) && run.score !== null);
    if (!runs.length) {
      place.replaceChildren(element("p", { class: "empty" }, `no run shown has a ${data.score.name}`));
      return;
    }
    const wide = 1240, top = 40, bottom = HEIGHT - 22;
    const lines = [
      ...fields.map((field) => ({ title: short(field), values: runs.map((run) => known(run.fields[field])) })),
      { title: `best ${data.score.name}`, values: runs.map((run) => run.score) },
    ];
    const svg = drawing("svg", {
      viewBox: `0 0 ${wide} ${HEIGHT}`, role: "img", "data-parallel": "",
      "aria-label": `fields and best ${data.score.name} of ${runs.length} runs as parallel coordinates`,
    });
    lines.forEach((line, i) => {
      line.x = 90 + (i / (lines.length - 1)) * (wide - 200);
      line.scale = scale(line.values, bottom, top, wantsLog(line.values));
    });
    runs.forEach((run, r) => {
      const places = lines.map((line) => `${line.x.toFixed(1)},${line.scale.place(line.values[r]).toFixed(2)}`);
      const path = watch(drawing("polyline", {
        class: "run series", points: places.join(" "), stroke: colour(run), "stroke-dasharray": dashes(run),
        "stroke-opacity": 0.8,
      }), run.name);
      path.append(drawing("title", {}, run.name));
      path.addEventListener("mouseenter", () => {
        readout.textContent = `${run.name}: ${lines.map((line) => `${line.title} ${format(line.values[r])}`).join(", ")}`;
      });
      svg.append(path);
    });
    lines.forEach((line) => {
      svg.append(
        drawing("line", { class: "axis", x1: line.x, x2: line.x, y1: top - 8, y2: bottom + 6 }),
        drawing("text", { x: line.x, y: 18, "text-anchor": "middle" }, line.title));
      for (const mark of line.scale.marks) {
        svg.append(drawing("text", { x: line.x + 6, y: line.scale.place(mark) + 4 }, format(mark)));
      }
    });
    place.replaceChildren(svg);
  }

  redraws.push(draw);
  draw();
}

function sampleGrids() {
  const place = document.getElementById("grids");
  const runs = data.runs.filter((run) => run.grid);
  document.getElementById("grids-section").hidden = !runs.length;
  function draw() {
    place.replaceChildren(...runs.filter((run) => shown.has(run.name)).map((run) => element("figure", {},
      element("img", { src: run.grid.source, alt: `samples of ${run.name} at step ${run.grid.step}` }),
      element("figcaption", {}, swatch(run), run.name, element("span", {}, ` step ${run.grid.step}`)))));
  }
  redraws.push(draw);
  draw();
}

describe();
runTable();
seedTable();
// The loss and the score, which come first.
for (const metric of data.metrics.slice(0, 2)) curveChart(metric);
document.getElementById("curves-section").hidden = !data.metrics.length;
if (data.fields.length) {
  const fields = [...data.fields].sort((one, other) => (one === "seed") - (other === "seed"));
  for (const field of fields.slice(0, 2)) scatterChart(field);
  parallelChart();
} else {
  document.getElementById("fields-section").hidden = true;
}
sampleGrids();
