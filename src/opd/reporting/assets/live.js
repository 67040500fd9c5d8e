"use strict";
(() => {
  // A page of a run that goes on loads itself again: served by `opd watch` when there is news, from a file every 30 seconds.
  const POLL = 5000;
  const FILE_EVERY = 30000;
  const SETTLE = 1500; // that the place has to stay
  const QUIET = 4000; // after the last key, click or scroll
  const version = document.querySelector('meta[name="opd-version"]')?.content;
  const nameOf = (block) => block.id || block.querySelector("summary :first-child, summary")?.textContent.trim();
  const blocks = () => [...document.querySelectorAll("details")];

  const before = history.state?.opd;
  if (before) {
    const open = new Set(before.open);
    const closed = new Set(before.closed);
    blocks().forEach((block) => {
      if (open.has(nameOf(block))) block.open = true;
      else if (closed.has(nameOf(block))) block.open = false;
    });
    // The page grows while its charts are drawn, above its place and below: until it stays there, or somebody moves it.
    let moved = false;
    for (const kind of ["keydown", "pointerdown", "wheel", "touchmove"]) {
      addEventListener(kind, () => (moved = true), { passive: true, capture: true, once: true });
    }
    const back = (settled, end) => {
      const now = performance.now();
      const away = Math.abs(scrollY - before.y) > 1;
      if (away && !moved) scrollTo({ left: before.x, top: before.y, behavior: "instant" });
      if (!moved && now < (away ? end : Math.min(settled, end))) requestAnimationFrame(() => back(away ? now + SETTLE : settled, end));
    };
    addEventListener("load", () => requestAnimationFrame(() => back(performance.now() + SETTLE, performance.now() + 10000)));
  }

  let touched = -Infinity;
  for (const kind of ["keydown", "pointerdown", "wheel", "scroll", "touchmove"]) {
    addEventListener(kind, () => (touched = performance.now()), { passive: true, capture: true });
  }
  const inUse = () =>
    document.hidden ||
    performance.now() - touched < QUIET ||
    !getSelection().isCollapsed ||
    document.querySelector("dialog[open]") !== null ||
    /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName ?? "");

  const again = () => {
    const named = (isOpen) => blocks().filter((block) => block.open === isOpen).map(nameOf);
    const opd = { x: scrollX, y: scrollY, open: named(true), closed: named(false) };
    history.scrollRestoration = "manual";
    history.replaceState({ ...history.state, opd }, "");
    location.reload();
  };

  const poll = async () => {
    try {
      const answer = await fetch("/version", { cache: "no-store" });
      if (answer.ok && (await answer.text()) !== version && !inUse()) return again();
    } catch {
      // opd watch has ended; it may come back
    }
    setTimeout(poll, POLL);
  };
  const wait = () => (inUse() ? setTimeout(wait, QUIET) : again());

  if (version) setTimeout(poll, POLL);
  else setTimeout(wait, FILE_EVERY);
})();
