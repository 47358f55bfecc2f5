// The frame that every panel has: a title, tools, a state, a body, an error in words, and export.

import { h, setText, setAttribute, coalesced } from "./element.js";

const WORDS = { stopped: "", running: "running", lost: "host lost", closed: "closed" };
// What a panel asks for by itself, as its reader scrolls or it is first drawn.
const UNASKED = new Set(["show", "again", "rows", "moments", "tell"]);
const FORMATS = [["csv", "data as CSV"], ["txt", "text"], ["svg", "picture as SVG"], ["png", "picture as PNG"]];

// draw(view, state) is called, coalesced, whenever the trait `view` or `state` changes.
// Returns { root, head, tools, body, act, redraw, trait }.
export function panel({ model, el, signal }, { name, title, draw, traits = [] }) {
  const state = h("span", { class: "kb-state", role: "status" });
  const tools = h("div", { class: "kb-tools", role: "toolbar", "aria-label": `${title} tools` });
  const body = h("div", { class: "kb-body" });
  const error = h("div", { class: "kb-error", role: "alert" });
  // Whether a kernel answers; anywidget does not say it of the panel's own model, so it is asked of the library's.
  // Where a front end does not tell, there is one.
  let shared = null;
  let alive = false;
  const gone = () => shared?.comm_live === false;
  const reference = model.get("library").replace("anywidget:", "");
  Promise.resolve(model.widget_manager?.get_model?.(reference)).then((found) => {
    shared = found;
    if (!signal.aborted) redraw();
  }, () => {});
  model.on("comm_live_update", () => redraw());
  const act = (what, more = {}) => {
    if (!gone()) model.send({ do: what, ...more });
    else if (!UNASKED.has(what)) {
      setText(error, `${alive ? "The kernel was restarted or has ended" : "This is a saved page: there is no kernel"}; run the cells again.`);
      error.hidden = false;
    }
  };
  const head = h("div", { class: "kb-head" }, h("h3", { class: "kb-title" }, title), tools, state, menu(act, title));
  const root = h(
    "section",
    // Lumino: JupyterLab's own keys (a, b, dd, ...) must not act on the notebook while a panel has the focus.
    { class: `kb-panel kb-${name}`, "aria-label": title, "data-lm-suppress-shortcuts": "true" },
    head, body, error,
  );
  // Lumino looks for the mark from the focused element up, but takes a key whose selector that element itself fits.
  root.addEventListener("focusin", (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true"));
  const redraw = coalesced(() => {
    const dead = gone();
    alive ||= Boolean(shared) && !dead;
    const now = dead ? "closed" : model.get("state");
    setAttribute(root, "data-state", dead ? "gone" : now);
    setText(state, dead ? (alive ? "disconnected: no kernel" : "saved page: no kernel") : WORDS[now] ?? now);
    const words = model.get("error");
    setText(error, words);
    error.hidden = !words;
    draw(model.get("view"), now);
  }, signal);
  for (const trait of ["view", "state", "error", ...traits]) model.on(`change:${trait}`, redraw);
  const onMessage = (message, buffers) => {
    if (message.do === "save") save(message, buffers);
  };
  model.on("msg:custom", onMessage);
  el.classList.add("kb-host");
  el.append(root);
  redraw();
  return { root, head, tools, body, act, redraw };
}

function menu(act, title) {
  const list = h("div", { class: "kb-menu", role: "group", "aria-label": `Save ${title}` });
  const details = h("details", { class: "kb-export" }, h("summary", { title: "Save what is shown", "aria-label": `Save ${title}` }, "⤓"), list);
  for (const [format, words] of FORMATS) {
    list.append(h("button", { onclick: () => { details.open = false; act("download", { format }); } }, words));
  }
  details.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && details.open) {
      details.open = false;
      details.firstChild.focus();
      event.stopPropagation();
    }
  });
  return details;
}

// The kernel made the file; the browser keeps it.
function save({ name, type }, buffers) {
  const url = URL.createObjectURL(new Blob([buffers[0]], { type }));
  const link = h("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// A button with a word or sign, a name for screen readers and a key in its tooltip.
export function button(label, title, onclick, { key = "", ...more } = {}) {
  return h("button", { class: "kb-button", title: key ? `${title} (${key})` : title, "aria-label": title, onclick, ...more }, label);
}

// Makes the value in `cell` an input until Enter (commit) or Escape.
// With `empty` nothing typed is a value too.
export function edit(cell, value, label, commit, empty = false) {
  if (cell.querySelector("input")) return;
  const input = h("input", { class: "kb-edit", "aria-label": label, value, spellcheck: "false", size: String(Math.max(4, value.length)) });
  const shown = [...cell.childNodes];
  let over = false;
  const end = (write) => {
    if (over) return;
    over = true;
    const text = input.value.trim();
    cell.replaceChildren(...shown);
    if (write && (text || empty) && text !== value) commit(text);
  };
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") end(true);
    else if (event.key === "Escape") end(false);
    else return;
    event.preventDefault();
    event.stopPropagation();
    cell.focus();
  });
  input.addEventListener("blur", () => end(false));
  cell.replaceChildren(input);
  input.select();
  input.focus();
}
