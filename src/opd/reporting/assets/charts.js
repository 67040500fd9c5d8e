"use strict";
// Charts of a page: every figure.chart is drawn from the JSON in it (reporting/plots.py says what it holds). Charts over the run have one
// range and one cursor, which the pointer and the arrow keys move.
const opdCharts = (() => {
  const STEP = "step";
  const HEIGHT = 216;
  const PRINT_WIDTH = 325; // two charts side by side on A4 and on US Letter
  const { number } = opdScales;
  const { mounted, shared, svg, html, colorOf, isNumber, prepared, short, described, lastIndex, nearest, placed, round, swatch } = opdDrawing;

  const draw = (chart) => {
    opdDrawing.draw(chart);
    point(chart, chart.at);
  };

  // ---- the cursor

  const placeText = (chart, x) => {
    const binned = chart.lines.find((line) => line.min && line.x.length > 1);
    const end = binned ? x + binned.x[1] - binned.x[0] - 1 : x;
    const where = end > x ? `${chart.spec.x_label}s ${number(x)} to ${number(end)}` : `${chart.spec.x_label} ${number(x)}`;
    return chart.isSteps && shared.axis ? `${where} (${number(shared.axis.at(x))} ${shared.axis.unit})` : where;
  };
  const valueText = (chart, x) =>
    chart.lines.map((line) => `${line.label} ${described(chart.spec, line, indexAt(line, x))}`).join(", ");
  const indexAt = (line, x) => (x === null ? lastIndex(line) : nearest(line, x));

  // Show the cursor of one chart at x; null takes it away, and the last values are shown. The chart that is pointed at shows a tip.
  const point = (chart, x, isSource = false) => {
    chart.at = x;
    if (!chart.scale || !chart.stops.length) return;
    const { spec, host, lines } = chart;
    const { X, top, bottom, at, left, right } = chart.scale;
    const shown = x ?? chart.stops.at(-1);
    chart.place.textContent = chart.isSteps ? `${spec.x_label} ${number(shown)}` : number(shown);
    chart.values.forEach((element, index) => (element.textContent = short(spec, lines[index], indexAt(lines[index], x))));
    host.setAttribute("aria-valuenow", shown);
    host.setAttribute("aria-valuetext", `${x === null ? "last values" : placeText(chart, x)}: ${valueText(chart, x)}`);
    chart.pointer.replaceChildren();
    const across = x === null ? NaN : X(placed(chart, x));
    const isInside = across >= left - 1 && across <= right + 1;
    chart.tip.hidden = !isInside || !isSource;
    if (!isInside) return;
    chart.pointer.append(svg("line", { class: "cursor", x1: round(across), x2: round(across), y1: top, y2: bottom }));
    for (const line of lines) {
      const index = nearest(line, x);
      const spot = index < 0 || line.base || line.kind === "level" ? null : at(line.x[index], line.y[index]);
      if (!spot) continue;
      const dot = svg("circle", { class: "spot", cx: round(spot[0]), cy: round(spot[1]), r: 4 });
      dot.style.setProperty("--c", colorOf(line.color));
      chart.pointer.append(dot);
    }
    if (isSource) showTip(chart, x, across);
  };
  const showTip = (chart, x, across) => {
    const rows = chart.lines.filter((line) => nearest(line, x) >= 0).map((line) => {
      const row = html("div", "row");
      row.append(swatch(line), html("span", "name", line.label), html("span", "value", described(chart.spec, line, nearest(line, x))));
      return row;
    });
    chart.tip.replaceChildren(html("div", "at", placeText(chart, x)), ...rows);
    const scale = chart.host.clientWidth / chart.width;
    const place = across * scale + 14;
    const room = chart.host.clientWidth - chart.tip.offsetWidth;
    chart.tip.style.left = `${Math.max(0, place <= room ? place : across * scale - 14 - chart.tip.offsetWidth)}px`;
  };
  let waiting = 0;
  const pointAll = (source, x) => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => {
      for (const chart of mounted) if (chart === source || (source.isSteps && chart.isSteps)) point(chart, x, chart === source);
    });
  };

  const stopAt = (chart, event) => {
    const box = chart.host.firstChild.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * chart.width;
    let best = null;
    let distance = Infinity;
    for (const stop of chart.stops) {
      const away = Math.abs(chart.scale.X(placed(chart, stop)) - across);
      if (away < distance) [best, distance] = [stop, away];
    }
    return best;
  };

  const KEYS = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity };
  const onKey = (chart, event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !chart.stops?.length) return;
    // The large view has no `enlarge`: there Escape closes it.
    if (event.key === "Enter" && chart.enlarge) chart.enlarge();
    else if (event.key === "Escape" && chart.enlarge && chart.at !== null) pointAll(chart, null);
    else if (event.key in KEYS) {
      const last = chart.stops.length - 1;
      const from = chart.at === null ? last : chart.stops.findIndex((stop) => stop >= chart.at);
      const move = KEYS[event.key] * (event.shiftKey ? 10 : 1);
      pointAll(chart, chart.stops[Math.min(Math.max((from < 0 ? last : from) + move, 0), last)]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };

  // ---- mounting

  let made = 0;
  const summaryOf = (spec, lines) =>
    lines
      .map((line) => {
        const [first, last] = [line.y.findIndex(isNumber), lastIndex(line)];
        if (first < 0) return `${line.label}: no values`;
        if (line.kind === "level") return `${line.label}: ${described(spec, line, 0)}`;
        return `${line.label}: ${described(spec, line, first)} at ${spec.x_label} ${number(line.x[first])}, ${described(spec, line, last)} at ${spec.x_label} ${number(line.x[last])}`;
      })
      .join("; ");

  const sizes = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      const chart = target.opdChart;
      const width = Math.round(contentRect.width);
      if (!chart || !width || width === chart.width) continue;
      chart.width = width;
      draw(chart);
    }
    document.documentElement.dataset.charts = "ready";
  });

  // Draw `spec` into `parent`: a row of keys with values, and the picture. Returns the chart, for `unmount`.
  const mount = (parent, spec, { height = HEIGHT, zoom = null } = {}) => {
    const lines = prepared(spec);
    const chart = { id: ++made, spec, lines, height, zoom, width: 0, at: null, isSteps: spec.x_label === STEP, stops: [] };
    const keys = html("div", "keys");
    chart.place = html("span", "place");
    chart.values = lines.map((line) => {
      const key = html("span", "key");
      const value = html("span", "value");
      key.append(swatch(line), ...(lines.length > 1 ? [html("span", "name", line.label)] : []), value);
      keys.append(key);
      return value;
    });
    keys.prepend(chart.place);
    const host = (chart.host = html("div", "plot"));
    chart.tip = html("div", "tip");
    chart.tip.hidden = true;
    host.tabIndex = 0;
    host.opdChart = chart;
    const xs = lines.flatMap((line) => line.x);
    const about = { role: "slider", "aria-roledescription": "chart", "aria-label": `${spec.title}. ${summaryOf(spec, lines)}` };
    about["aria-valuemin"] = xs.reduce((low, x) => Math.min(low, x), Infinity);
    about["aria-valuemax"] = xs.reduce((high, x) => Math.max(high, x), -Infinity);
    for (const [name, value] of Object.entries(about)) host.setAttribute(name, value);
    host.addEventListener("pointermove", (event) => chart.dragged || pointAll(chart, stopAt(chart, event)));
    host.addEventListener("pointerleave", () => pointAll(chart, null));
    host.addEventListener("keydown", (event) => onKey(chart, event));
    host.addEventListener("blur", () => pointAll(chart, null));
    parent.append(keys, host);
    mounted.add(chart);
    shared.domain = null;
    sizes.observe(host);
    return chart;
  };
  const unmount = (chart) => {
    sizes.unobserve(chart.host);
    mounted.delete(chart);
  };
  const setAxis = (chosen) => {
    shared.axis = chosen;
    shared.domain = null;
    for (const chart of mounted) if (chart.isSteps) draw(Object.assign(chart, { zoom: null }));
  };

  const printed = new Map();
  addEventListener("beforeprint", () => {
    for (const chart of mounted) {
      printed.set(chart, chart.width);
      if (chart.width) draw(Object.assign(chart, { width: PRINT_WIDTH, at: null }));
    }
  });
  addEventListener("afterprint", () => printed.forEach((width, chart) => draw(Object.assign(chart, { width }))));

  return { mount, unmount, draw, setAxis };
})();
