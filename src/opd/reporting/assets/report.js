"use strict";
(() => {
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  systemDark.addEventListener("change", () => (root.dataset.theme = systemDark.matches ? "dark" : "light"));

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => (root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark"));

  // The contents mark the section that is read.
  const links = [...document.querySelectorAll(".contents a")];
  const sections = links.map((link) => document.getElementById(link.hash.slice(1)));
  const mark = () => {
    const line = innerHeight / 3;
    const at = sections.findLastIndex((section) => section && section.getBoundingClientRect().top <= line);
    links.forEach((link, index) => link.toggleAttribute("aria-current", index === at));
  };
  addEventListener("scroll", () => requestAnimationFrame(mark), { passive: true });
  mark();

  // A link to a chart in a closed block opens the block.
  const open = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    const block = target?.querySelector(":scope > details") ?? target?.closest("details");
    if (!block || block.open) return;
    block.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", open);
  open();
})();
