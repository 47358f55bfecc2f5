// Pixels of lanes, axes and latencies: what drawing costs depends on the size of the picture, not on the exits in it.

import { BINS, A_DECADE, GUEST, TOGETHER, OUTSIDE, FIRST } from "./exit_store.js";

// Reasons have this many colours, then the same with lines through them.
export const COLOURS = 8;
const UNITS = [[1e9, "s"], [1e6, "ms"], [1e3, "us"], [1, "ns"]];
// Of a lane's height, above the shares of time: where exits were at all.
const TICKS = 0.18;

export function duration(ns) {
  const [size, name] = UNITS.find(([each]) => Math.abs(ns) >= each) ?? UNITS[3];
  const value = ns / size;
  return `${size === 1 || Math.abs(value) >= 999.5 ? Math.round(value).toLocaleString("en") : value.toPrecision(3)} ${name}`;
}

// The theme's colours as numbers that a picture's memory takes; asked for when the theme changes.
export function palette(element) {
  const style = getComputedStyle(element);
  const probe = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const read = (name) => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = style.getPropertyValue(name).trim() || "#888";
    probe.fillRect(0, 0, 1, 1);
    return new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0];
  };
  const back = read("--kb-lane-back");
  const mixed = (one) => [0, 8, 16, 24].reduce((sofar, at) => sofar + (Math.round(0.5 * ((one >>> at) & 255) + 0.5 * ((back >>> at) & 255)) << at >>> 0), 0);
  const reasons = Array.from({ length: COLOURS }, (_, n) => read(`--kb-reason-${n}`));
  const text = (name) => style.getPropertyValue(name).trim();
  return {
    guest: read("--kb-guest"), together: read("--kb-together"), back, dots: read("--kb-stood"), hidden: read("--kb-hidden"),
    reasons, light: reasons.map(mixed),
    fore: text("--kb-fore") || "#000", dim: text("--kb-dim") || "#666", line: text("--kb-line") || "#888", name: text("--kb-name") || "#00f", bad: text("--kb-bad") || "#b00",
    ground: text("--kb-back") || "#fff",
  };
}

// A lane into `pixels`: for each column the shares of time one above the other, and on top a tick where exits were.
//   shares(column, kind), ticks: a reason for each column or -1.
export function paintLane(pixels, width, left, top, columns, height, kinds, shares, ticks, colours, shown) {
  const tick = ticks ? Math.max(2, Math.round(height * TICKS)) : 0;
  const base = top + height, room = height - tick - (tick ? 1 : 0);
  for (let column = 0; column < columns; column++) {
    const x = left + column;
    if (tick && ticks[column] >= 0) {
      const colour = colours.reasons[ticks[column] % COLOURS];
      for (let y = top; y < top + tick; y++) pixels[y * width + x] = colour;
    }
    let sofar = 0, y = base;
    const stack = (kind) => {
      const share = shares[column * kinds + kind];
      if (!(share > 0)) return;
      sofar = Math.min(1, sofar + share);
      const to = base - Math.round(sofar * room);
      if (to >= y) return;
      const reason = (kind - FIRST) >> 1;
      const answered = kind >= FIRST && (kind - FIRST) & 1;
      const lined = kind >= FIRST && reason >= COLOURS;
      const colour = kind === GUEST ? colours.guest : kind === TOGETHER ? colours.together : kind === OUTSIDE ? colours.back : shown[reason] ? colours.reasons[reason % COLOURS] : colours.hidden;
      while (y > to) {
        y -= 1;
        const gap = kind === OUTSIDE ? (x & 3) === 0 && (y & 3) === 0 : answered ? ((x + y) & 7) < 3 : lined && (y & 3) === 0;
        pixels[y * width + x] = !gap ? colour : kind === OUTSIDE ? colours.dots : answered && shown[reason] ? colours.light[reason % COLOURS] : colours.back;
      }
    };
    stack(GUEST);
    stack(TOGETHER);
    for (let kind = FIRST; kind < kinds; kind += 2) stack(kind);
    for (let kind = FIRST + 1; kind < kinds; kind += 2) stack(kind);
    stack(OUTSIDE);
  }
}

// Round moments for an axis. Far from zero they are told as distances from one that is told whole.
export function ticksOf(from, to, most) {
  const span = to - from;
  const rough = span / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? power * 10;
  const far = Math.max(Math.abs(from), Math.abs(to)) > 2000 * span;
  const base = far ? Math.ceil(from / step) * step : 0;
  const [size, unit] = UNITS.find(([each]) => (far ? span : Math.max(Math.abs(from), Math.abs(to))) >= 2 * each) ?? UNITS[3];
  const digits = Math.max(0, Math.min(9, Math.ceil(-Math.log10(step / size) - 1e-9)));
  const ticks = [];
  for (let at = Math.ceil(from / step) * step + 0; at <= to; at += step) {
    const words = ((at - base) / size || 0).toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    ticks.push([at, far ? (at === base ? whole(base) : `+${words}`) : words]);
  }
  return { ticks, unit };
}

function whole(ns) {
  return Math.abs(ns) >= 1e9 ? `${(ns / 1e9).toFixed(9)} s` : `${(ns / 1e6).toFixed(6)} ms`;
}

// How long exits took: bars, and a line that says up to how long how many did. Returns their number and some places.
export function paintLatencies(context, width, height, found, colours) {
  context.clearRect(0, 0, width, height);
  let total = 0, first = BINS, last = 0, peak = 1;
  for (let bin = 0; bin < BINS; bin++) {
    if (!found[bin]) continue;
    total += found[bin];
    first = Math.min(first, bin);
    last = bin;
    peak = Math.max(peak, found[bin]);
  }
  if (!total) return { total };
  // Whole decades, for the axis.
  first = Math.floor(first / A_DECADE) * A_DECADE;
  last = Math.ceil((last + 1) / A_DECADE) * A_DECADE;
  const base = height - 14, high = base - 4, step = width / (last - first), percentiles = {};
  context.font = "11px sans-serif";
  context.fillStyle = colours.dim;
  context.strokeStyle = colours.line;
  context.beginPath();
  for (let bin = first; bin <= last; bin += A_DECADE) {
    const x = Math.min(width - 0.5, Math.round((bin - first) * step) + 0.5);
    context.moveTo(x, 0);
    context.lineTo(x, base + 3);
    context.textAlign = bin === first ? "left" : bin === last ? "right" : "center";
    context.fillText(duration(10 ** (bin / A_DECADE)).replace(".00", "").replace(".0", ""), x, height - 2);
  }
  context.moveTo(0, base + 0.5);
  context.lineTo(width, base + 0.5);
  context.stroke();
  context.fillStyle = colours.name;
  const line = new Path2D();
  let sofar = 0;
  line.moveTo(0, base);
  for (let bin = first; bin < last; bin++) {
    const tall = found[bin] ? Math.max(1.5, (high * found[bin]) / peak) : 0;
    context.fillRect((bin - first) * step + 0.5, base - tall, Math.max(1, step - 1), tall);
    for (const percent of [50, 99]) {
      const wanted = (total * percent) / 100;
      if (sofar < wanted && sofar + found[bin] >= wanted) percentiles[percent] = 10 ** ((bin + (wanted - sofar) / found[bin]) / A_DECADE);
    }
    sofar += found[bin];
    line.lineTo((bin - first + 1) * step, base - (high * sofar) / total);
  }
  context.strokeStyle = colours.fore;
  context.lineWidth = 1.5;
  context.stroke(line);
  context.lineWidth = 1;
  return { total, p50: percentiles[50], p99: percentiles[99] };
}
