// The tokens of one response in a box that scrolls. Only blocks of tokens near the window of the box are in the document.

const BLOCK = 200; // tokens, about
const NEAR = 600; // px above and below the window

class TokenText {
  constructor(box) {
    this.box = box;
    this.blocks = [];
    this.current = null;
    this.isFlat = false;
    this.observer = new IntersectionObserver((entries) => this.update(entries), { root: box, rootMargin: `${NEAR}px 0px` });
  }

  show(sample, scale) {
    this.observer.disconnect();
    this.sample = sample;
    this.scale = scale;
    this.current = null;
    this.box.scrollTop = 0;
    this.box.setAttribute("aria-label", `${sample.title}: ${counted(sample.length, "token")}`);
    if (!sample.length) {
      this.blocks = [];
      this.box.replaceChildren(make("div", { className: "viewer-block" }, sample.response));
      return;
    }
    this.blocks = this.cut();
    const line = this.lineSize();
    for (const block of this.blocks) {
      block.element = make("div", { className: "viewer-block" });
      if (this.blocks.length > 1) block.element.dataset.from = (block.from + 1).toLocaleString("en");
      block.element.style.height = `${this.lines(block, line.columns) * line.height}px`;
      block.isDrawn = false;
    }
    this.box.replaceChildren(...this.blocks.map((block) => block.element));
    this.draw(this.blocks[0]);
    if (this.isFlat) this.flat(true);
    else for (const block of this.blocks) this.observer.observe(block.element);
  }

  // Blocks end after a line end where there is one near, and never inside a character.
  cut() {
    const blocks = [];
    for (let from = 0; from < this.sample.length; ) {
      let to = Math.min(from + BLOCK, this.sample.length);
      for (let i = from + BLOCK * 1.5; i > from + BLOCK / 2; i--) {
        if (i < this.sample.length && this.sample.drawn(i - 1).endsWith("\n")) {
          to = i;
          break;
        }
      }
      while (to < this.sample.length && this.sample.parts.get(to)?.part > 1) to++;
      if (this.sample.length - to < BLOCK / 4) to = this.sample.length;
      blocks.push({ from, to });
      from = to;
    }
    return blocks;
  }

  lineSize() {
    const probe = make("span", { className: "viewer-probe" }, "0".repeat(50));
    this.box.replaceChildren(make("div", { className: "viewer-block" }, probe));
    const width = probe.getBoundingClientRect().width / 50 || 8;
    const style = getComputedStyle(probe.parentElement);
    const height = parseFloat(style.lineHeight) || 24;
    return { height, columns: Math.max(8, Math.floor(probe.parentElement.clientWidth / width)) };
  }

  lines({ from, to }, columns) {
    let lines = 1;
    let column = 0;
    for (let i = from; i < to; i++) {
      const text = this.sample.drawn(i);
      column += text.length;
      if (column > columns) {
        lines++;
        column = text.length;
      }
      if (text.endsWith("\n")) {
        lines++;
        column = 0;
      }
    }
    return column ? lines : Math.max(1, lines - 1);
  }

  update(entries) {
    if (this.isFlat) return;
    for (const entry of entries) {
      const block = this.blocks.find(({ element }) => element === entry.target);
      if (!block) continue;
      if (entry.isIntersecting) this.draw(block);
      else this.drop(block);
    }
  }

  draw(block) {
    if (block.isDrawn) return;
    block.isDrawn = true;
    const spans = [];
    for (let i = block.from; i < block.to; i++) spans.push(this.span(i));
    block.element.replaceChildren(...spans);
    block.element.style.height = "";
  }

  drop(block) {
    const holds = (i) => i !== null && i >= block.from && i < block.to;
    if (!block.isDrawn || holds(this.current) || block.element.contains(document.activeElement)) return;
    block.element.style.height = `${block.element.offsetHeight}px`;
    block.isDrawn = false;
    block.element.replaceChildren();
  }

  span(i) {
    const part = this.sample.parts.get(i);
    const span = make("span", { role: "button", tabIndex: i === (this.current ?? 0) ? 0 : -1, "aria-label": this.sample.label(i) });
    // The space before a word has no colour: at the end of a line it would leave a stump.
    const text = this.sample.drawn(i);
    const space = text.startsWith(" ") ? 1 : 0;
    span.append(text.slice(0, space), make("span", {}, text.slice(space)));
    span.dataset.i = i;
    if (part) span.classList.add("part", part.part === 1 ? "first" : "further");
    this.dress(span, i);
    return span;
  }

  dress(span, i) {
    span.classList.add("tok");
    span.classList.toggle("chosen", i === this.current);
    span.lastChild.className = `ink ${colourOf(this.scale, this.sample, i)}`;
    if (i === this.current) span.setAttribute("aria-current", "true");
    else span.removeAttribute("aria-current");
  }

  paint(scale) {
    this.scale = scale;
    for (const span of this.box.querySelectorAll(".tok")) this.dress(span, Number(span.dataset.i));
  }

  // The element of token `i`, which is drawn if it is not in the document.
  element(i) {
    const block = this.blocks.find(({ from, to }) => i >= from && i < to);
    this.draw(block);
    return block.element.children[i - block.from];
  }

  choose(i) {
    const before = this.current;
    this.current = i;
    for (const old of this.box.querySelectorAll('.tok[tabindex="0"], .tok.chosen')) {
      old.tabIndex = -1;
      this.dress(old, Number(old.dataset.i));
    }
    const at = i ?? before ?? 0;
    if (at >= this.sample.length) return;
    const span = this.element(at);
    span.tabIndex = 0;
    this.dress(span, at);
  }

  // Scrolls the box, and not the page, until the token is well inside.
  reveal(i) {
    const span = this.element(i);
    const at = span.getBoundingClientRect();
    const box = this.box.getBoundingClientRect();
    const line = 28;
    if (at.top < box.top + line || at.bottom > box.bottom - line) {
      this.box.scrollTop += at.top - box.top - this.box.clientHeight / 2 + at.height / 2;
    }
    return span;
  }

  // On paper, all of the response is drawn.
  flat(isFlat) {
    this.isFlat = isFlat;
    this.blocks.forEach((block) => (isFlat ? this.draw(block) : null));
    if (isFlat) return;
    this.observer.disconnect();
    for (const block of this.blocks) this.observer.observe(block.element);
  }
}
