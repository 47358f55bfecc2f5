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

// How each kind of time is painted, from below upwards: its colour, and where there are lines through it another.
const PLAIN = 0, DOTTED = 1, STRIPED = 2, LINED = 3;
function looksOf(kinds, colours, shown) {
  const looks = [
    { kind: GUEST, colour: colours.guest, other: 0, pattern: PLAIN },
    { kind: TOGETHER, colour: colours.together, other: 0, pattern: PLAIN },
  ];
  for (const user of [0, 1]) {
    for (let kind = FIRST + user; kind < kinds; kind += 2) {
      const reason = (kind - FIRST) >> 1, one = reason % COLOURS, seen = shown[reason];
      const pattern = user ? STRIPED : reason >= COLOURS ? LINED : PLAIN;
      looks.push({ kind, colour: seen ? colours.reasons[one] : colours.hidden, other: user && seen ? colours.light[one] : colours.back, pattern });
    }
  }
  return [...looks, { kind: OUTSIDE, colour: colours.back, other: colours.dots, pattern: DOTTED }];
}

// A lane into `pixels`: for each column the shares of time one above the other, and on top a tick where exits were.
//   shares(column, kind), ticks: a reason for each column or -1; dots: how wide a column is.
export function paintLane(pixels, width, left, top, columns, height, kinds, shares, ticks, colours, shown, dots = 1) {
  const tick = ticks ? Math.max(2, Math.round(height * TICKS)) : 0;
  const base = top + height, room = height - tick - (tick ? 1 : 0);
  const looks = looksOf(kinds, colours, shown), many = looks.length, order = looks.map((look) => look.kind);
  let high = new Uint16Array(many), before = new Uint16Array(many), ticked = -1, begin = left;
  const fill = (begin, end) => {
    if (ticked >= 0) {
      const colour = colours.reasons[ticked % COLOURS];
      for (let y = top; y < top + tick; y++) pixels.fill(colour, y * width + begin, y * width + end);
    }
    let low = 0;
    for (let n = 0; n < many; n++) {
      if (before[n] === low) continue;
      const { colour, other, pattern } = looks[n];
      for (let y = base - 1 - low; y >= base - before[n]; y--) {
        const row = y * width;
        if (end - begin > 16) pixels.fill(colour, row + begin, row + end);
        else for (let x = begin; x < end; x++) pixels[row + x] = colour;
        if (pattern === STRIPED) for (let x = begin; x < end; x++) if (((x + y) & 7) < 3) pixels[row + x] = other;
        if (pattern === LINED && (y & 3) === 0) pixels.fill(other, row + begin, row + end);
        if (pattern === DOTTED && (y & 3) === 0) for (let x = (begin + 3) & ~3; x < end; x += 4) pixels[row + x] = other;
      }
      low = before[n];
    }
  };
  // Columns side by side that look the same are painted as one.
  for (let column = 0; column < columns; column++) {
    const at = column * kinds, mine = ticks ? ticks[column] : -1;
    let sofar = 0, same = column > 0 && mine === ticked;
    for (let n = 0; n < many; n++) {
      const share = shares[at + order[n]];
      if (share > 0) sofar = Math.min(1, sofar + share);
      high[n] = Math.round(sofar * room);
      same &&= high[n] === before[n];
    }
    if (same) continue;
    const x = left + column * dots;
    if (column) fill(begin, x);
    [before, high, ticked, begin] = [high, before, mine, x];
  }
  if (columns) fill(begin, Math.min(width, left + columns * dots));
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
