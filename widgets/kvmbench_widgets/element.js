// Elements without a framework: make one, keep a list of them in step with data.

// h("button", { class: "x", onclick: f, "aria-label": "Step" }, "text", child): text is never read as HTML.
export function h(tag, properties, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// A name no other element of the page has. Each widget has a copy of its module, so a counter would not do.
export function unique(name) {
  return `kb-${name}-${Math.random().toString(36).slice(2)}`;
}

// Sets only what differs, so that a redraw disturbs neither a selection nor a screen reader.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setAttribute(element, name, value) {
  if (value === null || value === false) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

const kept = new WeakMap();

// Makes `parent` hold one element an item, in order; elements are kept by key, so focus and edits survive.
export function each(parent, items, key, create, update) {
  const before = kept.get(parent) ?? new Map();
  const now = new Map();
  // First those that go: a node that stays must not be moved for them, or it loses the focus.
  const staying = new Set(items.map(key));
  for (const [id, node] of before) if (!staying.has(id)) node.remove();
  let place = parent.firstChild;
  for (const item of items) {
    const id = key(item);
    const node = before.get(id) ?? create(item);
    update(node, item);
    now.set(id, node);
    if (node === place) place = place.nextSibling;
    else parent.insertBefore(node, place);
  }
  kept.set(parent, now);
}

// Calls `draw` once when the present event, or the drawing of the present frame, is over.
export function soon(draw, signal) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    queueMicrotask(() => {
      asked = false;
      if (!signal.aborted) draw();
    });
  };
}

// Calls `draw` once before the next repaint, however often it is asked.
export function coalesced(draw, signal) {
  let asked = 0;
  signal.addEventListener("abort", () => cancelAnimationFrame(asked));
  return () => {
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(draw);
  };
}
