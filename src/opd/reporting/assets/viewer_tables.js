// The tokens that cost most, over many samples: by their text, and by their place.

const ROWS = 8;

const costByToken = (samples) => {
  const found = new Map();
  for (const sample of samples) {
    for (let i = 0; i < sample.length; i++) {
      const kl = sample.kl(i);
      if (kl === null) continue;
      const part = sample.parts.get(i);
      const key = part ? sample.named(i) : sample.tokens[i];
      if (!found.has(key)) found.set(key, { name: sample.named(i), count: 0, total: 0, worst: null, wanted: new Map(), hasTops: false });
      const entry = found.get(key);
      add(entry, sample, i, kl);
      const wanted = sample.wanted(i);
      if (!wanted) continue;
      entry.hasTops = true;
      if (wanted.id === sample.tokens[i]) continue;
      const choice = entry.wanted.get(wanted.id) ?? { text: wanted.text, count: 0, share: 0 };
      choice.count++;
      choice.share += wanted.share;
      entry.wanted.set(wanted.id, choice);
    }
  }
  return [...found.values()].sort((a, b) => b.total - a.total);
};

const add = (entry, sample, i, kl) => {
  entry.count++;
  entry.total += kl;
  if (!entry.worst || kl > entry.worst.kl) entry.worst = { sample, i, kl };
};

// Buckets that double: 1, 2–3, 4–7, 8–15, …
const costByPosition = (samples) => {
  const found = [];
  for (const sample of samples) {
    for (let i = 0; i < sample.length; i++) {
      const kl = sample.kl(i);
      if (kl === null) continue;
      const bucket = Math.floor(Math.log2(i + 1));
      found[bucket] ??= { name: positions(bucket), count: 0, total: 0, worst: null };
      add(found[bucket], sample, i, kl);
    }
  }
  return found.filter(Boolean);
};
const positions = (bucket) => (bucket ? `${(2 ** bucket).toLocaleString("en")} – ${(2 ** (bucket + 1) - 1).toLocaleString("en")}` : "1");

const wantedCell = ({ wanted, hasTops, count }) => {
  if (!hasTops) return make("td", { className: "viewer-wanted note" }, "not recorded");
  const best = [...wanted.values()].sort((a, b) => b.count - a.count || b.share - a.share)[0];
  if (!best) return make("td", { className: "viewer-wanted note" }, "the same token");
  const cell = make("td", { className: "viewer-wanted" }, make("bdi", { className: "viewer-token" }, quoted(best.text)));
  cell.append(make("span", { className: "viewer-share" }, percent(best.share / best.count)), make("span", { className: "note" }, `${best.count.toLocaleString("en")}×`));
  cell.title = `Its first choice in ${best.count} of ${count}, with a mean probability of ${percent(best.share / best.count)}`;
  return cell;
};

const amountCell = (value, most, digits) => {
  const bar = make("span", { className: "viewer-amount" }, make("span", { className: "viewer-fill cost" }));
  bar.firstChild.style.width = `${most > 0 ? Math.max(0, (100 * value) / most) : 0}%`;
  return make("td", { className: "viewer-total" }, bar, make("span", {}, fixed(value, digits)));
};

const tableRows = (entries, scale, open, isByToken) => {
  const most = Math.max(...entries.map((entry) => (isByToken ? entry.total : entry.total / entry.count)), 0);
  return entries.map((entry) => {
    const mean = entry.total / entry.count;
    const { sample, i } = entry.worst;
    const label = `${isByToken ? "" : "Tokens "}${entry.name}: open the costliest, in sample ${sample.n}`;
    const button = make("button", { type: "button", className: "viewer-token", "aria-label": label, title: label }, make("bdi", {}, entry.name));
    button.classList.add(isByToken ? `kl-${level(scale.edges, mean)}` : "place");
    const cells = [make("th", { scope: "row" }, button), make("td", {}, entry.count.toLocaleString("en"))];
    if (isByToken) cells.push(amountCell(entry.total, most, 1), make("td", {}, fixed(mean, 3)), wantedCell(entry));
    else cells.push(make("td", {}, fixed(entry.total, 1)), amountCell(mean, most, 3));
    return make("tr", { onclick: () => open(sample, i) }, ...cells);
  });
};
