// The token viewer: samples, filters, steps, colours, keys and links.

const LISTED = 100; // rows of the list, drawn at a time
const IGNORE_KEYS = "input, select, textarea, [contenteditable]";

const startViewer = (data) => {
  const at = (name) => document.getElementById(`viewer-${name}`);
  const all = data.samples.map((packed) => new Sample(packed, data));
  const scales = data.scales;
  const isNarrow = matchMedia("(max-width: 820px)");
  const text = new TokenText(at("text"));
  const panel = at("panel");
  const state = { sample: null, token: null, scale: scales[0], listed: [], rows: LISTED, tokenRows: ROWS };
  at("app").hidden = false;

  // --- one sample ---------------------------------------------------------------------------------------------------
  const openSample = (sample, token = null) => {
    if (state.sample !== sample) {
      state.sample = sample;
      drawSample(sample);
    }
    chooseToken(token);
    markRow();
  };

  const drawSample = (sample) => {
    at("name").textContent = sample.title;
    const facts = [`sample ${sample.n}`, sample.phase === "eval" ? "evaluation" : "training", counted(sample.length, "token")];
    if (sample.mean !== null) facts.push(`mean KL ${number(sample.mean)} nats`, `total ${number(sample.total)}`);
    if (sample.reward !== null) facts.push(`reward ${number(sample.reward)}`);
    if (sample.teacher !== null) facts.push(`teacher ${sample.teacher}`);
    if (!sample.finished) facts.push("cut at the length limit");
    at("about").textContent = facts.join(" · ");
    const pieces = sample.pieces.map(([words, isSpecial]) => make("bdi", isSpecial ? { className: "viewer-special" } : {}, words));
    at("prompt").replaceChildren(...pieces);
    if (sample.answer !== null) at("prompt").append(make("span", { className: "viewer-expected" }, "expected: ", make("bdi", {}, sample.answer)));
    at("prompt").scrollTop = 0;
    at("writer").textContent = sample.by === "dataset" ? "The answer of the data set" : `The ${sample.by}'s answer`;
    drawTeacher(teacherOf(all, sample));
    text.show(sample, state.scale);
    drawSteps(sample);
    drawLegend();
  };

  const drawTeacher = (own) => {
    at("teacher").hidden = !own;
    at("answers").classList.toggle("two", Boolean(own));
    if (!own) return;
    at("teacher-text").textContent = own.words;
    at("teacher-text").scrollTop = 0;
    at("teacher-link").href = `#sample-${own.n}`;
  };

  const drawSteps = (sample) => {
    const steps = stepsOf(all, sample);
    const here = steps.indexOf(sample);
    at("steps").style.visibility = steps.length < 2 ? "hidden" : "";
    at("step").max = steps.length - 1;
    at("step").value = here;
    at("step").setAttribute("aria-valuetext", `step ${sample.step}`);
    const same = steps.filter((s) => s.step === sample.step);
    at("step-name").textContent = `step ${sample.step}${same.length > 1 ? `, answer ${same.indexOf(sample) + 1} of ${same.length}` : ""}`;
    const most = Math.max(...steps.map((s) => s.mean ?? 0), 1e-9);
    at("spark").replaceChildren(...steps.map((s) => {
      const bar = make("span", { className: `kl-${level(scales[0].edges, s.mean ?? 0)}${s === sample ? " viewer-now" : ""}`, title: `step ${s.step}: mean KL ${number(s.mean)} nats` });
      bar.style.height = `${Math.max(8, (100 * (s.mean ?? 0)) / most)}%`;
      return bar;
    }));
  };

  const drawLegend = () => {
    const isKnown = !state.sample.length || state.sample.tokens.some((_, i) => MEASURES[state.scale.key](state.sample, i) !== null);
    const chips = state.scale.labels.map((label, i) => make("span", { className: `viewer-chip ${state.scale.css}-${i}` }, label));
    at("legend").title = state.scale.about;
    const missing = make("strong", {}, "Not recorded in this sample: no colours.");
    at("legend").replaceChildren(...(isKnown ? chips : [missing]));
  };

  // --- one token ----------------------------------------------------------------------------------------------------
  const chooseToken = (i) => {
    const { sample } = state;
    state.token = i;
    text.choose(i);
    if (i === null) clearPanel(panel);
    else {
      showPanel(panel, sample, i, state.scale, { worst: stepWorst, close });
      text.reveal(i);
    }
    at("tip").hidden = true;
  };
  // What a person did, as opposed to what the page did on its own: the address follows it.
  const remember = () => {
    const token = state.token === null ? "" : `-token-${state.token + 1}`;
    try {
      history.replaceState(null, "", `#sample-${state.sample.n}${token}`);
    } catch {
      // A frame without an origin of its own has no address to keep.
    }
  };
  const pick = (i) => {
    chooseToken(i);
    text.element(i).focus({ preventScroll: true });
    bringIn(i);
    remember();
  };
  // Scrolls the page where the token is out of sight; on a narrow page the panel lies over the text.
  const bringIn = (i) => {
    const token = text.element(i).getBoundingClientRect();
    const end = isNarrow.matches ? panel.getBoundingClientRect().top : innerHeight;
    if (token.top > 12 && token.bottom < end - 12) return;
    if (isNarrow.matches) scrollBy(0, token.bottom - end / 2);
    else at("bench").scrollIntoView({ block: "start" });
  };
  const close = () => {
    const before = state.token;
    chooseToken(null);
    if (before !== null) text.element(before).focus({ preventScroll: true });
    remember();
  };
  const stepWorst = (by) => {
    const { order } = state.sample;
    if (!order.length) return;
    const rank = state.token === null ? null : state.sample.rank(state.token);
    const next = rank === null ? 0 : Math.min(Math.max(rank + by, 0), order.length - 1);
    pick(order[next]);
  };
  const stepToken = (from, by) => {
    const next = Math.min(Math.max(from + by, 0), state.sample.length - 1);
    if (panel.classList.contains("open")) pick(next);
    else text.reveal(next).focus({ preventScroll: true });
  };
  const stepSample = (by, keepsFocus) => {
    const here = state.listed.indexOf(state.sample);
    const next = state.listed[Math.min(Math.max(here + by, 0), state.listed.length - 1)];
    if (!next || next === state.sample) return;
    openSample(next, panel.classList.contains("open") && next.order.length ? next.order[0] : null);
    remember();
    const row = at("list").querySelector(`[data-n="${next.n}"]`);
    if (keepsFocus === "list") row?.focus();
    else if (next.length) text.element(state.token ?? 0).focus({ preventScroll: true });
  };

  // --- list, filters, tables ----------------------------------------------------------------------------------------
  const markRow = () => {
    for (const old of at("list").querySelectorAll("[aria-current]")) old.removeAttribute("aria-current");
    const place = state.listed.indexOf(state.sample);
    if (place >= state.rows) {
      state.rows = place + LISTED;
      drawList();
      return;
    }
    const row = at("list").querySelector(`[data-n="${state.sample?.n}"]`);
    if (!row) return;
    row.setAttribute("aria-current", "true");
    const list = at("list");
    const [box, own] = [list.getBoundingClientRect(), row.getBoundingClientRect()];
    if (own.top < box.top || own.bottom > box.bottom) list.scrollTop += own.top - box.top - list.clientHeight / 2;
  };
  const drawList = () => {
    const rows = state.listed.slice(0, state.rows).map((sample) => listRow(sample, scales[0].edges));
    const rest = state.listed.length - rows.length;
    if (rest > 0) rows.push(make("li", {}, make("button", { type: "button", className: "viewer-more", onclick: () => { state.rows += LISTED; drawList(); } }, `Show ${Math.min(rest, LISTED)} more of ${rest}`)));
    if (!rows.length) rows.push(make("li", { className: "note" }, "No response passes these filters."));
    at("list").replaceChildren(...rows);
    at("toggle").textContent = counted(state.listed.length, "sample");
    markRow();
  };
  const drawTables = () => {
    at("cost-of").textContent = `Reverse KL to the teacher in nats, over ${counted(state.listed.length, "sample")}. A click opens the costliest occurrence.`;
    const tokens = costByToken(state.listed);
    const openWorst = (sample, i) => {
      openSample(sample, i);
      remember();
      at("bench").scrollIntoView({ block: isNarrow.matches ? "start" : "nearest" });
      text.element(i).focus({ preventScroll: true });
      bringIn(i);
    };
    at("by-token").replaceChildren(...tableRows(tokens.slice(0, state.tokenRows), scales[0], openWorst, true));
    at("by-position").replaceChildren(...tableRows(costByPosition(state.listed), scales[0], openWorst, false));
    const rest = tokens.length - state.tokenRows;
    at("more-tokens").hidden = rest <= 0;
    at("more-tokens").textContent = rest > 20 ? `Show 20 more of ${rest.toLocaleString("en")}` : `Show the other ${rest}`;
  };
  const refilter = () => {
    state.listed = all.filter(filters.passes).sort(SORTS.find(([key]) => key === at("sort").value)[2]);
    state.rows = LISTED;
    drawTables();
    drawList();
    if (state.listed.length && !state.listed.includes(state.sample)) openFirst();
  };
  // The costliest sample; on a wide page with its costliest token, which there covers nothing.
  const openFirst = () => openSample(state.listed[0], isNarrow.matches ? null : (state.listed[0].order[0] ?? null));

  // --- links --------------------------------------------------------------------------------------------------------
  const openAddress = (isScrolled) => {
    const match = /^#sample-(\d+)(?:-token-(\d+))?$/.exec(location.hash);
    if (!match) return false;
    const sample = all.find(({ n }) => n === Number(match[1]));
    if (!sample) {
      at("about").textContent = `Sample ${match[1]} is not on this page.`;
      return false;
    }
    if (!filters.passes(sample)) {
      filters.clear();
      refilter();
    }
    const token = match[2] ? Number(match[2]) - 1 : null;
    openSample(sample, token !== null && token < sample.length ? token : null);
    if (isScrolled) at("bench").scrollIntoView({ block: "start" });
    return true;
  };

  // --- events -------------------------------------------------------------------------------------------------------
  const tokenAt = (target) => {
    const span = target instanceof Element ? target.closest("#viewer-text .tok") : null;
    return span ? Number(span.dataset.i) : null;
  };
  at("text").addEventListener("click", (event) => {
    const i = tokenAt(event.target);
    if (i !== null && getSelection().isCollapsed) pick(i);
  });
  const tip = (target) => {
    const i = tokenAt(target);
    at("tip").hidden = i === null;
    if (i === null) return;
    at("tip").textContent = state.sample.label(i);
    const box = target.closest(".tok").getClientRects()[0];
    const above = box.top - at("tip").offsetHeight - 6;
    at("tip").style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - at("tip").offsetWidth - 8))}px`;
    at("tip").style.top = `${above > 8 ? above : box.bottom + 6}px`;
  };
  if (matchMedia("(hover: hover)").matches) at("text").addEventListener("pointerover", (event) => tip(event.target));
  at("text").addEventListener("pointerleave", () => tip(null));
  addEventListener("scroll", () => tip(null), { passive: true, capture: true });

  at("list").addEventListener("click", (event) => {
    const row = event.target.closest("[data-n]");
    if (!row) return;
    const sample = all.find(({ n }) => n === Number(row.dataset.n));
    openSample(sample, isNarrow.matches ? null : (sample.order[0] ?? null));
    remember();
    if (isNarrow.matches) toggleList(false);
  });
  const toggleList = (isOpen) => {
    at("toggle").setAttribute("aria-expanded", String(isOpen));
    at("list").classList.toggle("open", isOpen);
  };
  at("toggle").addEventListener("click", () => toggleList(at("toggle").getAttribute("aria-expanded") !== "true"));
  at("more-tokens").addEventListener("click", () => {
    state.tokenRows += 20;
    drawTables();
  });
  at("step").addEventListener("input", () => {
    const sample = stepsOf(all, state.sample)[Number(at("step").value)];
    openSample(sample, panel.classList.contains("open") ? (sample.order[0] ?? null) : null);
    remember();
  });
  at("scale").addEventListener("change", () => {
    state.scale = scales.find(({ key }) => key === at("scale").value);
    text.paint(state.scale);
    drawLegend();
    if (state.token !== null) chooseToken(state.token);
  });

  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest?.(IGNORE_KEYS) || document.querySelector("dialog[open]")) return;
    const token = tokenAt(event.target);
    const isInList = Boolean(event.target.closest?.("#viewer-list"));
    const isInPanel = Boolean(event.target.closest?.("#viewer-panel"));
    const from = token ?? (isInPanel ? state.token : null);
    const acts = { n: () => stepWorst(1), p: () => stepWorst(-1) };
    if (panel.classList.contains("open")) acts.Escape = close;
    if (from !== null) Object.assign(acts, { ArrowLeft: () => stepToken(from, -1), ArrowRight: () => stepToken(from, 1) });
    if (token !== null) Object.assign(acts, { Enter: () => pick(token), " ": () => pick(token) });
    if (from !== null || isInList) {
      const place = isInList ? "list" : "text";
      Object.assign(acts, { ArrowUp: () => stepSample(-1, place), ArrowDown: () => stepSample(1, place) });
    }
    if (!acts[event.key]) return;
    event.preventDefault();
    acts[event.key]();
  });
  addEventListener("hashchange", () => openAddress(true));

  const paper = matchMedia("print");
  const flatten = (isFlat) => text.flat(isFlat);
  paper.addEventListener("change", () => flatten(paper.matches));
  addEventListener("beforeprint", () => flatten(true));
  addEventListener("afterprint", () => flatten(false));

  // The boxes are as tall as the longest text of the page needs, within reason, so that nothing below them moves.
  const lineCount = (words, columns) => words.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
  const setHeights = () => {
    const columns = isNarrow.matches ? 36 : 52;
    const prompts = data.prompts.map(({ pieces }) => lineCount(pieces.map(([words]) => words).join(""), isNarrow.matches ? 38 : 90) + 1);
    const answers = all.map((s) => (s.length > 1000 ? Infinity : lineCount(s.words, s.by === "teacher" ? columns * 0.66 : columns)));
    at("prompt").style.height = `${Math.min(6, Math.max(...prompts)) * 1.6 + 1.6}em`;
    const height = `${Math.min(isNarrow.matches ? 8 : 10, Math.max(2, ...answers)) * 1.95 + 1.4}em`;
    for (const name of ["text", "teacher-text"]) at(name).style.height = height;
  };
  isNarrow.addEventListener("change", setHeights);

  // --- start --------------------------------------------------------------------------------------------------------
  at("sort").append(...SORTS.map(([key, words]) => make("option", { value: key }, words)));
  at("scale").append(...scales.map(({ key, name }) => make("option", { value: key }, name)));
  at("sort").addEventListener("change", () => refilter());
  const filters = makeFilters(at("filters"), all, () => refilter());
  at("steps").hidden = new Set(all.map((s) => `${s.by} ${s.row}`)).size === all.length;
  setHeights();
  refilter();
  // A page that refreshes itself stays where it was scrolled to.
  openAddress(performance.getEntriesByType("navigation")[0]?.type !== "reload");
};

const viewerData = document.getElementById("viewer-data");
if (viewerData) startViewer(JSON.parse(viewerData.textContent));
