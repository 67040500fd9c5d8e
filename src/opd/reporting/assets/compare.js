"use strict";
// The same prompt, side by side. A prompt is drawn when it is chosen; every text is set as text, never as markup.
(() => {
  const data = document.getElementById("answers-data");
  if (!data) return;
  const { prompts, groups, limit } = JSON.parse(data.textContent);
  const list = document.getElementById("prompts");
  const question = document.getElementById("prompt");
  const sides = document.getElementById("side-by-side");
  let seed = null; // the seed whose answers are shown, where a group has it

  const make = (name, className = "", text = "") => {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.textContent = text;
    return element;
  };
  const verdictOf = (rewards) => {
    if (rewards.every((reward) => reward === 1)) return "✓";
    if (rewards.every((reward) => reward === 0)) return "✗";
    if (rewards.every((reward) => reward === 0 || reward === 1)) return ` ${rewards.filter((reward) => reward === 1).length}/${rewards.length}`;
    return ` ${Number((rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length).toPrecision(2))}`;
  };
  const said = (reward) => (reward === 1 ? "right" : reward === 0 ? "wrong" : `reward ${Number(reward.toPrecision(3))}`);

  // What a list of prompts shows of one: its text without the tokens of the chat template.
  const plain = ({ text, special }) => {
    let at = 0;
    const kept = [];
    for (const [first, end] of special) {
      kept.push(text.slice(at, first));
      at = end;
    }
    return [...kept, text.slice(at)].join(" ").replace(/\s+/g, " ").trim();
  };

  const drawQuestion = (prompt) => {
    const asking = make("pre", "asking");
    let at = 0;
    for (const [first, end] of prompt.special) {
      asking.append(prompt.text.slice(at, first), make("span", "special", prompt.text.slice(first, end)));
      at = end;
    }
    asking.append(prompt.text.slice(at));
    question.replaceChildren(make("h3", "", prompt.row === null ? "Prompt" : `Prompt, row ${prompt.row}`), asking);
    if (prompt.answer !== null) question.append(make("p", "expected", `Answer of the data set: ${prompt.answer}`));
  };

  const drawTokens = (answer, base) => {
    const response = make("div", "response");
    response.tabIndex = 0;
    const parts = base && base !== answer ? answer.tokens.findIndex(([text], index) => base.tokens[index]?.[0] !== text) : -1;
    answer.tokens.forEach(([text, level, kl], index) => {
      const token = make("span", `t${level === null ? "" : ` k${level}`}${index === parts ? " parted" : ""}`, text);
      token.title = `“${text.replaceAll("\n", "")}”  ${kl === null ? "no KL recorded" : `${kl} nats`}`;
      response.append(token);
    });
    if (answer.length > limit) response.append(make("span", "more", ` … of ${answer.length.toLocaleString("en")} tokens`));
    return response;
  };

  const facts = (answer) =>
    [
      `step ${answer.step}`,
      answer.reward === null ? "" : said(answer.reward),
      `${answer.length} token${answer.length === 1 ? "" : "s"}`,
      answer.kl === null ? "" : `mean KL ${Number(answer.kl.toPrecision(3))} nats`,
      answer.finished ? "" : "cut at the length limit",
    ]
      .filter(Boolean)
      .join(" · ");

  const ofSeed = (answers) => answers.find((one) => one.seed === seed) ?? answers[0];

  const drawSide = (prompt, group, answers, base) => {
    const answer = ofSeed(answers);
    const side = make("article", `side run-${groups[group].color}`);
    const head = make("h4");
    head.append(make("span", `badge run-${groups[group].color}`, groups[group].mark), make("span", "name", groups[group].name));
    if (answers.length > 1) {
      const seeds = make("span", "seeds", "seed");
      for (const one of answers) {
        const button = make("button", "", String(one.seed));
        button.type = "button";
        button.setAttribute("aria-pressed", String(one === answer));
        button.setAttribute("aria-label", `${groups[group].name}, seed ${one.seed}`);
        button.addEventListener("click", () => {
          seed = one.seed;
          drawAnswers(prompt);
          sides.querySelector(`[aria-label="${CSS.escape(button.getAttribute("aria-label"))}"]`)?.focus();
        });
        seeds.append(button);
      }
      head.append(seeds);
    }
    side.append(head, make("p", "facts", facts(answer)), drawTokens(answer, base));
    return side;
  };

  const drawAnswers = (prompt) => {
    const byGroup = new Map();
    for (const answer of prompt.answers) byGroup.set(answer.group, [...(byGroup.get(answer.group) ?? []), answer]);
    const first = byGroup.get(0);
    const base = first && ofSeed(first);
    const all = groups.length === 1 ? prompt.answers.map((answer) => [answer.group, [answer]]) : [...byGroup];
    sides.replaceChildren(...all.map(([group, answers]) => drawSide(prompt, group, answers, base)));
    if (prompt.teacher) {
      const side = make("article", "side teacher");
      side.append(make("h4", "", "teacher"), make("p", "facts", facts(prompt.teacher)), drawTokens(prompt.teacher, null));
      sides.append(side);
    }
  };

  const show = (index, focus = false) => {
    const buttons = [...list.querySelectorAll("button")];
    for (const [at, button] of buttons.entries()) {
      button.tabIndex = at === index ? 0 : -1;
      if (at === index) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
    }
    if (focus) buttons[index].focus();
    drawQuestion(prompts[index]);
    drawAnswers(prompts[index]);
  };

  // Begin with the seed that most groups have: their answers are paired.
  const groupsOf = new Map();
  for (const { answers } of prompts)
    for (const answer of answers) groupsOf.set(answer.seed, (groupsOf.get(answer.seed) ?? new Set()).add(answer.group));
  seed = [...groupsOf].reduce((best, one) => (one[1].size > best[1].size ? one : best))[0];

  prompts.forEach((prompt, index) => {
    const button = make("button");
    button.type = "button";
    button.append(make("span", "words", plain(prompt) || "(empty)"));
    const verdicts = make("span", "verdicts");
    for (const [group, rewards] of Object.entries(prompt.rewards)) {
      const { mark, name, color } = groups[group];
      const verdict = make("span", `verdict run-${color}${rewards.some((reward) => reward > 0) ? "" : " wrong"}`, mark + verdictOf(rewards));
      verdict.title = `${name}: ${rewards.map(said).join(", ")}`;
      verdicts.append(verdict);
    }
    button.append(verdicts);
    button.addEventListener("click", () => show(index));
    button.addEventListener("keydown", (event) => {
      const to = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: prompts.length - 1 }[event.key];
      if (to === undefined || !prompts[to]) return;
      event.preventDefault();
      show(to, true);
    });
    const item = make("li");
    item.append(button);
    list.append(item);
  });
  show(0);
})();
