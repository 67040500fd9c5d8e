"use strict";
(() => {
  const root = document.documentElement;
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isTouch = matchMedia("(pointer: coarse)").matches;
  const PRINT_WIDTH = 325; // two charts side by side on A4 and on US Letter

  // Figures name colours as "var(--student)"; the page's style sheet knows what that is in the current theme.
  const resolve = (value, style) => {
    if (typeof value === "string") {
      const match = /^var\((--[\w-]+)\)$/.exec(value);
      return match ? style.getPropertyValue(match[1]).trim() : value;
    }
    if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map((item) => resolve(item, style));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
    }
    return value;
  };

  const plots = [...document.querySelectorAll(".plot")].map((element) => ({
    element,
    figure: JSON.parse(element.nextElementSibling.textContent),
  }));

  const draw = ({ element, figure }, width) => {
    const { data, layout } = resolve(figure, getComputedStyle(root));
    if (isTouch) layout.dragmode = false; // a finger scrolls the page
    if (width) Object.assign(layout, { width, autosize: false });
    Plotly.react(element, data, layout, {
      responsive: !width,
      displaylogo: false,
      displayModeBar: isTouch ? false : "hover",
      // Named one by one: others offer to upload the figure.
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    });
  };
  const isShown = ({ element }) => element.offsetParent !== null;
  const drawShown = () => plots.filter(isShown).forEach((plot) => draw(plot));

  const setTheme = (theme) => {
    root.dataset.theme = theme;
    drawShown();
  };
  const systemTheme = () => (systemDark.matches ? "dark" : "light");

  drawShown();
  systemDark.addEventListener("change", () => setTheme(systemTheme()));
  // A plot in a closed block has no width; it is drawn when the block opens.
  document.querySelectorAll("details").forEach((block) => block.addEventListener("toggle", drawShown));

  const button = document.getElementById("theme");
  button.hidden = false;
  button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

  let themeOnScreen = null;
  addEventListener("beforeprint", () => {
    themeOnScreen = root.dataset.theme;
    root.dataset.theme = "light";
    plots.filter(isShown).forEach((plot) => draw(plot, PRINT_WIDTH));
  });
  addEventListener("afterprint", () => setTheme(themeOnScreen));
})();
