// What both models said at one token: a sentence, two small charts, and the numbers.

const showBars = (sample, who, i) => {
  const rows = sample.likeliest(who, i);
  const title = who === "teacher" ? "Teacher" : "Student";
  if (!rows) return make("div", { className: "viewer-bars" }, make("h4", {}, title), make("p", { className: "note" }, missingBars(sample)));
  const list = make("ol", { "aria-label": `${title}: the likeliest tokens` });
  for (const { text, share, sampled, below } of rows) {
    const bar = make("span", { className: "viewer-bar" });
    bar.append(make("span", { className: `viewer-fill ${who}` }));
    bar.firstChild.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
    const name = make("span", { className: "viewer-name" }, make("bdi", {}, quoted(text)));
    const row = make("li", { className: `${sampled ? "sampled" : ""}${below ? " below" : ""}` }, name, bar);
    row.append(make("span", { className: "viewer-share" }, percent(share)));
    if (sampled) row.title = below ? "The sampled token, which is not among the five likeliest" : "The sampled token";
    list.append(row);
  }
  return make("div", { className: "viewer-bars" }, make("h4", {}, title), list);
};

const missingBars = (sample) =>
  sample.teacher_top || sample.student_top
    ? "Its likeliest tokens are not on this page, to keep it small; samples.jsonl may hold them."
    : "The likeliest tokens were not recorded.";

const showNumbers = (sample, i) => {
  const writers = ["student", "teacher", "sampler"];
  const logps = writers.map((who) => sample.nats(`${who}_logp`, i));
  const entropies = [sample.nats("student_entropy", i), sample.nats("teacher_entropy", i), null];
  const row = (name, values, show) =>
    make("tr", {}, make("th", { scope: "row" }, name), ...values.map((value) => make("td", {}, show(value))));
  const head = make("tr", {}, make("td", {}), ...writers.map((who) => make("th", { scope: "col" }, who)));
  const table = make("table", {}, make("thead", {}, head), make("tbody", {},
    row("probability", logps.map((value) => (value === null ? null : Math.exp(value))), percent),
    row("log-prob, nats", logps, number),
    row("entropy, nats", entropies, number)));
  const difference = sample.difference(i);
  const box = make("div", { className: "viewer-numbers" }, make("h4", {}, "The sampled token"));
  if (logps.some((value) => value !== null) || entropies.some((value) => value !== null)) box.append(table);
  else box.append(make("p", { className: "note" }, "This record holds no log-probs, entropies or likeliest tokens: it was written by an older version of opd, or without token details."));
  if (difference !== null) box.append(make("p", { className: "note viewer-difference" }, `teacher − student: ${difference > 0 ? "+" : ""}${number(difference)} nats`));
  return box;
};

// "The teacher wanted ' 42' (81%). The student sampled ' 24', to which the teacher gives 0.3%.", tokens isolated.
const sentence = (sample, i) => {
  const wanted = sample.wanted(i);
  const token = make("bdi", {}, sample.named(i));
  const writer = { student: "The student sampled ", teacher: "The teacher sampled ", dataset: "The data set has " }[sample.by];
  if (!wanted) return [writer, token, "."];
  const logp = sample.nats("teacher_logp", i);
  if (wanted.id === sample.tokens[i]) return [writer, token, `, which the teacher, too, holds likeliest (${percent(wanted.share)}).`];
  const gives = logp === null ? "." : `, to which the teacher gives ${percent(Math.exp(logp))}.`;
  return ["The teacher wanted ", make("bdi", { className: "wanted" }, quoted(wanted.text)), ` (${percent(wanted.share)}). ${writer}`, token, gives];
};

const showPanel = (panel, sample, i, scale, actions) => {
  const rank = sample.rank(i);
  const cost = sample.kl(i) === null ? "no reverse KL recorded" : `reverse KL ${number(sample.kl(i))} nats`;
  const place = `${cost} · token ${(i + 1).toLocaleString("en")} of ${sample.length.toLocaleString("en")}`;
  const worst = rank === null ? "" : ` · ${rank === 0 ? "the costliest" : `number ${rank + 1} by cost`}`;
  const token = make("span", { className: `viewer-token ${colourOf(scale, sample, i)}` }, make("bdi", {}, sample.named(i)));
  const link = make("a", { href: `#sample-${sample.n}-token-${i + 1}`, className: "viewer-link", title: "A link to this token" }, "link");
  const button = (text, label, act, isOff = false) => make("button", { type: "button", "aria-label": label, title: label, onclick: act, disabled: isOff }, text);
  const tools = make("span", { className: "viewer-tools" }, link,
    button("‹ p", "Previous worst token (p)", () => actions.worst(-1), rank === 0),
    button("n ›", "Next worst token (n)", () => actions.worst(1), rank === sample.order.length - 1),
    button("×", "Close (Escape)", actions.close));
  const head = make("header", {}, token, make("span", { className: "viewer-place" }, place + worst), tools);
  const words = make("p", { className: "viewer-sentence", "aria-live": "polite" }, ...sentence(sample, i));
  const body = make("div", { className: "viewer-charts" }, showBars(sample, "teacher", i), showBars(sample, "student", i), showNumbers(sample, i));
  panel.replaceChildren(head, words, body);
  panel.classList.add("open");
};

const clearPanel = (panel) => {
  panel.classList.remove("open");
  panel.replaceChildren(make("p", { className: "viewer-empty" }, "Click a token to see what the teacher wanted instead, or press ", make("kbd", {}, "n"), " for the costliest one."));
};
