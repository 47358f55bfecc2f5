// The words of a stack, its top first; Enter or a click on a value edits it.

import { h, setText, setAttribute } from "./element.js";
import { panel, edit } from "./panel.js";
import { rows } from "./rows.js";

const ROW = 18;

function render(context) {
  const { signal } = context;
  const frame = panel(context, { name: "stack", title: "Stack", draw });
  const where = h("span", { class: "kb-dim kb-top" });
  const end = h("div", { class: "kb-end" });
  const list = rows({
    label: "Stack, its top first: arrows move, Enter edits", height: ROW, signal, cursor: true, create, update,
    wanted: (first, count) => frame.act("show", { first, count }),
  });
  frame.tools.append(where);
  frame.body.append(list.element, end);

  function create() {
    const value = h("span", { class: "kb-value", tabindex: "-1" });
    const node = h(
      "div", { class: "kb-word" },
      h("span", { class: "kb-marks" }), h("span", { class: "kb-name kb-at" }), h("span", { class: "kb-dim" }), value,
      h("span", { class: "kb-meaning" }),
    );
    // An edit that ends gives its cell the focus; the list has the keys.
    value.addEventListener("focus", () => list.element.focus({ preventScroll: true }));
    value.addEventListener("click", () => {
      if (document.getSelection().isCollapsed) open(Number(node.dataset.row));
    });
    return node;
  }

  function update(node, row, index) {
    const [marks, at, offset, value, meaning] = node.children;
    // The row has scrolled away from under an edit: that is given up.
    if (node.dataset.row !== String(index)) value.querySelector("input")?.blur();
    node.dataset.row = index;
    setText(marks, row?.marks ? `${row.marks.join(",")} →` : "");
    setText(at, row ? row.at : "…");
    setText(offset, row?.offset ?? "");
    if (!value.querySelector("input")) setText(value, row?.hex ?? row?.note ?? "");
    value.classList.toggle("kb-changed", row?.was !== undefined);
    setAttribute(value, "title", row?.was === undefined ? null : `was ${row.was}`);
    const words = [];
    if (row?.call) words.push(`↩ ${row.label || `0x${row.hex.replace(/^0+/, "")}`} after ${row.call}`);
    else if (row?.label) words.push(row.label);
    if (row?.text) words.push(`"${row.text}"`);
    setText(meaning, words.join("  "));
    setAttribute(meaning, "title", words.join("  ") || null);
    meaning.classList.toggle("kb-return", Boolean(row?.call));
    meaning.classList.toggle("kb-name", Boolean(row?.label));
    node.classList.toggle("kb-changed-row", row?.was !== undefined);
  }

  function open(index) {
    const row = list.row(index);
    const cell = list.element.querySelector(`[data-row="${index}"] .kb-value`);
    if (!row?.hex || !cell) return;
    const value = `0x${row.hex.replace(/^0+(?=.)/, "")}`;
    edit(cell, value, `New value at ${row.at}`, (text) => frame.act("write", { address: `0x${row.at}`, value: text }));
  }

  list.element.addEventListener("keydown", (event) => {
    if (event.target !== list.element || event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    open(list.cursor());
  });
  function draw(view, state) {
    setAttribute(frame.root, "data-word", view.word_bytes ?? 8);
    const place = view.pointer === undefined ? "" : `${view.segment ? `${view.segment}:` : "0x"}${view.pointer}`;
    setText(where, place && `${state === "running" ? "at the last stop: " : ""}${place}, words of ${view.word_bytes * 8} bits`);
    setText(end, view.end ?? "");
    end.hidden = !view.end;
    list.set(view.total ?? 0, view.first ?? 0, view.rows ?? []);
  }
}

export default { render };
