// The canvases of an exit trace: lanes with their axis, marks and gaps, a small picture of everything, latencies.

import { FIRST } from "./exit_store.js";
import { paintLane, paintLatencies, ticksOf } from "./exit_paint.js";

export const AXIS = 20;
export const GUTTER = 66;
const MAP = 18, LATENCIES = 84, MOST_HEIGHT = 460, MOST_NAMES = 200;
// Where so many exits share a dot, and there are more columns than this in all lanes, a column is several dots wide.
const DENSE = 2, MOST_COLUMNS = 14000;

// pictures(data, elements): data is a store. Returns { scene, paint, ... } and what places are which moments.
export function pictures(data, { canvas, map, latencies, scroller, filler }) {
  // What is drawn, and what of it: the panel sets this.
  const scene = {
    view: {}, shown: [], from: 0, to: 1, width: 0, height: 0, ratio: 1, colours: null,
    moments: { number: -1, times: [], lanes: [], gaps: [], texts: [] }, chosen: [], exit: null, stale: false,
  };
  let image = null, painted = [], buckets = null;
  const scratch = {};
  // Before all columns are there, and while the kernel is too busy to send them, the small picture is drawn.
  const has = () => data.n > 0 && data.n === data.total && !scene.stale;
  const start = () => (has() ? data.start : scene.view.picture?.start ?? 0);
  const end = () => (has() ? data.end : scene.view.picture?.end ?? 1);
  const wide = () => Math.max(1, scene.width - GUTTER);
  const timeAt = (x) => scene.from + ((x - GUTTER) / wide()) * (scene.to - scene.from);
  const placeOf = (time) => GUTTER + ((time - scene.from) / (scene.to - scene.from)) * wide();
  const laneHeight = () => {
    const count = Math.max(1, scene.view.lanes?.length ?? 1);
    return count <= 4 ? 56 : count <= 8 ? 32 : count <= 24 ? 20 : 14;
  };
  const clock = () => (scene.view.clock ? ` (${scene.view.clock})` : "");

  const sized = (element, w, high) => {
    const [x, y] = [Math.round(w * scene.ratio), Math.round(high * scene.ratio)];
    if (element.width !== x || element.height !== y) [element.width, element.height] = [x, y];
    element.style.width = `${w}px`;
    element.style.height = `${high}px`;
    const brush = element.getContext("2d");
    brush.setTransform(scene.ratio, 0, 0, scene.ratio, 0, 0);
    return brush;
  };
  const room = (name, kind, size) => {
    if (!(scratch[name]?.length >= size)) scratch[name] = new kind(size);
    return scratch[name];
  };
  function paintLanes(lanes, first, last, tall, wideDots, highDots) {
    const pixels = new Uint32Array(image.data.buffer);
    pixels.fill(scene.colours.back);
    const many = scene.view.reasons?.length ?? 0, kinds = FIRST + 2 * many, rare = byRareness();
    for (let n = first; n < last; n++) {
      const top = Math.round((n * tall - scroller.scrollTop + 2) * scene.ratio), high = Math.round((tall - 5) * scene.ratio);
      if (top < 0 || top + high > highDots) continue;
      if (has() && data.lanes()[n]) {
        const found = data.lanes()[n], dense = data.after(found, scene.to) - data.after(found, scene.from) > DENSE * wideDots;
        const dots = dense ? Math.max(1, Math.round((wideDots * (last - first)) / MOST_COLUMNS)) : 1, columns = Math.ceil(wideDots / dots);
        const shares = room("shares", Float64Array, wideDots * kinds), counts = room("counts", Uint32Array, wideDots * many), ticks = room("ticks", Int16Array, wideDots);
        data.columns(found, scene.from, scene.from + ((scene.to - scene.from) * columns * dots) / wideDots, columns, shares, counts);
        rarest(rare, counts, columns, many, ticks);
        paintLane(pixels, wideDots, 0, top, columns, high, kinds, shares, ticks, scene.colours, scene.shown, dots);
      } else if (scene.view.picture?.lanes[n]) paintLane(pixels, wideDots, 0, top, wideDots, high, kinds, stretched(n, wideDots, kinds), null, scene.colours, scene.shown);
    }
  }
  function drawLanes() {
    const lanes = scene.view.lanes ?? [], tall = laneHeight();
    const visible = Math.min(MOST_HEIGHT, AXIS + Math.max(1, lanes.length) * tall);
    scene.height = visible;
    scroller.style.height = `${visible}px`;
    filler.style.height = `${Math.max(0, AXIS + lanes.length * tall - visible)}px`;
    const brush = sized(canvas, scene.width, scene.height);
    const wideDots = Math.round(wide() * scene.ratio), highDots = Math.round((scene.height - AXIS) * scene.ratio);
    if (image?.width !== wideDots || image?.height !== highDots) image = new ImageData(wideDots, Math.max(1, highDots));
    const first = Math.floor(scroller.scrollTop / tall), last = Math.min(lanes.length, Math.ceil((scroller.scrollTop + scene.height - AXIS) / tall));
    brush.clearRect(0, 0, scene.width, scene.height);
    // A pointer that moves over the lanes changes nothing in them.
    const made = [image, has(), data.n, data.version, scene.view, scene.shown, scene.colours, scene.from, scene.to, scroller.scrollTop];
    if (!made.every((value, n) => value === painted[n])) {
      painted = made;
      paintLanes(lanes, first, last, tall, wideDots, highDots);
    }
    brush.putImageData(image, Math.round(GUTTER * scene.ratio), Math.round(AXIS * scene.ratio));
    if (has()) for (let n = first; n < last; n++) drawNames(brush, n, AXIS + n * tall - scroller.scrollTop, tall);
    drawGaps(brush);
    if (lanes.length) drawAxis(brush);
    drawMarks(brush, tall);
    brush.font = "12px sans-serif";
    brush.fillStyle = scene.colours.fore;
    brush.textAlign = "left";
    for (let n = first; n < last; n++) brush.fillText(lanes[n].name, 2, AXIS + n * tall - scroller.scrollTop + tall / 2 + 4, GUTTER - 6);
    if (!lanes.length) {
      brush.fillStyle = scene.colours.dim;
      brush.fillText(scene.view.begun === false ? "The trace has not begun: with t: m.cpu.run()" : scene.view.live ? "No exits yet: run the guest" : "No exits in this trace", GUTTER + 8, AXIS + 26);
    }
    drawChosen(brush, tall);
  }
  // Words on a ground of their own: what is below them has any colour.
  function label(brush, text, x, y, colour) {
    const long = brush.measureText(text).width;
    brush.fillStyle = scene.colours.ground;
    brush.globalAlpha = 0.85;
    brush.fillRect(x - 2, y - 10, long + 4, 13);
    brush.globalAlpha = 1;
    brush.fillStyle = colour;
    brush.fillText(text, x, y);
    return x + long;
  }
  // What exits are, where there is room to say it.
  function drawNames(brush, n, top, tall) {
    const found = data.lanes()[n];
    const first = Math.max(0, data.after(found, scene.from) - 1), last = data.after(found, scene.to);
    if (last - first > MOST_NAMES || tall < 20) return;
    brush.font = "11px sans-serif";
    brush.textAlign = "left";
    for (let at = first; at < last; at++) {
      const left = Math.max(GUTTER, placeOf(found.time[at])), right = Math.min(scene.width, placeOf(data.ends(found, at)));
      const name = scene.view.reasons[found.reason[at]]?.name ?? "";
      if (scene.shown[found.reason[at]] && right - left > brush.measureText(name).width + 10) label(brush, name, left + 5, top + tall / 2 + 6, scene.colours.fore);
    }
  }
  // Of the exits in a column, the reason that the trace has least of: what is rare must not hide behind what is not.
  const byRareness = () => (scene.view.reasons ?? []).map((_, n) => n).filter((n) => scene.shown[n]).sort((a, b) => scene.view.reasons[a].count - scene.view.reasons[b].count);
  function rarest(rare, counts, columns, many, ticks) {
    for (let column = 0; column < columns; column++) {
      ticks[column] = -1;
      for (const reason of rare) {
        if (!counts[column * many + reason]) continue;
        ticks[column] = reason;
        break;
      }
    }
  }
  // The picture in the widget's state: where there are no columns.
  function decoded() {
    const source = scene.view.picture;
    if (buckets?.source !== source) {
      const lanes = (source?.lanes ?? []).map((lane) => Object.fromEntries(Object.entries(lane).map(([kind, text]) => [kind, Uint8Array.from(atob(text), (each) => each.charCodeAt(0))])));
      buckets = { source, lanes };
    }
    return buckets.lanes;
  }
  function stretched(n, columns, kinds, low = scene.from, high = scene.to) {
    const shares = room("shares", Float64Array, columns * kinds), { start: begin, end: last, buckets: many } = scene.view.picture;
    shares.fill(0);
    for (const [kind, list] of Object.entries(decoded()[n])) {
      for (let column = 0; column < columns; column++) {
        const at = Math.floor(((low + ((column + 0.5) / columns) * (high - low) - begin) / (last - begin)) * many);
        if (Number(kind) < kinds && at >= 0 && at < many) shares[column * kinds + Number(kind)] = list[at] / 255;
      }
    }
    return shares;
  }
  function drawMap() {
    const brush = sized(map, scene.width, MAP), columns = Math.round(wide() * scene.ratio), high = Math.round(MAP * scene.ratio);
    brush.clearRect(0, 0, scene.width, MAP);
    const lanes = scene.view.picture?.lanes.length ?? 0;
    if (!lanes) return;
    const kinds = FIRST + 2 * scene.view.reasons.length;
    if (scratch.map?.source !== scene.view.picture || scratch.map.columns !== columns || scratch.map.shown !== scene.shown || scratch.map.colours !== scene.colours || scratch.map.end !== end()) {
      const small = new ImageData(columns, high), pixels = new Uint32Array(small.data.buffer);
      pixels.fill(scene.colours.back);
      const each = Math.max(1, Math.floor(high / lanes));
      for (let n = 0; n < lanes && (n + 1) * each <= high; n++) paintLane(pixels, columns, 0, n * each, columns, each, kinds, stretched(n, columns, kinds, start(), end()), null, scene.colours, scene.shown);
      scratch.map = { source: scene.view.picture, columns, shown: scene.shown, colours: scene.colours, end: end(), small };
    }
    brush.putImageData(scratch.map.small, Math.round(GUTTER * scene.ratio), 0);
    const left = GUTTER + ((scene.from - start()) / (end() - start())) * wide(), right = GUTTER + ((scene.to - start()) / (end() - start())) * wide();
    brush.fillStyle = scene.colours.ground;
    brush.globalAlpha = 0.65;
    brush.fillRect(GUTTER, 0, left - GUTTER, MAP);
    brush.fillRect(right, 0, scene.width - right, MAP);
    brush.globalAlpha = 1;
    brush.strokeStyle = scene.colours.fore;
    brush.lineWidth = 1.5;
    brush.strokeRect(left + 0.75, 0.75, Math.max(2, right - left - 1.5), MAP - 1.5);
    brush.fillStyle = scene.colours.dim;
    brush.font = "11px sans-serif";
    brush.fillText("all", 2, MAP - 5);
  }
  function drawAxis(brush) {
    const { ticks, unit } = ticksOf(scene.from, scene.to, Math.max(2, wide() / 110));
    brush.font = "11px sans-serif";
    brush.fillStyle = scene.colours.dim;
    brush.strokeStyle = scene.colours.line;
    brush.textAlign = "left";
    brush.fillText(`${unit}`, 2, 13);
    brush.beginPath();
    let free = GUTTER;
    for (const [at, text] of ticks) {
      const x = Math.round(placeOf(at)) + 0.5;
      brush.moveTo(x, AXIS - 4);
      brush.lineTo(x, scene.height);
      const long = brush.measureText(text).width;
      const left = Math.min(x + 3, scene.width - long - 2);
      if (left >= free) {
        brush.fillText(text, left, 12);
        free = left + long + 8;
      }
    }
    brush.globalAlpha = 0.5;
    brush.stroke();
    brush.globalAlpha = 1;
  }
  // No more than one a dot, however many there are.
  function drawMarks(brush, tall) {
    const { times, lanes, texts } = scene.moments, many = times.length;
    let n = lower(times, many, scene.from), last = -1, labelled = GUTTER;
    const visible = lower(times, many, scene.to) - n;
    brush.font = "11px sans-serif";
    brush.fillStyle = scene.colours.name;
    while (n < many && times[n] <= scene.to) {
      const x = Math.round(placeOf(times[n])), lane = lanes[n];
      if (lane < 0) brush.fillRect(x, AXIS - 6, 1, scene.height - AXIS + 6);
      const foot = AXIS + lane * tall - scroller.scrollTop + tall;
      if (lane < 0) {
        brush.beginPath();
        brush.moveTo(x - 4, AXIS - 6);
        brush.lineTo(x + 5, AXIS - 6);
        brush.lineTo(x + 0.5, AXIS + 1);
        brush.fill();
      } else brush.fillRect(x, foot - 4, 1, 4);
      if (visible <= 60 && n < texts.length && x >= labelled) {
        labelled = 8 + label(brush, texts[n], x + 6, lane < 0 ? AXIS + 10 : foot - 5, scene.colours.name);
      }
      last = x;
      n = Math.max(n + 1, lower(times, many, timeAt(last + 1)));
    }
  }
  const lower = (list, many, x) => {
    let low = 0, high = many;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  function drawGaps(brush) {
    const { gaps } = scene.moments;
    let last = -Infinity;
    for (let n = 0; n < gaps.length; n += 3) {
      if (gaps[n + 1] < scene.from || gaps[n] > scene.to) continue;
      const right = Math.min(scene.width, placeOf(gaps[n + 1])), left = Math.max(GUTTER, Math.min(placeOf(gaps[n]), right - 3));
      if (right - last < 2) continue;
      last = right;
      brush.fillStyle = scene.colours.bad;
      brush.globalAlpha = 0.25;
      brush.fillRect(left, AXIS, right - left, scene.height - AXIS);
      brush.globalAlpha = 1;
      brush.fillRect(left, AXIS, right - left, 3);
      if (right - left > 90) brush.fillText(`${gaps[n + 2] || "some"} events lost`, left + 4, AXIS + 14);
    }
  }
  function drawChosen(brush, tall) {
    const { chosen } = scene;
    if (chosen.length === 2 && chosen[1] > scene.from && chosen[0] < scene.to) {
      const left = Math.max(GUTTER, placeOf(chosen[0])), right = Math.min(scene.width, placeOf(chosen[1]));
      brush.fillStyle = scene.colours.fore;
      brush.globalAlpha = 0.13;
      brush.fillRect(left, AXIS, right - left, scene.height - AXIS);
      brush.globalAlpha = 1;
      brush.strokeStyle = scene.colours.fore;
      brush.strokeRect(left + 0.5, AXIS + 0.5, Math.max(1, right - left - 1), scene.height - AXIS - 1);
    }
    const { exit } = scene, found = exit && data.lanes()[exit.lane];
    if (!found || exit.n >= found.n) return;
    const left = placeOf(found.time[exit.n]), right = placeOf(data.ends(found, exit.n));
    if (right < GUTTER || left > scene.width) return;
    const top = AXIS + exit.lane * tall - scroller.scrollTop;
    brush.strokeStyle = brush.fillStyle = scene.colours.fore;
    brush.lineWidth = 2;
    brush.strokeRect(Math.max(GUTTER, left) - 1, top + 1, Math.max(3, Math.min(scene.width, right) - Math.max(GUTTER, left) + 2), tall - 3);
    brush.lineWidth = 1;
  }
  function drawLatencies() {
    const brush = sized(latencies, scene.width, LATENCIES);
    if (has()) return paintLatencies(brush, scene.width, LATENCIES, data.latencies(scene.from, scene.to), scene.colours);
    brush.clearRect(0, 0, scene.width, LATENCIES);
    return { total: 0 };
  }
  // Returns what the latencies came to.
  const paint = () => {
    drawLanes();
    drawMap();
    return drawLatencies();
  };
  return { scene, paint, start, end, has, wide, timeAt, laneHeight, clock };
}
