// A trace's exits over time: a lane a vcpu, from all of the trace down to one exit.

import { h, each, setText, setAttribute, coalesced } from "./element.js";
import { panel, button } from "./panel.js";
import { store } from "./exit_store.js";
import { palette, duration, COLOURS } from "./exit_paint.js";
import { pictures, AXIS, GUTTER } from "./exit_canvas.js";

// Nothing is told at less than this many nanoseconds in sight.
const LEAST = 50;
// So long an answer is waited for before it is asked again: a cell may keep the kernel busy.
const PATIENCE = 5000, STALE = 1500;
const HINT = "Wheel (after a click, or with Ctrl) or + and − zoom, arrows move, drag chooses a stretch of time, n and p go from exit to exit.";
const HEADS = ["reason", "exits", "total", "mean", "p50", "p99", "longest"];

function render(context) {
  const { model, signal } = context;
  const frame = panel(context, { name: "exit_trace", title: "Exit trace", draw, traits: ["hidden", "chosen", "counts"] });
  const data = store();
  const total = h("span", { class: "kb-total" }), live = h("span", { class: "kb-live" });
  frame.tools.append(
    button("Fit", "Show all of the trace", () => fit(), { key: "0", "data-do": "fit" }),
    button("+", "Zoom in", () => zoom(0.5), { key: "+", "data-do": "in" }),
    button("−", "Zoom out", () => zoom(2), { key: "−", "data-do": "out" }),
    button("◀", "Earlier", () => move(-0.5), { key: "←", "data-do": "earlier" }),
    button("▶", "Later", () => move(0.5), { key: "→", "data-do": "later" }),
    total, live,
  );
  const legend = h("div", { class: "kb-legend", role: "group", "aria-label": "Reasons shown" });
  const keys = h("div", { class: "kb-keys" }, ...[["guest", "guest"], ["together", "guest and KVM together"], ["kvm", "KVM: solid"], ["user", "user space: striped"], ["stood", "stood"], ["mark", "mark"], ["lost", "events lost"]]
    .map(([name, words]) => h("span", { "data-key": name }, h("i", { class: `kb-swatch kb-${name}`, "aria-hidden": "true" }), words)));
  const map = h("canvas", { class: "kb-map", "aria-hidden": "true", title: "All of the trace; drag to move" });
  const canvas = h("canvas", { class: "kb-lanes", tabindex: "0", role: "application", "aria-roledescription": "timeline", title: "" });
  const filler = h("div", { class: "kb-lane-filler", "aria-hidden": "true" });
  const scroller = h("div", { class: "kb-lane-scroller" }, canvas, filler);
  const told = h("div", { class: "kb-told", role: "status" });
  const latencies = h("canvas", { class: "kb-latencies", role: "img" });
  const latencyWords = h("div", { class: "kb-dim kb-latency-words" });
  const table = h("table", { class: "kb-counts", "aria-label": "Exits chosen, by reason" }, h("thead", {}, h("tr", {}, ...HEADS.map((word) => h("th", { scope: "col" }, word)))), h("tbody"));
  const chosenWords = h("span", { class: "kb-chosen-words" });
  const chosenPart = h("div", { class: "kb-chosen" }, h("div", { class: "kb-chosen-head" }, chosenWords,
    button("Zoom to it", "Zoom to the chosen stretch", () => toChosen(), { key: "z", "data-do": "zoom" }),
    button("Forget", "Choose nothing", () => frame.act("forget"), { key: "Esc", "data-do": "forget" })), table);
  const notes = h("div", { class: "kb-notes" });
  frame.body.append(legend, keys, map, scroller, told, latencies, latencyWords, chosenPart, notes);

  const { scene, paint: paintAll, start, end, has, wide, timeAt, laneHeight, clock } = pictures(data, { canvas, map, latencies, scroller, filler });
  let all = true, asked = 0, current = null, pointer = null, drag = null, wanted = 0;
  const words = new Map();
  // The last times that drawing took, in ms: tests look at them.
  const draws = frame.root.kbDraws = [];
  frame.root.kbStore = data;

  // What there is.
  function ask(again = false) {
    const behind = scene.view.total !== undefined && (data.version !== scene.view.version || data.n < scene.view.total);
    const waiting = asked ? performance.now() - asked : 0;
    if (waiting > STALE) scene.stale = true;
    if (!behind || (!again && asked && waiting < PATIENCE)) return;
    asked = performance.now();
    frame.act("rows", { version: data.version, first: data.n });
  }
  const onMessage = (message, buffers) => {
    if (message.do === "rows") {
      if (message.version !== scene.view.version) scene.view = model.get("view");
      data.reasons(scene.view.reasons ?? [], scene.view.lanes?.length ?? 0);
      const before = data.n, follows = !all && scene.to >= end();
      const fitted = data.take(message, buffers, (scene.view.lanes ?? []).map((lane) => lane.count));
      if (!fitted) return;
      // What was sent anew may be other exits by now; those before it are not.
      if (message.first < before) {
        for (const row of [...words.keys()]) if (row >= message.first) words.delete(row);
        if (current?.row >= message.first) current = null;
        if (pointer?.row >= message.first) pointer = null;
      }
      scene.stale = false;
      if (all) fit();
      else if (follows) [scene.from, scene.to] = [scene.from + end() - scene.to, end()];
      else if (scene.from < start()) [scene.from, scene.to] = [start(), scene.to + start() - scene.from];
      asked = 0;
      ask(true);
      redraw();
    } else if (message.do === "moments") {
      const [times, lanes, gaps] = buffers.map((buffer) => (buffer.buffer ?? buffer).slice(buffer.byteOffset ?? 0, (buffer.byteOffset ?? 0) + buffer.byteLength));
      scene.moments = { number: message.number, texts: message.texts, times: new Float64Array(times), lanes: new Int16Array(lanes), gaps: new Float64Array(gaps) };
      redraw();
    } else if (message.do === "told") {
      if (words.size > 500) words.clear();
      words.set(message.row, message.words);
      say();
    }
  };
  model.on("msg:custom", onMessage);
  signal.addEventListener("abort", () => model.off("msg:custom", onMessage));

  // What is in sight.
  function look(low, high) {
    const least = Math.min(LEAST, end() - start()), span = Math.max(least, Math.min(high - low, end() - start()));
    scene.from = Math.max(start(), Math.min(low, end() - span));
    scene.to = scene.from + span;
    all = scene.from <= start() && scene.to >= end();
    redraw();
    keep();
  }
  let keeping = 0;
  const keep = () => {
    clearTimeout(keeping);
    keeping = setTimeout(() => {
      model.set("span", all ? [] : [scene.from, scene.to]);
      model.save_changes();
    }, 400);
  };
  signal.addEventListener("abort", () => [keeping, wanted].forEach(clearTimeout));
  const fit = () => look(start(), end());
  const move = (part) => look(scene.from + part * (scene.to - scene.from), scene.to + part * (scene.to - scene.from));
  function zoom(factor, around = (scene.from + scene.to) / 2) {
    look(around - (around - scene.from) * factor, around + (scene.to - around) * factor);
  }
  function toChosen() {
    const chosen = model.get("chosen");
    if (chosen.length === 2) look(chosen[0], chosen[1]);
  }
  const laneAt = (y) => Math.floor((y - AXIS + scroller.scrollTop) / laneHeight());

  // One exit: that under the pointer, or that which the keys went to.
  function nearest(lane, time) {
    const found = data.lanes()[lane];
    if (!found?.n) return null;
    const next = data.after(found, time);
    const one = (n) => (n >= 0 && n < found.n && scene.shown[found.reason[n]] ? n : -1);
    // The time behind an exit is its own, that before it is the guest's: the nearer of the two.
    const before = one(next - 1), behind = one(next);
    const n = before < 0 ? behind : behind < 0 || time <= data.ends(found, before) || time - found.time[before] < found.time[behind] - time ? before : behind;
    return n < 0 ? null : { lane, n, row: found.row[n] };
  }
  function step(by) {
    const lanes = data.lanes();
    let { lane, n } = current ?? { lane: Math.max(0, lanes.findIndex((each) => each.n)), n: null };
    const found = lanes[lane];
    if (!found?.n) return;
    n = n === null ? data.after(found, scene.from) + (by > 0 ? 0 : -1) : n + by;
    while (n >= 0 && n < found.n && !scene.shown[found.reason[n]]) n += by;
    if (n < 0 || n >= found.n) return;
    current = { lane, n, row: found.row[n] };
    const at = found.time[n];
    if (at < scene.from || at > scene.to) look(at - (scene.to - scene.from) / 2, at + (scene.to - scene.from) / 2);
    point(current);
  }
  function point(exit) {
    pointer = exit;
    say();
    redraw();
    clearTimeout(wanted);
    if (exit && !words.has(exit.row)) wanted = setTimeout(() => frame.act("tell", { row: exit.row }), 120);
  }
  function say() {
    if (drag?.choosing) setText(told, `${duration(Math.abs(drag.time - drag.from))}${clock()}`);
    else if (!pointer) setText(told, scene.view.total ? HINT : "");
    else {
      const found = data.lanes()[pointer.lane], name = scene.view.reasons[found.reason[pointer.n]]?.name ?? "";
      const dot = (scene.to - scene.from) / wide(), many = data.after(found, found.time[pointer.n] + dot / 2) - data.after(found, found.time[pointer.n] - dot / 2);
      const others = many > 1 ? `one of ${many.toLocaleString("en")} in this dot: ` : "";
      setText(told, `${scene.view.lanes[pointer.lane].name}: ${others}${words.get(pointer.row) ?? `${name} …`}`);
    }
  }

  canvas.addEventListener("wheel", (event) => {
    const sideways = event.shiftKey || Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (!sideways && !event.ctrlKey && document.activeElement !== canvas) return;
    event.preventDefault();
    const by = (event.deltaMode === 1 ? 16 : 1) * (sideways ? event.deltaX || event.deltaY : event.deltaY);
    if (sideways) move(by / wide());
    else zoom(1.0015 ** Math.max(-600, Math.min(600, by * (event.ctrlKey ? 4 : 1))), timeAt(event.offsetX));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.offsetX < GUTTER) return;
    canvas.setPointerCapture(event.pointerId);
    drag = { x: event.offsetX, from: timeAt(event.offsetX), time: timeAt(event.offsetX), panning: event.shiftKey, low: scene.from, high: scene.to, choosing: false };
  });
  canvas.addEventListener("pointermove", (event) => {
    const time = timeAt(Math.max(GUTTER, Math.min(scene.width, event.offsetX)));
    if (!drag) point(event.offsetX < GUTTER ? null : nearest(laneAt(event.offsetY), time));
    else if (drag.panning) {
      const by = ((drag.x - event.offsetX) / wide()) * (drag.high - drag.low);
      look(drag.low + by, drag.high + by);
    } else {
      drag.choosing ||= Math.abs(event.offsetX - drag.x) > 3;
      drag.time = time;
      say();
      redraw();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag?.choosing) choose(Math.min(drag.from, drag.time), Math.max(drag.from, drag.time));
    else if (drag && !drag.panning) point(current = nearest(laneAt(event.offsetY), timeAt(event.offsetX)));
    drag = null;
    redraw();
  });
  canvas.addEventListener("pointercancel", () => { drag = null; redraw(); });
  canvas.addEventListener("pointerleave", () => { if (!drag) point(current); });
  canvas.addEventListener("dblclick", (event) => zoom(0.25, timeAt(event.offsetX)));
  canvas.addEventListener("focus", () => say());
  const choose = (low, high) => frame.act("choose", { start: low, end: high });
  canvas.addEventListener("keydown", (event) => {
    if (event.altKey || event.metaKey || event.ctrlKey) return;
    const does = {
      "+": () => zoom(0.5, centre()), "=": () => zoom(0.5, centre()), "-": () => zoom(2, centre()), 0: fit,
      ArrowLeft: () => move(-0.1), ArrowRight: () => move(0.1), PageUp: () => move(-1), PageDown: () => move(1),
      Home: () => look(start(), start() + scene.to - scene.from), End: () => look(end() - (scene.to - scene.from), end()),
      n: () => step(1), p: () => step(-1), ArrowDown: () => change(1), ArrowUp: () => change(-1),
      Enter: () => choose(scene.from, scene.to), z: toChosen,
      Escape: () => { current = null; point(null); if (model.get("chosen").length) frame.act("forget"); },
    }[event.key];
    if (!does) return;
    event.preventDefault();
    event.stopPropagation();
    does();
  });
  const centre = () => {
    const at = current ? data.lanes()[current.lane].time[current.n] : NaN;
    return at >= scene.from && at <= scene.to ? at : (scene.from + scene.to) / 2;
  };
  function change(by) {
    const lane = Math.max(0, Math.min(data.lanes().length - 1, (current?.lane ?? 0) + (current ? by : 0)));
    current = nearest(lane, centre()) ?? current;
    if (!current) return;
    const y = current.lane * laneHeight();
    if (y < scroller.scrollTop || y + laneHeight() + AXIS > scroller.scrollTop + scroller.clientHeight) scroller.scrollTop = y;
    point(current);
  }
  const onMap = (event) => {
    if (!(event.buttons & 1)) return;
    const middle = start() + ((event.offsetX - GUTTER) / wide()) * (end() - start());
    look(middle - (scene.to - scene.from) / 2, middle + (scene.to - scene.from) / 2);
  };
  for (const name of ["pointerdown", "pointermove"]) map.addEventListener(name, onMap);

  // Drawing.
  const paint = () => {
    if (!scene.width || !frame.root.isConnected) return;
    const began = performance.now();
    scene.colours ??= palette(frame.root);
    scene.chosen = drag?.choosing ? [Math.min(drag.from, drag.time), Math.max(drag.from, drag.time)] : model.get("chosen");
    scene.exit = pointer ?? current;
    const { total: many, p50, p99 } = paintAll();
    const counted = `${many.toLocaleString("en")} exit${many === 1 ? "" : "s"} in sight`;
    const said = !has() ? "" : many ? `From an exit until the guest ran again${clock()}: ${counted}, half within ${duration(p50)}, 99 % within ${duration(p99)} (to 15 %)` : "Of no exit in sight it is told when the guest ran again";
    setText(latencyWords, said);
    setAttribute(latencies, "aria-label", said || "No exits");
    draws.push(performance.now() - began);
    if (draws.length > 1000) draws.shift();
  };
  const redraw = coalesced(paint, signal);
  function draw(now, state) {
    scene.view = now ?? {};
    const reasons = scene.view.reasons ?? [], hidden = new Set(model.get("hidden"));
    const flags = reasons.map((reason) => !hidden.has(reason.name));
    data.reasons(reasons, scene.view.lanes?.length ?? 0);
    if (flags.join() !== scene.shown.join()) data.show((scene.shown = flags));
    setText(total, `${scene.view.all ?? 0} exits`);
    setText(live, scene.view.live && state !== "lost" ? "● tracing" : "");
    if (all && !has()) [scene.from, scene.to] = [start(), end()];
    setText(notes, [...(scene.view.notes ?? [])].join("\n"));
    notes.hidden = !notes.textContent;
    each(legend, reasons, (reason) => reason.name + reason.together, (reason) => {
      const node = h("button", { class: "kb-reason", onclick: () => toggle(reason.name) }, h("i", { "aria-hidden": "true", class: "kb-swatch" }), h("span"), h("span", { class: "kb-dim" }));
      return node;
    }, (node, reason) => {
      const n = reasons.indexOf(reason);
      node.firstChild.style.setProperty("--kb-mine", `var(--kb-reason-${n % COLOURS})`);
      node.firstChild.classList.toggle("kb-lined", n >= COLOURS);
      setText(node.children[1], reason.name);
      setText(node.children[2], reason.count.toLocaleString("en"));
      setAttribute(node, "aria-pressed", scene.shown[n] ? "true" : "false");
      setAttribute(node, "title", `${scene.shown[n] ? "Leave out" : "Show"} ${reason.name}`);
    });
    for (const [name, there] of [["together", reasons.some((each) => each.together)], ["guest", reasons.some((each) => !each.together)], ["mark", scene.view.marks], ["lost", scene.view.gaps]]) keys.querySelector(`[data-key=${name}]`).hidden = !there;
    keys.hidden = legend.hidden = map.hidden = !reasons.length;
    latencies.hidden = !reasons.length || (frame.root.dataset.state === "gone" && !has());
    setAttribute(canvas, "aria-label", `Exits over time: ${scene.view.all ?? 0} exits${clock()}, ${(scene.view.lanes ?? []).map((lane) => `${lane.name} ${lane.count}`).slice(0, 16).join(", ")}. ${HINT}`);
    drawCounts();
    ask();
    if (scene.view.moments && scene.view.moments !== scene.moments.number && scene.view.moments !== scene.moments.asked) {
      scene.moments.asked = scene.view.moments;
      frame.act("moments");
    }
    say();
    paint();
  }
  function toggle(name) {
    const hidden = model.get("hidden");
    model.set("hidden", hidden.includes(name) ? hidden.filter((each) => each !== name) : [...hidden, name]);
    model.save_changes();
  }
  function drawCounts() {
    const counts = model.get("counts");
    chosenPart.hidden = model.get("chosen").length !== 2 || !counts.rows;
    if (chosenPart.hidden) return;
    setText(chosenWords, `Chosen: ${counts.exits} exits in ${counts.length}${counts.where ? `; ${counts.where}` : clock()}`);
    each(table.tBodies[0], counts.rows, (row) => row[0], () => h("tr", {}, h("th", { scope: "row" }), ...HEADS.slice(1).map(() => h("td"))), (node, row) => row.forEach((cell, n) => setText(node.children[n], cell)));
  }

  // The page's size, its theme.
  const resized = new ResizeObserver(() => {
    scene.width = Math.floor(frame.body.clientWidth - 12);
    scene.ratio = Math.min(2, window.devicePixelRatio || 1);
    redraw();
  });
  resized.observe(frame.body);
  scroller.addEventListener("scroll", redraw);
  const themed = new MutationObserver(() => {
    scene.colours = null;
    redraw();
  });
  for (const node of [document.body, document.documentElement]) themed.observe(node, { attributes: true, attributeFilter: ["data-jp-theme-light", "class", "theme", "data-theme"] });
  signal.addEventListener("abort", () => {
    resized.disconnect();
    themed.disconnect();
  });
  const kept = model.get("span");
  if (kept.length === 2) {
    [scene.from, scene.to] = kept;
    all = false;
  }
}

export default { render };
