"use strict";
(() => {
  // Our own hint replaces the browser's, which is slow, and absent on touch screens.
  const tip = document.getElementById("tip");
  const show = (token) => {
    if (token.title) {
      token.dataset.tip = token.title;
      token.removeAttribute("title");
    }
    tip.textContent = token.dataset.tip;
    tip.hidden = false;
    const at = token.getClientRects()[0];
    const left = Math.min(Math.max(8, at.left), innerWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 8 ? above : at.bottom + 6}px`;
  };
  const react = (event) => {
    const token = event.target instanceof Element ? event.target.closest(".response .t") : null;
    if (token) show(token);
    else tip.hidden = true;
  };
  document.addEventListener("pointerover", react);
  document.addEventListener("click", react);
  addEventListener("scroll", () => (tip.hidden = true), { passive: true });
})();
