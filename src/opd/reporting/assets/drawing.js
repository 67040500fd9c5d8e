"use strict";
// Draws a chart as inline SVG. Colours are CSS variables, so style sheets alone decide themes and print.
const opdDrawing = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const DASHES = { solid: "", dash: "7 4", dot: "1.5 3.5" };
  const SMOOTH_SHARE = 25; // the running median spans 1/25 of the points
  const { number, share, linear, logarithmic, tick, logTick, range } = opdScales;

  const mounted = new Set();
  const shared = { axis: null, domain: null }; // what stands in place of steps, null for the step itself; the range of all charts over the run

  const svg = (name, attributes, ...children) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };
  const html = (name, className, text = "") => {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.textContent = text;
    return element;
  };
  const colorOf = (color) => `var(--${typeof color === "number" ? `run-${color % 8}` : String(color).replace(/^--/, "")})`;
  const isNumber = (value) => value !== null && value !== undefined;

  // ---- values

  // A running median, and the mean of its neighbours: a spike of one step leaves no box around it. At the start, where curves are steep,
  // the window is narrow; at the end, where they are flat, it ends with the run.
  const smoothed = (values) => {
    const half = Math.max(1, Math.floor(values.length / SMOOTH_SHARE / 2));
    const windowed = (list, of) =>
      list.map((_, index) => {
        const reach = Math.min(half, index);
        const inside = list.slice(index - reach, index + reach + 1).filter(isNumber);
        return inside.length ? of(inside) : null;
      });
    const median = (list) => list.sort((a, b) => a - b)[list.length >> 1];
    const mean = (list) => list.reduce((sum, value) => sum + value, 0) / list.length;
    return windowed(windowed(values, median), mean);
  };

  // Lines as drawn: bars and stacks stand on those before them.
  const prepared = (spec) => {
    const below = new Map();
    return spec.lines.map((line) => {
      const isStacked = line.kind === "stack" || line.kind === "bars";
      if (!isStacked) return { ...line, top: line.smooth ? smoothed(line.y) : line.y };
      const base = line.x.map((x) => below.get(x) ?? 0);
      const top = line.y.map((y, index) => base[index] + (y ?? 0));
      line.x.forEach((x, index) => below.set(x, top[index]));
      return { ...line, base, top };
    });
  };

  const say = (spec, value) => {
    if (!isNumber(value)) return "—";
    return spec.percent ? share(value) : number(value);
  };
  const short = (spec, line, index) => say(spec, line.y[index]);
  const described = (spec, line, index) => {
    const text = short(spec, line, index) + (spec.unit && isNumber(line.y[index]) ? ` ${spec.unit}` : "");
    const pair = (low, high) => [low, high].map((value) => say(spec, value).replace("%", ""));
    if (isNumber(line.low?.[index]) && isNumber(line.high?.[index])) return `${text} [${pair(line.low[index], line.high[index]).join(", ")}]`;
    if (isNumber(line.min?.[index]) && line.min[index] !== line.max[index])
      return `${text} (${pair(line.min[index], line.max[index]).join(" to ")})`;
    return text;
  };
  const lastIndex = (line) => line.y.findLastIndex(isNumber);

  // The value of a line at x: its nearest, if that is nearer than the line's own points are to each other.
  const nearest = (line, x) => {
    if (line.kind === "level") return 0;
    let best = -1;
    line.x.forEach((at, index) => {
      if (best < 0 || Math.abs(at - x) < Math.abs(line.x[best] - x)) best = index;
    });
    if (best < 0) return -1;
    const gaps = [line.x[best] - line.x[best - 1], line.x[best + 1] - line.x[best]].filter((gap) => gap > 0);
    const reach = line.kind === "points" ? 0 : Math.max(1, ...gaps) / 2 + 0.5;
    return Math.abs(line.x[best] - x) <= reach ? best : -1;
  };

  // ---- ranges

  const placed = (chart, x) => (chart.isSteps && shared.axis ? shared.axis.at(x) : x);
  const extent = (charts) => {
    let low = Infinity;
    let high = -Infinity;
    for (const chart of charts)
      for (const line of chart.lines)
        for (const x of line.x) {
          const at = placed(chart, x);
          if (at < low) low = at;
          if (at > high) high = at;
        }
    return low < high ? [low, high] : low === high ? [low - 1, low + 1] : [0, 1];
  };
  const rangeOf = (chart) => {
    if (chart.zoom) return chart.zoom;
    if (!chart.isSteps) return extent([chart]);
    shared.domain ??= extent([...mounted].filter((other) => other.isSteps));
    const bars = chart.lines.find((line) => line.kind === "bars" && line.x.length > 1);
    const half = bars && !shared.axis ? (bars.x[1] - bars.x[0]) / 2 : 0;
    return [shared.domain[0] - half, shared.domain[1] + half];
  };
  const heights = (chart, [from, to]) => {
    const values = [];
    for (const line of chart.lines)
      line.x.forEach((x, index) => {
        const at = placed(chart, x);
        if (line.kind !== "level" && (at < from || at > to)) return;
        values.push(line.base ? line.top[index] : line.y[index]);
        for (const bound of ["low", "high", "min", "max"]) if (line[bound]) values.push(line[bound][index]);
      });
    return values;
  };

  // ---- drawing

  const round = (value) => Math.round(value * 100) / 100;
  const path = (points) => {
    let text = "";
    let isDown = false;
    for (const point of points) {
      if (point) text += `${isDown ? "L" : "M"}${round(point[0])} ${round(point[1])}`;
      isDown = Boolean(point);
    }
    return text;
  };
  const area = (lows, highs) => {
    const pieces = [];
    let piece = [];
    lows.forEach((low, index) => {
      if (low && highs[index]) piece.push([low, highs[index]]);
      else if (piece.length) pieces.push(piece.splice(0));
    });
    if (piece.length) pieces.push(piece);
    return pieces
      .map((part) => `${path([...part.map(([, high]) => high), ...part.map(([low]) => low).reverse()])}Z`)
      .join("");
  };

  const scaleOf = (chart) => {
    const { spec } = chart;
    const [from, to] = rangeOf(chart);
    const [low, high] = range(heights(chart, [from, to]), spec);
    const plotHeight = chart.height - 14 - 34;
    const count = Math.max(2, Math.round(plotHeight / 34));
    let yTicks, ySay;
    if (spec.log) {
      yTicks = logarithmic(low, high, count);
      ySay = (value) => logTick(value, spec.percent);
    } else {
      const found = linear(low, high, count, false);
      yTicks = found.ticks;
      ySay = (value) => tick(value, found.step, spec.percent);
    }
    const left = 12 + (chart.height > 250 ? 7 : 6.4) * Math.max(2, ...yTicks.map((value) => ySay(value).length));
    const [right, top, bottom] = [chart.width - 14, 14, chart.height - 34];
    const log = spec.log ? Math.log10 : (value) => value;
    const X = (x) => left + ((x - from) / (to - from)) * (right - left);
    const Y = (y) => bottom - ((log(y) - log(low)) / (log(high) - log(low))) * (bottom - top);
    const at = (x, y) => (isNumber(y) && !(spec.log && y <= 0) ? [X(placed(chart, x)), Y(y)] : null);
    return { from, to, left, right, top, bottom, X, Y, at, yTicks, ySay, floor: Y(spec.log ? low : Math.max(low, 0)) };
  };

  const drawAxes = (chart, scale) => {
    const { spec } = chart;
    const { left, right, top, bottom, X, Y, yTicks, ySay } = scale;
    const group = svg("g", { class: "axes", "aria-hidden": "true" });
    for (const value of yTicks) {
      group.append(svg("line", { class: "grid", x1: left, x2: right, y1: round(Y(value)), y2: round(Y(value)) }));
      group.append(svg("text", { class: "y", x: left - 6, y: round(Y(value) + 3.5) }, ySay(value)));
    }
    const isWhole = chart.isSteps ? !shared.axis || shared.axis.unit === "tokens" : spec.x_label.startsWith("position");
    const x = linear(scale.from, scale.to, Math.max(2, Math.round((right - left) / 70)), isWhole);
    for (const value of x.ticks) {
      group.append(svg("line", { class: "tick", x1: round(X(value)), x2: round(X(value)), y1: bottom, y2: bottom + 4 }));
      group.append(svg("text", { class: "x", x: round(X(value)), y: bottom + 15 }, tick(value, x.step, false)));
    }
    group.append(svg("line", { class: "base", x1: left, x2: right, y1: bottom, y2: bottom }));
    const label = chart.isSteps && shared.axis ? shared.axis.label : spec.x_label;
    group.append(svg("text", { class: "x label", x: round((left + right) / 2), y: bottom + 29 }, label));
    if (spec.unit) group.append(svg("text", { class: "unit", x: 2, y: 9 }, spec.unit));
    return group;
  };

  const drawLine = (chart, line, scale) => {
    const { at, left, right, Y } = scale;
    const group = svg("g", { class: `series ${line.kind}`, "data-label": line.label });
    group.style.setProperty("--c", colorOf(line.color));
    const points = line.x.map((x, index) => at(x, line.top[index]));
    const along = (name) => line.x.map((x, index) => at(x, line[name][index]));
    const stroke = { "stroke-dasharray": DASHES[line.dash] ?? "" };
    if (line.kind === "level") {
      const y = round(Y(line.y[0]));
      if (isNumber(line.low?.[0])) {
        const [upper, lower] = [Y(line.high[0]), Y(line.low[0])];
        group.append(svg("rect", { class: "band", x: left, width: right - left, y: round(upper), height: round(lower - upper) }));
      }
      group.append(svg("line", { class: "curve", x1: left, x2: right, y1: y, y2: y, ...stroke }));
      return group;
    }
    if (line.kind === "bars") return drawBars(group, line, scale);
    if (line.kind === "stack") {
      const base = line.x.map((x, index) => at(x, line.base[index]));
      group.append(svg("path", { class: "filled", d: area(base, points) }));
      return group;
    }
    if (line.min) group.append(svg("path", { class: "spread", d: area(along("min"), along("max")) }));
    if (line.low && line.kind === "line") group.append(svg("path", { class: "band", d: area(along("low"), along("high")) }));
    if (line.low && line.kind === "points")
      along("low").forEach((low, index) => {
        const high = at(line.x[index], line.high[index]);
        if (low && high) group.append(svg("path", { class: "whisker", d: path([low, high]) }));
      });
    if (line.kind === "line") {
      if (line.smooth) group.append(svg("path", { class: "raw", d: path(along("y")) }));
      group.append(svg("path", { class: "curve", d: path(points), ...stroke }));
    }
    points.forEach((point, index) => {
      if (!point) return;
      const isAlone = !points[index - 1] && !points[index + 1];
      if (line.kind === "points") {
        const [x, y] = point.map(round);
        group.append(svg("path", { class: "mark", d: `M${x} ${y - 5.5}L${x + 5.5} ${y}L${x} ${y + 5.5}L${x - 5.5} ${y}Z` }));
      } else if (isAlone || points.length <= (line.marks ? 150 : 40))
        group.append(svg("circle", { class: "mark", cx: round(point[0]), cy: round(point[1]), r: 2.6 }));
    });
    return group;
  };

  const drawBars = (group, line, { at, left, right, floor }) => {
    const places = line.x.map((x) => at(x, 1)?.[0]);
    const gap = places.length > 1 ? Math.abs(places[1] - places[0]) : (right - left) / 3;
    const width = Math.max(1, Math.min(gap * 0.82, 48));
    line.x.forEach((x, index) => {
      const [upper, lower] = [at(x, line.top[index]), at(x, line.base[index])];
      const y = upper ? upper[1] : floor;
      const height = round((lower ? lower[1] : floor) - y);
      if (height > 0) group.append(svg("rect", { class: "filled", x: round(places[index] - width / 2), y: round(y), width: round(width), height }));
    });
    return group;
  };

  const draw = (chart) => {
    if (!chart.width) return;
    const scale = (chart.scale = scaleOf(chart));
    const { left, right, top, bottom } = scale;
    const picture = svg("svg", { viewBox: `0 0 ${chart.width} ${chart.height}`, width: chart.width, height: chart.height, "aria-hidden": "true" });
    const series = svg("g", {});
    if (chart.zoom) {
      const id = `clip-${chart.id}`;
      picture.append(svg("clipPath", { id }, svg("rect", { x: left, y: top - 4, width: right - left, height: bottom - top + 8 })));
      series.setAttribute("clip-path", `url(#${id})`);
    }
    series.append(...chart.lines.map((line) => drawLine(chart, line, scale)));
    chart.pointer = svg("g", { class: "pointer" });
    picture.append(drawAxes(chart, scale), series, chart.pointer);
    chart.host.replaceChildren(picture, chart.tip);
    const stops = new Set(chart.lines.filter((line) => line.kind !== "level").flatMap((line) => line.x));
    chart.stops = [...stops].sort((a, b) => a - b);
  };

  const swatch = (line) => {
    const stroke = { x1: 0, x2: 18, y1: 6, y2: 6, "stroke-dasharray": DASHES[line.dash] ?? "" };
    const filled = () => svg("rect", { class: "filled", x: 3, y: 1, width: 11, height: 11, rx: 2 });
    const stroked = () => svg("line", { class: "curve", ...stroke });
    const shapes = { points: () => svg("path", { class: "mark", d: "M9 1L14 6L9 11L4 6Z" }), bars: filled, stack: filled };
    const picture = svg("svg", { class: "swatch", width: 18, height: 12, "aria-hidden": "true" }, (shapes[line.kind] ?? stroked)());
    picture.style.setProperty("--c", colorOf(line.color));
    return picture;
  };

  return { mounted, shared, svg, html, colorOf, isNumber, prepared, short, described, lastIndex, nearest, placed, round, draw, swatch };
})();
