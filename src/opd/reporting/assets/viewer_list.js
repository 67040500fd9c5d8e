// Which samples are listed, and in which order.

const EVERY = "";
const SORTS = [
  ["mean", "mean KL", (a, b) => (b.mean ?? -Infinity) - (a.mean ?? -Infinity) || b.step - a.step || a.n - b.n],
  ["total", "total KL", (a, b) => (b.total ?? -Infinity) - (a.total ?? -Infinity) || b.step - a.step || a.n - b.n],
  ["latest", "latest step", (a, b) => b.step - a.step || (b.mean ?? -Infinity) - (a.mean ?? -Infinity) || a.n - b.n],
];

// [name, label, options of the samples: [value, words], whether a sample passes a value].
const FILTERS = [
  ["by", "Author", (all) => present(all, (s) => s.by).map((by) => [by, AUTHORS[by]]), (s, value) => s.by === value],
  ["phase", "Phase", (all) => present(all, (s) => s.phase).map((phase) => [phase, phase === "eval" ? "evaluation" : "training"]), (s, value) => s.phase === value],
  ["step", "Step", (all) => present(all, (s) => s.step).sort((a, b) => a - b).map((step) => [String(step), String(step)]), (s, value) => String(s.step) === value],
  ["reward", "Answers", (all) => (all.some((s) => s.reward !== null) ? [["wrong", "wrong (reward ≤ 0)"], ["right", "right (reward > 0)"]] : []),
    (s, value) => s.reward !== null && s.isWrong === (value === "wrong")],
  ["end", "End", (all) => (all.some((s) => !s.finished) ? [["cut", "cut at the length limit"], ["finished", "finished"]] : []), (s, value) => s.finished === (value === "finished")],
  ["teacher", "Teacher", (all) => present(all, (s) => s.teacher).filter((name) => name !== null).map((name) => [name, name]), (s, value) => s.teacher === value],
];
const present = (all, read) => [...new Set(all.map(read))];

const makeFilters = (form, all, onChange) => {
  const chosen = Object.fromEntries(FILTERS.map(([name]) => [name, EVERY]));
  const selects = {};
  for (const [name, label, optionsOf] of FILTERS) {
    const options = optionsOf(all);
    if (options.length < 2 && !(name === "reward" || name === "end")) continue;
    if (!options.length) continue;
    const select = make("select", { id: `viewer-filter-${name}` }, make("option", { value: EVERY }, "all"), ...options.map(([value, words]) => make("option", { value }, words)));
    select.addEventListener("change", () => {
      chosen[name] = select.value;
      onChange();
    });
    selects[name] = select;
    form.append(make("label", {}, make("span", {}, label), select));
  }
  const search = make("input", { type: "search", id: "viewer-search", placeholder: "in prompts and responses" });
  search.addEventListener("input", onChange);
  form.append(make("label", { className: "viewer-find" }, make("span", {}, "Find"), search));
  form.addEventListener("submit", (event) => event.preventDefault());
  const set = (name, value) => {
    chosen[name] = value;
    if (selects[name]) selects[name].value = value;
  };
  if (all.some((s) => s.by === "student")) set("by", "student");
  const passes = (sample) => {
    const words = search.value.trim().toLowerCase();
    if (words && !`${sample.pieces.map(([text]) => text).join("")}\n${sample.words}`.toLowerCase().includes(words)) return false;
    return FILTERS.every(([name, , , isPassed]) => chosen[name] === EVERY || isPassed(sample, chosen[name]));
  };
  const clear = () => {
    search.value = "";
    for (const [name] of FILTERS) set(name, EVERY);
  };
  return { passes, clear };
};

const listRow = (sample, edges) => {
  const facts = [`step ${sample.step}`];
  if (sample.by !== "student") facts.push(AUTHORS[sample.by]);
  if (sample.teacher !== null) facts.push(sample.teacher);
  if (sample.reward !== null) facts.push(`reward ${number(sample.reward)}`);
  if (!sample.finished) facts.push("cut");
  facts.push(counted(sample.length, "token"));
  const kl = make("span", { className: `viewer-swatch ${sample.mean === null ? "" : `kl-${level(edges, sample.mean)}`}`, title: "Mean reverse KL, nats" }, fixed(sample.mean, 3));
  const words = make("span", { className: "viewer-brief" }, make("bdi", {}, sample.brief));
  const button = make("button", { type: "button" }, kl, make("span", { className: "viewer-row" }, words, make("span", { className: "note" }, facts.join(" · "))));
  button.dataset.n = sample.n;
  return make("li", {}, button);
};

// Samples of one prompt by one author, by step.
const stepsOf = (all, sample) => all.filter((s) => s.row === sample.row && s.by === sample.by).sort((a, b) => a.step - b.step || a.n - b.n);
// The teacher's own answer to the prompt: its last one by the sample's step, or else its first.
const teacherOf = (all, sample) => {
  if (sample.by === "teacher") return null;
  const own = all.filter((s) => s.row === sample.row && s.by === "teacher").sort((a, b) => a.step - b.step || a.n - b.n);
  return own.filter((s) => s.step <= sample.step).at(-1) ?? own[0] ?? null;
};
