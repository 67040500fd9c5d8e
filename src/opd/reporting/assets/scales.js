"use strict";
// Axes and numbers of charts: ticks at round values, and values as text.
const opdScales = (() => {
  const DIGITS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
  const power = (exponent) => "10" + [...String(exponent)].map((digit) => DIGITS[digit]).join("");
  const minus = (text) => text.replace(/^-/, "−");
  const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  const thousands = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");

  // A value with four digits: 0.01235, 12,346, 1.235×10⁻⁵.
  const number = (value) => {
    const size = Math.abs(value);
    if (size === 0) return "0";
    if (size < 1e-3 || size >= 1e9) {
      const [mantissa, exponent] = value.toExponential(3).split("e");
      return minus(`${trimmed(mantissa)}×${power(Number(exponent))}`);
    }
    if (size >= 1000) return minus(thousands(value.toFixed(0)));
    return minus(trimmed(value.toPrecision(4)));
  };
  const share = (value) => minus(`${(100 * value).toFixed(1)}%`);

  // 1, 2 or 5 times a power of ten, so that about `count` steps fill `span`.
  const niceStep = (span, count) => {
    const rough = span / Math.max(1, count);
    const base = 10 ** Math.floor(Math.log10(rough));
    const away = (factor) => Math.abs(Math.log((factor * base) / rough));
    return base * [1, 2, 5, 10].reduce((best, factor) => (away(factor) < away(best) ? factor : best));
  };

  const linear = (low, high, count, whole) => {
    let step = niceStep(high - low, count);
    if (whole) step = Math.max(1, Math.round(step));
    const first = Math.ceil(low / step - 1e-9);
    const last = Math.floor(high / step + 1e-9);
    const ticks = [];
    for (let index = first; index <= last; index++) ticks.push(index * step);
    return { ticks, step };
  };

  const logarithmic = (low, high, count) => {
    const first = Math.floor(Math.log10(low));
    const last = Math.ceil(Math.log10(high));
    const decades = Math.log10(high / low);
    const factors = decades < 1.2 ? [1, 2, 3, 5, 7] : decades < 2.5 ? [1, 2, 5] : [1];
    const every = Math.max(1, Math.ceil(decades / count));
    const ticks = [];
    for (let exponent = first; exponent <= last; exponent++) {
      if (factors.length === 1 && exponent % every !== 0) continue;
      factors.forEach((factor) => ticks.push(factor * 10 ** exponent));
    }
    return ticks.filter((tick) => tick >= low * 0.9999 && tick <= high * 1.0001);
  };

  // Ticks of one axis read alike: 0.5, 1.0; 200k, 400k; 10⁻⁴, 10⁻³.
  const tick = (value, step, percent) => {
    if (percent) return minus(`${trimmed((100 * value).toFixed(Math.max(0, -Math.floor(Math.log10(100 * step) + 1e-9))))}%`);
    if (value === 0) return "0";
    if (step >= 1e6) return minus(`${trimmed((value / 1e6).toFixed(1))}M`);
    if (step >= 5e3) return minus(`${trimmed((value / 1e3).toFixed(1))}k`);
    if (step < 1e-4) return number(value).replace(/^1×/, "");
    const places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
    return minus(places ? value.toFixed(Math.min(places, 6)) : thousands(value.toFixed(0)));
  };
  const logTick = (value, percent) => {
    if (percent) return `${trimmed((100 * value).toPrecision(2))}%`;
    if (value >= 1e-3 && value < 1e4) return trimmed(value.toFixed(4));
    return number(value).replace(/^1×/, "");
  };

  // The range of the y axis: every value lies in it, spikes too.
  const range = (values, { log, zero, percent }) => {
    let low = Infinity;
    let high = -Infinity;
    for (const value of values) {
      if (value === null || value === undefined || (log && value <= 0)) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
    if (low > high) return log ? [0.1, 1] : [0, 1];
    if (log) {
      const margin = Math.max(Math.log10(high / low) * 0.05, 0.02);
      return [low / 10 ** margin, high * 10 ** margin];
    }
    const isPositive = low >= 0;
    if (zero && isPositive) low = 0;
    const margin = (high - low || Math.abs(high) || 1) * 0.06;
    const top = percent && high <= 1 ? Math.min(high + margin, 1.02) : high + margin;
    return [zero && isPositive ? 0 : isPositive ? Math.max(0, low - margin) : low - margin, top];
  };

  return { number, share, linear, logarithmic, tick, logTick, range };
})();
