// The samples of the page, and what can be said about one of their tokens. Log-probs and entropies are in nats.

const AUTHORS = { student: "student", teacher: "teacher", dataset: "data set" };

// An element with properties, attributes (names with a "-", and role) and children; text never becomes HTML.
const make = (tag, properties = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
};

const oneLine = (text) => text.replaceAll("\n", "");
const quoted = (text) => `'${oneLine(text)}'`;

const number = (value) => {
  if (value === null) return "–";
  const short = Math.abs(value) < 0.0005 ? 0 : Number(value.toPrecision(3));
  return String(short).replace("-", "−");
};

const fixed = (value, digits) => (value === null ? "–" : value.toFixed(digits).replace("-", "−"));

const percent = (share) => {
  if (share === null) return "–";
  if (share < 0.0001) return "<\u00a00.01%";
  const digits = share > 0.9995 || (share >= 0.1 && share < 0.99) ? 0 : share < 0.01 ? 2 : 1;
  return `${(100 * share).toFixed(digits)}%`;
};

const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const known = (values) => (values ?? []).filter((value) => value !== null);

class Sample {
  constructor(packed, data) {
    Object.assign(this, packed);
    this.texts = data.texts;
    this.pieces = data.prompts[packed.prompt].pieces;
    this.brief = data.prompts[packed.prompt].brief;
    const kl = known(this.reverse_kl);
    this.total = kl.length ? kl.reduce((sum, value) => sum + value, 0) : null;
    this.mean = kl.length ? this.total / kl.length : null;
    this.parts = new Map();
    for (const [first, end, text] of this.joined ?? []) {
      for (let i = first; i < end; i++) this.parts.set(i, { part: i - first + 1, of: end - first, text: this.texts[text] });
    }
  }

  get length() {
    return this.tokens.length;
  }
  get isWrong() {
    return this.reward !== null && this.reward <= 0;
  }
  get title() {
    return `${AUTHORS[this.by][0].toUpperCase()}${AUTHORS[this.by].slice(1)}, step ${this.step}`;
  }
  get words() {
    return this.length ? this.tokens.map((_, i) => this.drawn(i)).join("") : this.response;
  }

  // The text of a token as it is drawn: the first part of a character shows the whole, the others a mark.
  drawn(i) {
    const part = this.parts.get(i);
    if (!part) return this.texts[this.tokens[i]];
    return part.part === 1 ? part.text : "◂";
  }
  // The token in words: ' 24', or "part 1 of 2 of 🙂".
  named(i) {
    const part = this.parts.get(i);
    return part ? `part ${part.part} of ${part.of} of ${oneLine(part.text)}` : quoted(this.texts[this.tokens[i]]);
  }
  kl(i) {
    return this.reverse_kl?.[i] ?? null;
  }
  nats(name, i) {
    const value = this[name]?.[i] ?? null;
    return value === null ? null : value / 1000;
  }
  difference(i) {
    const [student, teacher] = [this.nats("student_logp", i), this.nats("teacher_logp", i)];
    return student === null || teacher === null ? null : teacher - student;
  }
  // [{id, text, share}], most likely first, the sampled token always among them where its probability is known.
  likeliest(who, i) {
    const row = this[`${who}_top`]?.[i];
    if (!row) return null;
    const found = [];
    for (let k = 0; k < row.length; k += 2) found.push({ id: row[k], text: this.texts[row[k]], share: row[k + 1] / 10000 });
    const own = found.find((entry) => entry.id === this.tokens[i]);
    const logp = this.nats(`${who}_logp`, i);
    if (own) own.sampled = true;
    else if (logp !== null) {
      found.push({ id: this.tokens[i], text: this.texts[this.tokens[i]], share: Math.exp(logp), sampled: true, below: true });
    }
    return found;
  }
  // The token that the teacher holds likeliest: {id, text, share}.
  wanted(i) {
    const row = this.teacher_top?.[i];
    return row?.length ? { id: row[0], text: this.texts[row[0]], share: row[1] / 10000 } : null;
  }
  // Positions from the highest reverse KL to the lowest.
  get order() {
    this._order ??= [...this.tokens.keys()].filter((i) => this.kl(i) !== null).sort((a, b) => this.kl(b) - this.kl(a) || a - b);
    return this._order;
  }
  rank(i) {
    this._ranks ??= new Map(this.order.map((position, rank) => [position, rank]));
    return this._ranks.get(i) ?? null;
  }
  label(i) {
    const words = [`token ${i + 1}`, this.named(i)];
    const kl = this.kl(i);
    words.push(kl === null ? "no reverse KL recorded" : `reverse KL ${number(kl)} nats`);
    const wanted = this.wanted(i);
    if (wanted) words.push(`the teacher's first choice is ${quoted(wanted.text)} ${percent(wanted.share)}`);
    return words.join(", ");
  }
}

// What a colour scale measures at a token; null where the record lacks it.
const MEASURES = {
  kl: (sample, i) => sample.kl(i),
  difference: (sample, i) => sample.difference(i),
  entropy: (sample, i) => sample.nats("student_entropy", i),
  relative: (sample, i) => (sample.rank(i) === null ? null : 1 - (sample.rank(i) + 1) / sample.order.length),
};
const level = (edges, value) => edges.filter((edge) => value >= edge).length;
const colourOf = (scale, sample, i) => {
  const value = MEASURES[scale.key](sample, i);
  return value === null ? "" : `${scale.css}-${level(scale.edges, value)}`;
};
