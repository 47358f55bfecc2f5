// A list of very many rows, of which only those in sight exist: in the page, and in the kernel's messages.

import { h, each, soon, unique } from "./element.js";

// Two views of one widget, scrolled apart, take the rows from each other: no quicker than this, in ms.
const PATIENCE = 300;
// Browsers lay out no more than some ten million pixels; beyond that the scroll bar is proportional.
const MAX_HEIGHT = 8_000_000;

// rows({ label, height, create, update, wanted, signal }):
//   height: of a row, in pixels. create() makes a row's element; update(element, row, index) fills it, row null
//   while it is not known yet. wanted(first, count) is called when rows in sight are not among those set.
//   cursor: true gives one row a cursor, which the arrow keys and clicks move; else the arrow keys scroll.
//   drawn(shown, top, count): called after rows were drawn.
// Returns { element, set(total, first, list), scrollTo(index, inSight), scrollToEnd(), top(), cursor(), setCursor(index), row(index) }.
export function rows({ label, height, create, update, wanted, signal, cursor = false, drawn = () => {},
  role = cursor ? "listbox" : "list", itemRole = cursor ? "option" : "listitem" }) {
  const filler = h("div", { class: "kb-filler", "aria-hidden": "true" });
  const shown = h("div", { class: "kb-shown" });
  const element = h("div", { class: "kb-scroller", tabindex: "0", role, "aria-label": label }, filler, shown);
  const name = unique("row");
  let chosen = cursor ? 0 : -1, carried = 0, made = 0;
  let total = 0, first = 0, list = [], top = 0, settled = -1, asked = "", atEnd = false, answered = 0, later = 0;
  const visible = () => Math.ceil((element.clientHeight || 400) / height) + 1;
  const whole = () => Math.max(1, Math.floor((element.clientHeight || 400) / height));
  const last = () => Math.max(0, total - whole());
  const full = () => Math.min(total * height, MAX_HEIGHT);
  const range = () => Math.max(1, full() - element.clientHeight);

  const draw = () => {
    const count = Math.min(visible(), total - top);
    const items = Array.from({ length: Math.max(0, count) }, (_, n) => top + n);
    shown.style.top = `${element.scrollTop}px`;
    if (cursor) element.removeAttribute("aria-activedescendant");
    each(shown, items, (index) => index % (visible() + 1), () => {
      const node = create();
      node.setAttribute("role", itemRole);
      node.style.height = `${height}px`;
      if (cursor) node.id = `${name}-${(made += 1)}`;
      return node;
    }, (node, index) => {
      if (itemRole === "row") node.setAttribute("aria-rowindex", index + 1);
      else {
        node.setAttribute("aria-posinset", index + 1);
        node.setAttribute("aria-setsize", total);
      }
      if (cursor) node.setAttribute("aria-selected", index === chosen ? "true" : "false");
      if (index === chosen) element.setAttribute("aria-activedescendant", node.id);
      update(node, list[index - first] ?? null, index);
    });
    drawn(shown, top, count);
  };
  // Not before the next repaint: a panel that is drawn before one would show its rows in the one after.
  const redraw = soon(draw, signal);

  // Asks for what is in sight and as much again on both sides, once for each place.
  const ask = () => {
    const count = visible();
    if (total === 0 || (top >= first && Math.min(top + count, total) <= first + list.length)) return false;
    const from = Math.max(0, top - count * 2);
    // The rows there are belong to it: others may have come since it was asked last, and it is not among them.
    const key = `${from} ${total} ${first} ${list.length}`;
    if (asked === key) return false;
    asked = key;
    wanted(from, Math.min(count * 5, total - from));
    return true;
  };
  const move = (to) => {
    atEnd = false;
    top = Math.max(0, Math.min(Math.round(to), last()));
    settled = Math.round((top / Math.max(1, last())) * range());
    element.scrollTop = settled;
    settled = element.scrollTop;
    redraw();
    ask();
  };
  element.addEventListener("scroll", () => {
    if (Math.abs(element.scrollTop - settled) < 1) return;
    settled = element.scrollTop;
    atEnd = false;
    top = Math.max(0, Math.min(Math.round((settled / range()) * last()), last()));
    redraw();
    ask();
  });
  // By rows, not by the share of the whole that a pixel of the scroll bar stands for.
  element.addEventListener("wheel", (event) => {
    // At an end the page scrolls on.
    if (event.ctrlKey || (event.deltaY < 0 ? top === 0 : top >= last())) return;
    event.preventDefault();
    // A touchpad sends parts of rows.
    carried += event.deltaMode === 1 ? event.deltaY : event.deltaY / height;
    const lines = Math.trunc(carried);
    carried -= lines;
    if (lines) move(top + lines);
  }, { passive: false });
  const choose = (index) => {
    chosen = Math.max(0, Math.min(index, total - 1));
    if (chosen < top) move(chosen);
    else if (chosen >= top + whole()) move(chosen - whole() + 1);
    redraw();
  };
  if (cursor) {
    shown.addEventListener("pointerdown", (event) => {
      const node = event.target.closest("[aria-posinset]");
      if (node) choose(Number(node.getAttribute("aria-posinset")) - 1);
    });
  }
  element.addEventListener("keydown", (event) => {
    if (event.target !== element) return;
    const page = Math.max(1, whole() - 1);
    const from = cursor ? chosen : top;
    const to = { ArrowDown: from + 1, ArrowUp: from - 1, PageDown: from + page, PageUp: from - page, Home: 0, End: total }[event.key];
    if (to === undefined || event.altKey || event.metaKey || event.ctrlKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (cursor) choose(to);
    else move(to);
  });
  // Hidden elements do not scroll: what was asked for meanwhile is done when the list is shown.
  const resized = new ResizeObserver(() => {
    const stay = atEnd;
    move(stay ? last() : top);
    atEnd = stay;
  });
  resized.observe(element);
  signal.addEventListener("abort", () => {
    resized.disconnect();
    clearTimeout(later);
  });
  // What another view took is fetched again where the reader is.
  for (const event of ["pointerenter", "focus"]) {
    element.addEventListener(event, () => {
      asked = "";
      ask();
    });
  }

  return {
    element,
    top: () => top,
    // With `inSight`, that row is brought into sight before rows are asked for.
    set(newTotal, newFirst, newList, inSight = null) {
      [total, first, list] = [newTotal, newFirst, newList];
      filler.style.height = `${full()}px`;
      if (inSight !== null) this.scrollTo(inSight, true);
      else if (top > last()) move(last());
      chosen = Math.min(chosen, total - 1);
      redraw();
      clearTimeout(later);
      const wait = answered + PATIENCE - performance.now();
      if (wait > 0) later = setTimeout(ask, wait);
      else if (ask()) answered = performance.now();
    },
    cursor: () => chosen,
    setCursor(index) {
      chosen = Math.max(0, Math.min(index, total - 1));
      redraw();
    },
    row: (index) => list[index - first] ?? null,
    // The end, also once the list is shown or grows higher.
    scrollToEnd() {
      move(last());
      atEnd = true;
    },
    // Brings a row into sight; with `inSight` only if it is not.
    scrollTo(index, inSight = false) {
      const count = whole();
      if (inSight && index >= top && index < top + count) return;
      move(index - Math.floor(count / 3));
    },
  };
}
