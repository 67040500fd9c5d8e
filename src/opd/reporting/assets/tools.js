"use strict";
// Around the charts: their buttons, the large view with its zoom, the data as CSV, and the choice of the x axis.
(() => {
  const { mount, unmount, draw, setAxis } = opdCharts;
  const { svg, html, placed } = opdDrawing;
  const ICONS = {
    large: "M2.5 6V2.5H6M10 2.5h3.5V6M13.5 10v3.5H10M6 13.5H2.5V10",
    data: "M8 2v8.5M4.5 7.2L8 10.7l3.5-3.5M2.5 13.5h11",
    close: "M3.5 3.5l9 9M12.5 3.5l-9 9",
  };
  const button = (icon, label, act) => {
    const element = html("button", "tool");
    element.type = "button";
    element.title = label;
    element.setAttribute("aria-label", label);
    element.append(svg("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, svg("path", { d: ICONS[icon] })));
    element.addEventListener("click", act);
    return element;
  };

  // ---- data as CSV (RFC 4180). A spreadsheet would compute a text that begins like a formula.
  const quoted = (text) => {
    const safe = /^[=+\-@\t\r]/.test(text) ? `'${text}` : text;
    return /[",\r\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const PARTS = { y: "", low: " (low, 95%)", high: " (high, 95%)", min: " (smallest)", max: " (largest)" };
  const csv = (spec) => {
    const columns = spec.lines.flatMap((line) =>
      Object.entries(PARTS)
        .filter(([part]) => line[part])
        .map(([part, words]) => ({ title: line.label + words, at: new Map(line.x.map((x, index) => [x, line[part][index]])) })),
    );
    const xs = [...new Set(spec.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const rows = [[spec.x_label, ...columns.map((column) => column.title)].map(quoted)];
    for (const x of xs) rows.push([x, ...columns.map((column) => column.at.get(x) ?? "")]);
    return rows.map((row) => row.join(",")).join("\r\n") + "\r\n";
  };
  const download = (spec) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([csv(spec)], { type: "text/csv" }));
    link.download = `${spec.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "chart"}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const dataButton = (spec) => button("data", `Download the data of “${spec.title}” as CSV`, () => download(spec));

  // ---- one chart, large; dragging over it, or + and −, zooms
  let dialog = null;
  const enlarge = (spec, note) => {
    dialog?.remove();
    dialog = html("dialog", "large");
    dialog.setAttribute("aria-label", spec.title);
    const head = html("div", "head");
    const title = html("div", "");
    title.append(html("h2", "", spec.title), html("p", "note", note));
    const whole = html("button", "whole", "Whole range");
    whole.type = "button";
    whole.hidden = true;
    const tools = html("div", "tools");
    tools.append(whole, dataButton(spec), button("close", "Close", () => dialog.close()));
    head.append(title, tools);
    const body = html("div", "body");
    dialog.append(head, body, html("p", "hint", "Drag over the chart, or press + and −, to see a part of it. Arrow keys move the cursor."));
    document.body.append(dialog);
    dialog.showModal();
    const chart = mount(body, spec, { height: Math.max(260, Math.min(innerHeight - 260, 560)) });
    const zoomTo = (part) => {
      whole.hidden = part === null;
      draw(Object.assign(chart, { zoom: part }));
    };
    whole.addEventListener("click", () => zoomTo(null));
    dialog.addEventListener("close", () => {
      unmount(chart);
      dialog.remove();
    });
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
    zoomable(chart, zoomTo);
    chart.host.focus();
  };
  const zoomable = (chart, zoomTo) => {
    const { host } = chart;
    const inside = (event) => {
      const box = host.firstChild.getBoundingClientRect();
      const { left, right, from, to } = chart.scale;
      const across = Math.min(Math.max(((event.clientX - box.left) / box.width) * chart.width, left), right);
      return { across, x: from + ((across - left) / (right - left)) * (to - from) };
    };
    let start = null;
    host.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch") return;
      start = inside(event);
      chart.dragged = svg("rect", { class: "dragged", x: start.across, width: 0, y: chart.scale.top, height: chart.scale.bottom - chart.scale.top });
      chart.pointer.append(chart.dragged);
      host.setPointerCapture(event.pointerId);
    });
    host.addEventListener("pointermove", (event) => {
      if (!start) return;
      const { across } = inside(event);
      chart.dragged.setAttribute("x", Math.min(across, start.across));
      chart.dragged.setAttribute("width", Math.abs(across - start.across));
    });
    host.addEventListener("pointerup", (event) => {
      if (!start) return;
      const [one, other] = [start, inside(event)];
      chart.dragged.remove();
      start = chart.dragged = null;
      if (Math.abs(one.across - other.across) > 8) zoomTo([Math.min(one.x, other.x), Math.max(one.x, other.x)]);
    });
    host.addEventListener("dblclick", () => zoomTo(null));
    host.addEventListener("keydown", (event) => {
      const factor = { "+": 0.5, "=": 0.5, "-": 2 }[event.key];
      if (event.key === "0") zoomTo(null);
      if (!factor) return;
      const { from, to } = chart.scale;
      const centre = chart.at === null ? (from + to) / 2 : placed(chart, chart.at);
      const part = [centre - (centre - from) * factor, centre + (to - centre) * factor];
      zoomTo(null);
      const everything = chart.scale;
      const [low, high] = [Math.max(part[0], everything.from), Math.min(part[1], everything.to)];
      if (low > everything.from || high < everything.to) zoomTo([low, high]);
      event.preventDefault();
    });
  };

  for (const figure of document.querySelectorAll("figure.chart")) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const note = figure.querySelector("figcaption p")?.textContent ?? "";
    const open = () => enlarge(spec, note);
    const tools = html("div", "tools");
    tools.append(button("large", `Open “${spec.title}” large`, open), dataButton(spec));
    mount(figure, spec).enlarge = open;
    figure.append(tools);
  }

  // ---- the x axis of every chart over the run
  const place = document.getElementById("axes");
  const choices = place ? JSON.parse(document.getElementById("axes-data").textContent) : [];
  const interpolated = ({ steps, values }) => {
    const known = steps.map((step, index) => [step, values[index]]).filter(([, value]) => value !== null);
    return (x) => {
      if (!known.length) return NaN;
      if (x <= known[0][0]) return known[0][1];
      if (x >= known.at(-1)[0]) return known.at(-1)[1];
      let [before, after] = [0, known.length - 1];
      while (after - before > 1) {
        const middle = (before + after) >> 1;
        if (known[middle][0] < x) before = middle;
        else after = middle;
      }
      const [[x0, y0], [x1, y1]] = [known[before], known[after]];
      return y0 + ((x - x0) / (x1 - x0)) * (y1 - y0);
    };
  };
  if (place) {
    const field = document.createElement("fieldset");
    field.append(html("legend", "", "Charts over"));
    for (const choice of [null, ...choices]) {
      const label = html("label", "");
      const radio = document.createElement("input");
      Object.assign(radio, { type: "radio", name: "x-axis", checked: choice === null, value: choice?.name ?? "step" });
      radio.addEventListener("change", () => setAxis(choice && { ...choice, at: interpolated(choice) }));
      label.append(radio, html("span", "", choice?.name ?? "step"));
      field.append(label);
    }
    place.append(field);
  }
})();
