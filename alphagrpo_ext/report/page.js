"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const GROUPS_AT_ONCE = 8;
const PAIRS_AT_ONCE = 12;
const PASS = 0.5;
const REWARD_TOLERANCE = 0.01;
const byId = (id) => document.getElementById(id);

// Text is inserted as text nodes only, so that markup in a prompt stays text.
function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function svgElement(name, attributes = {}, text = null) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "none";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(1);
  return String(Number(value.toFixed(size >= 100 ? 1 : digits)));
}

const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const signed = (value, digits = 2) => (value >= 0 ? "+" : "−") + Math.abs(value).toFixed(digits);
const tone = (change) => (Math.abs(change) < REWARD_TOLERANCE ? "even" : change > 0 ? "good" : "bad");
const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
const count = (n, noun, plural = `${noun}s`) => `${n} ${n === 1 ? noun : plural}`;

/* Images */

const waiting = new Map();

function showImage(image) {
  const source = byId(`image-${waiting.get(image)}`);
  // The element follows this script in the file, and the browser may not have read it yet.
  if (!source) return;
  waiting.delete(image);
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth <= 64), { once: true });
  image.src = source.textContent;
}

// Images below the window, too: paper and pictures of the whole page do not scroll.
document.addEventListener("DOMContentLoaded", () => [...waiting.keys()].forEach(showImage));

function picture(place, alt, extraClass = "") {
  const image = element("img", { alt, class: extraClass, decoding: "async", width: 256, height: 256 });
  waiting.set(image, place);
  showImage(image);
  return image;
}

function forgetImages(container) {
  for (const image of container.querySelectorAll("img")) waiting.delete(image);
  container.replaceChildren();
}

function compared(first, second, names, subject) {
  const frame = element("div", { class: "picture" });
  const edge = element("span", { class: "edge" });
  const labels = names.map((name) => element("span", { class: "half" }, name));
  const range = element("input", { type: "range", min: 0, max: 100, value: 50, "aria-label": `Boundary between the ${names[0]} and the ${names[1]} image: ${subject}` });
  const update = () => {
    // The edge is above the thumb of the slider. On each side of it is the image that is named there.
    frame.style.setProperty("--split", `${range.value}%`);
    edge.hidden = range.value === "0" || range.value === "100";
    labels[0].classList.toggle("covered", range.value === "0");
    labels[1].classList.toggle("covered", range.value === "100");
    range.setAttribute("aria-valuetext", `${range.value}% ${names[0]} image`);
  };
  const show = (value) => {
    range.value = value;
    update();
  };
  const whole = [first, second].map((image, i) => {
    const button = element("button", { type: "button", class: "whole", "aria-label": `Show the whole ${names[i]} image: ${subject}` }, picture(image, `whole ${names[i]} image`), names[i]);
    button.addEventListener("click", () => show(i === 0 ? 100 : 0));
    return button;
  });
  frame.append(
    picture(first, `${names[0]} image: ${subject}`, "top"),
    picture(second, `${names[1]} image: ${subject}`),
    edge,
    ...labels
  );
  range.addEventListener("input", update);
  frame.addEventListener("click", () => show(range.value < 50 ? 100 : 0));
  update();
  return [frame, element("div", { class: "slider" }, range, ...whole)];
}

/* Curves */

const WIDTH = 320, HEIGHT = 150, LEAST_LEFT = 46, LABEL_GAP = 5, RIGHT = 8, TOP = 10, BOTTOM = 24;

function ticks(low, high, most) {
  const raw = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw * 0.999);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-6); i * step <= high + step * 1e-6; i += 1) values.push(i * step);
  return values;
}

function bounds(chart) {
  const values = chart.series.flatMap((series) => series.points.map((point) => point[1]));
  let low = Math.min(...values), high = Math.max(...values);
  // A constant line gets an axis around its value. Any other line fills its axis.
  const size = Math.max(Math.abs(low), Math.abs(high)) || 1;
  const least = high - low < size * 1e-6 ? size * 0.1 : high - low;
  if (high - low < least) [low, high] = [low - least / 2, high + least / 2];
  const margin = (high - low) * 0.08;
  [low, high] = [low - margin, high + margin];
  if (chart.lower !== null) low = Math.max(low, chart.lower);
  if (chart.upper !== null) high = Math.min(high, chart.upper);
  return low < high ? [low, high] : [low - least / 2, high + least / 2];
}

function axisLabel(value, step) {
  if (Math.abs(value) < step * 1e-6) return "0";
  if (Math.abs(value) >= 1e5 || step < 1e-6) {
    const digits = Math.floor(Math.log10(Math.abs(value)) + 1e-9) - Math.floor(Math.log10(step) + 1e-9);
    return value.toExponential(Math.max(0, Math.min(6, digits)));
  }
  const decimals = -Math.floor(Math.log10(step) + 1e-9);
  return value.toFixed(Math.max(0, Math.abs(step * 10 ** decimals - 2.5) < 1e-6 ? decimals + 1 : decimals));
}

const pen = document.createElement("canvas").getContext("2d");
pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
const textWidth = (text) => pen.measureText(text).width;

// All charts have the same horizontal axis.
const [FIRST, LAST] = data.charts.flatMap((chart) => chart.series.flatMap((series) => series.points.map((point) => point[0])))
  .reduce(([low, high], step) => [Math.min(low, step), Math.max(high, step)], [Infinity, -Infinity]);

function drawChart(chart) {
  const steps = [...new Set(chart.series.flatMap((series) => series.points.map((point) => point[0])))].sort((a, b) => a - b);
  const [low, high] = bounds(chart);
  const yTicks = ticks(low, high, 4);
  const gap = yTicks.length > 1 ? yTicks[1] - yTicks[0] : high - low;
  const yLabels = yTicks.map((value) => axisLabel(value, gap));
  const LEFT = Math.max(LEAST_LEFT, ...yLabels.map((label) => Math.ceil(textWidth(label)) + LABEL_GAP + 1));
  const x = (step) => LEFT + (FIRST === LAST ? 0.5 : (step - FIRST) / (LAST - FIRST)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = svgElement("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, tabindex: 0, role: "slider", "aria-valuemin": steps[0], "aria-valuemax": steps[steps.length - 1] });
  for (const [i, value] of yTicks.entries()) {
    svg.append(svgElement("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(svgElement("text", { x: LEFT - LABEL_GAP, y: y(value) + 4, "text-anchor": "end" }, yLabels[i]));
  }
  svg.append(svgElement("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  const most = Math.max(1, Math.min(5, Math.floor((WIDTH - LEFT - RIGHT) / (textWidth(LAST) + 14))));
  const xTicks = FIRST === LAST ? [FIRST] : ticks(FIRST, LAST, most).filter(Number.isInteger);
  for (const value of xTicks) {
    const middle = Math.min(x(value), WIDTH - textWidth(value) / 2 - 1);
    svg.append(svgElement("text", { x: middle, y: HEIGHT - BOTTOM + 15, "text-anchor": "middle" }, value));
  }
  chart.series.forEach((series, place) => {
    const path = series.points.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
    svg.append(svgElement("path", { class: `series-${place}`, d: path }));
    if (series.points.length === 1) {
      const [[step, value]] = series.points;
      svg.append(svgElement("circle", { class: `series-${place}`, cx: x(step), cy: y(value), r: 3 }));
    }
  });
  const cursor = svgElement("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  const readout = element("div", { class: "readout" });
  const lookup = chart.series.map((series) => new Map(series.points));
  let place = steps.length - 1;

  function read(marked) {
    const step = steps[place];
    const values = lookup.map((points, i) => [i, points.get(step)]).filter(([, value]) => value !== undefined);
    readout.replaceChildren(element("span", {}, `step ${step}`), ...values.map(([i, value]) =>
      element("span", {}, element("span", { class: `swatch series-${i}` }), `${chart.series[i].name} `, element("b", {}, number(value, 4)))));
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", marked ? "visible" : "hidden");
    svg.setAttribute("aria-valuenow", step);
    svg.setAttribute("aria-valuetext", `step ${step}: ${values.map(([i, value]) => `${chart.series[i].name} ${number(value, 4)}`).join(", ")}`);
  }

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const at = ((event.clientX - frame.left) / frame.width) * WIDTH;
    place = steps.reduce((best, step, i) => (Math.abs(x(step) - at) < Math.abs(x(steps[best]) - at) ? i : best), 0);
    read(true);
  });
  const rest = () => { place = steps.length - 1; read(false); };
  svg.addEventListener("pointerleave", rest);
  svg.addEventListener("blur", rest);
  svg.addEventListener("focus", () => read(true));
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: place - 1, ArrowDown: place - 1, ArrowRight: place + 1, ArrowUp: place + 1, Home: 0, End: steps.length - 1 };
    if (!(event.key in moves)) return;
    event.preventDefault();
    place = Math.max(0, Math.min(steps.length - 1, moves[event.key]));
    read(true);
  });
  svg.setAttribute("aria-label", `${chart.title}, by step`);
  read(false);
  const caption = element("figcaption", {}, chart.title, chart.note ? element("small", {}, chart.note) : "");
  return element("figure", { class: "chart" }, caption, svg, readout);
}

function drawCurves() {
  const sections = new Map();
  for (const chart of data.charts) sections.set(chart.section, [...(sections.get(chart.section) || []), chart]);
  byId("no-curves").hidden = data.charts.length > 0;
  for (const [title, charts] of sections) {
    const grid = element("div", { class: "charts" });
    const closed = title === "Others" || title === "Optimization";
    const frame = closed
      ? element("details", { class: "section" }, element("summary", {}, `${title} (${charts.length})`), grid)
      : element("div", {}, element("h3", {}, title), grid);
    if (closed) frame.addEventListener("toggle", () => grid.append(...charts.map(drawChart)), { once: true });
    else grid.append(...charts.map(drawChart));
    byId("charts").append(frame);
  }
}

function drawNumbers() {
  const wanted = ["Reward", "Refinement: reward of the image", "Share of images that pass every question", "Mean ratio of images"];
  for (const title of wanted) {
    const chart = data.charts.find((candidate) => candidate.title === title);
    for (const series of chart ? chart.series : []) {
      const values = series.points.map((point) => point[1]);
      const name = chart.series.length > 1 ? `${title}, ${series.name}` : title;
      const change = values[values.length - 1] - values[0];
      const value = element("dd", {}, fixed(values[values.length - 1], title.includes("ratio") ? 5 : 3));
      if (values.length > 1 && !title.includes("ratio")) {
        value.append(" ", element("small", { class: change === 0 ? "muted" : change > 0 ? "good" : "bad" }, signed(change, 3)));
      }
      byId("numbers").append(element("div", {}, element("dt", {}, name), value));
    }
  }
}

/* Trajectories */

const worseThanGiven = (trajectory) => trajectory.reward !== null && trajectory.given_reward !== null && trajectory.reward < trajectory.given_reward - REWARD_TOLERANCE;
const groupReward = (group) => mean(group.trajectories.map((t) => t.reward).filter((reward) => reward !== null));
const worseThanEarlier = (group) => group.earlier_reward !== null && groupReward(group) !== null && groupReward(group) < group.earlier_reward - REWARD_TOLERANCE;

function questions(answers) {
  if (!answers.length) return [];
  const failed = answers.filter((answer) => answer.p_yes !== null && answer.p_yes < PASS);
  const passed = answers.filter((answer) => answer.p_yes !== null && answer.p_yes >= PASS).length;
  const list = element("ul", {}, ...answers.map((answer) => {
    const color = answer.p_yes === null ? "" : answer.p_yes < PASS ? "bad" : "good";
    return element("li", {}, element("b", { class: color }, fixed(answer.p_yes)),
      element("span", {}, answer.question, " ", element("small", {}, `${answer.tag}, ${answer.kind}`)));
  }));
  const tags = [...new Set(failed.map((answer) => answer.tag))];
  return [
    tags.length ? element("ul", { class: "failed-tags", "aria-label": "Tags of questions that were answered no" }, ...tags.map((tag) => element("li", { class: "badge bad" }, tag))) : null,
    element("details", { class: "questions" }, element("summary", {}, `${passed} of ${count(answers.length, "question")} answered yes`), list),
  ];
}

// The label already says that this is a thought.
const withoutTags = (text) => text.trim().replace(/^<think>([^]*)<\/think>$/, "$1").trim();

function textBlock(label, text) {
  text = withoutTags(text);
  return text ? element("p", { class: "text" }, element("span", {}, `${label} `), text) : null;
}

function trajectoryCard(group, trajectory) {
  const lastTurn = trajectory.turns[trajectory.turns.length - 1];
  const given = trajectory.given_image;
  const refines = given !== null && group.task !== "image_editing";
  const card = element("article", { class: "card" });
  if (given !== null) card.append(...compared(given, lastTurn.image, refines ? ["initial", "refined"] : ["given", "edited"], group.prompt));
  else if (trajectory.turns.length > 1) card.append(...compared(trajectory.turns[0].image, lastTurn.image, ["first", "last"], group.prompt));
  else card.append(element("div", { class: "picture" }, picture(lastTurn.image, `Image: ${group.prompt}`)));
  const advantage = element("p", { class: "facts advantage" },
    element("span", {}, "advantage ", element("b", { class: trajectory.image_advantage >= 0 ? "good" : "bad" }, signed(trajectory.image_advantage))));
  if (Math.abs(trajectory.advantage - trajectory.image_advantage) > 1e-6) {
    advantage.append(element("span", { class: "muted" }, `text ${signed(trajectory.advantage)}`));
  }
  const before = trajectory.given_reward === null ? "reward " : `reward ${fixed(trajectory.given_reward)} → `;
  const facts = element("p", { class: "facts" }, element("span", {}, before, element("b", {}, fixed(trajectory.reward))));
  if (worseThanGiven(trajectory)) facts.append(element("span", { class: "badge bad" }, "got worse"));
  card.append(advantage);
  card.append(facts);
  const label = refines ? "Reflection:" : "Thought:";
  trajectory.turns.forEach((turn, i) => {
    const block = textBlock(trajectory.turns.length > 1 ? `${label.slice(0, -1)} ${i + 1}:` : label, turn.text);
    if (block) card.append(block);
  });
  const names = Object.entries(trajectory.rewards);
  if (names.length > 1) card.append(element("p", { class: "muted" }, "Trained on: ", names.map(([name, value]) => `${name} ${fixed(value)}`).join(" · ")));
  card.append(...questions(trajectory.answers).filter((part) => part !== null));
  return card;
}

function groupSection({ group, trajectories }) {
  const reward = groupReward(group);
  const facts = element("p", { class: "muted" }, `step ${group.step} · ${group.task.replaceAll("_", " ")} · mean reward ${fixed(reward)}`);
  if (trajectories.length < group.trajectories.length) facts.append(` · ${trajectories.length} of ${group.trajectories.length} shown`);
  if (group.earlier_reward !== null) {
    facts.append(` · in step ${group.earlier_step} the mean was ${fixed(group.earlier_reward)} `);
    if (worseThanEarlier(group)) facts.append(element("span", { class: "badge bad" }, "got worse"));
  }
  const head = element("div", { class: "head" }, element("div", {}, element("h3", {}, group.prompt), facts));
  // The trajectories of a group refine the same image.
  const given = group.trajectories[0].given_image;
  if (given !== null) head.prepend(element("div", { class: "picture" }, picture(given, `Given image: ${group.prompt}`)));
  return element("section", { class: "group" }, head,
    element("div", { class: "cards" }, ...trajectories.map((trajectory) => trajectoryCard(group, trajectory))));
}

function option(value, text) {
  return element("option", { value }, text);
}

function matching() {
  const tag = byId("tag").value, answer = byId("answer").value, task = byId("task").value;
  const step = byId("step").value, worse = byId("worse").checked, words = byId("words").value.trim().toLowerCase();

  function answers(trajectory) {
    return tag === "" && answer === "any" || trajectory.answers.some((a) => {
      const fits = answer === "any" || (a.p_yes !== null && (a.p_yes >= PASS) === (answer === "yes"));
      return fits && (tag === "" || a.tag === tag);
    });
  }

  const orders = {
    newest: (a, b) => b.group.step - a.group.step,
    oldest: (a, b) => a.group.step - b.group.step,
    advantage: (a, b) => b.trajectories[0].image_advantage - a.trajectories[0].image_advantage,
    spread: (a, b) => spread(b.group) - spread(a.group),
    lowest: (a, b) => (groupReward(a.group) ?? Infinity) - (groupReward(b.group) ?? Infinity),
  };
  return data.groups
    .filter((group) => (task === "" || group.task === task) && (step === "" || String(group.step) === step))
    .map((group) => ({
      group,
      trajectories: group.trajectories.filter((trajectory) =>
        answers(trajectory) &&
        (!worse || worseThanGiven(trajectory) || worseThanEarlier(group)) &&
        (words === "" || [group.prompt, ...trajectory.turns.map((turn) => turn.text)].some((text) => text.toLowerCase().includes(words)))),
    }))
    .filter((found) => found.trajectories.length)
    .sort(orders[byId("order").value]);
}

function spread(group) {
  const rewards = group.trajectories.map((t) => t.reward).filter((reward) => reward !== null);
  return rewards.length ? Math.max(...rewards) - Math.min(...rewards) : 0;
}

let found = [], shown = 0;

function showMoreGroups() {
  const part = found.slice(shown, shown + GROUPS_AT_ONCE);
  byId("groups").append(...part.map(groupSection));
  shown += part.length;
  byId("more").hidden = shown >= found.length;
}

function showGroups() {
  forgetImages(byId("groups"));
  found = matching();
  shown = 0;
  const trajectories = found.reduce((sum, { trajectories }) => sum + trajectories.length, 0);
  byId("count").textContent = data.groups.length
    ? `${count(trajectories, "trajectory", "trajectories")} in ${count(found.length, "group")}`
    : "There are no trajectories yet.";
  showMoreGroups();
}

function prepareGallery() {
  const tags = [...new Set(data.groups.flatMap((group) => group.trajectories.flatMap((t) => t.answers.map((a) => a.tag))))].sort();
  const tasks = [...new Set(data.groups.map((group) => group.task))].sort();
  const steps = [...new Set(data.groups.map((group) => group.step))].sort((a, b) => b - a);
  byId("tag").append(option("", "all"), ...tags.map((tag) => option(tag, tag)));
  byId("task").append(option("", "all"), ...tasks.map((task) => option(task, task.replaceAll("_", " "))));
  byId("step").append(option("", "all"), ...steps.map((step) => option(step, step)));
  byId("filters").addEventListener("input", showGroups);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  // The fields keep their old values until the event has been handled.
  byId("filters").addEventListener("reset", () => setTimeout(showGroups));
  byId("more").addEventListener("click", showMoreGroups);
  showGroups();
}

/* Before and after */

function pairCard(pair) {
  const change = pair.reward_after - pair.reward_before;
  return element("article", { class: "card" },
    ...compared(pair.before.image, pair.after.image, ["before", "after"], pair.prompt),
    element("p", { class: "facts" },
      element("span", {}, `reward ${fixed(pair.reward_before)} → `, element("b", {}, fixed(pair.reward_after))),
      element("span", { class: `badge ${tone(change)}` }, signed(change))),
    element("p", { class: "prompt" }, pair.prompt),
    textBlock("Before:", pair.before.text),
    textBlock("After:", pair.after.text));
}

let foundPairs = [], shownPairs = 0;

function showMorePairs() {
  const part = foundPairs.slice(shownPairs, shownPairs + PAIRS_AT_ONCE);
  byId("pairs").append(...part.map(pairCard));
  shownPairs += part.length;
  byId("more-pairs").hidden = shownPairs >= foundPairs.length;
}

function showPairs() {
  const change = (pair) => pair.reward_after - pair.reward_before;
  const orders = { given: () => 0, gain: (a, b) => change(b) - change(a), loss: (a, b) => change(a) - change(b) };
  const category = byId("category").value, worse = byId("comparison-worse").checked;
  forgetImages(byId("pairs"));
  foundPairs = data.comparison.pairs
    .filter((pair) => (category === "" || pair.category === category) && (!worse || change(pair) < -REWARD_TOLERANCE))
    .sort(orders[byId("comparison-order").value]);
  shownPairs = 0;
  byId("comparison-count").textContent = `${count(foundPairs.length, "pair")} of images with the same prompt and noise`;
  showMorePairs();
}

// A column "<metric> before" begins the columns of a metric. A narrow screen shows the cells of a metric below each other.
function scoreColumns(header) {
  const metrics = [];
  return header.map((title) => {
    const [, name, note] = title.match(/^(.*?)(?: \((\*.*)\))?$/);
    const metric = name.match(/^(.*) before$/);
    if (metric) metrics.push(metric[1]);
    return { name, note, metric: metrics.length, heading: metric ? metric[1] : "", label: metric ? "before" : name };
  });
}

function drawScores({ header, rows, note: legend }) {
  const columns = scoreColumns(header);
  const title = ({ name, note, metric, heading }) =>
    element("th", { scope: "col", class: `metric-${metric}${heading ? " first" : ""}`, "data-heading": heading }, name, note ? "*" : "");
  const cell = (text, { label, metric }) =>
    element("td", { class: `metric-${metric}${label === "change" ? " change" : ""}`, "data-label": label }, text);
  byId("scores").append(
    element("thead", {}, element("tr", {}, ...columns.map(title))),
    element("tbody", {}, ...rows.map(([name, ...cells]) =>
      element("tr", {}, element("th", { scope: "row" }, name), ...cells.map((text, i) => cell(text, columns[i + 1]))))));
  const notes = columns.flatMap(({ note }) => (note ? [note] : []));
  byId("scores-note").textContent = [...notes, legend].filter(Boolean).join(". ");
  byId("scores-note").hidden = !byId("scores-note").textContent;
}

function prepareComparison() {
  if (!data.comparison) return;
  byId("comparison").hidden = byId("comparison-link").hidden = false;
  drawScores(data.comparison.table);
  const categories = [...new Set(data.comparison.pairs.map((pair) => pair.category))];
  byId("category").append(option("", "all"), ...categories.map((category) => option(category, category.replaceAll("_", " "))));
  byId("comparison-filters").addEventListener("input", showPairs);
  byId("comparison-filters").addEventListener("submit", (event) => event.preventDefault());
  byId("more-pairs").addEventListener("click", showMorePairs);
  showPairs();
}

/* The run */

function drawSettings(id, settings) {
  byId(id).append(element("tbody", {}, ...Object.entries(settings).map(([name, value]) =>
    element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, value)))));
}

function drawRun() {
  if (!data.run) return;
  byId("run").hidden = byId("run-link").hidden = false;
  byId("command").textContent = data.run.command;
  drawSettings("versions", data.run.versions);
  for (const id of ["changed", "unchanged"]) {
    drawSettings(id, data.run[id]);
    byId(`${id}-count`).textContent = Object.keys(data.run[id]).length;
  }
}

/* Paper */

// Paper does not scroll and has nothing to click: all pairs, their images, and how the run was started are there at once.
function preparePrint() {
  while (shownPairs < foundPairs.length) showMorePairs();
  for (const details of document.querySelectorAll("details[data-print]")) {
    details.dataset.print = details.open ? "was open" : "";
    details.open = true;
  }
}

function restoreScreen() {
  for (const details of document.querySelectorAll("details[data-print]")) details.open = details.dataset.print === "was open";
}

window.addEventListener("beforeprint", preparePrint);
window.addEventListener("afterprint", restoreScreen);

document.title = `${data.title}: training report`;
byId("title").textContent = data.title;
byId("summary").textContent = `step ${data.step} · written ${data.written.replace("T", " ").replace("+00:00", " UTC")}`;
drawNumbers();
prepareComparison();
prepareGallery();
drawCurves();
drawRun();
