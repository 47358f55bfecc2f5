// Breakpoints and watchpoints: what stops the vcpu, why that way, how often, and on which condition.

import { h, each, setText, setAttribute } from "./element.js";
import { panel, button, edit } from "./panel.js";

const KERNEL = "A Python expression, evaluated in your own kernel at each hit, with the names cpu, regs and m: regs.rax > 5";

function render(context) {
  const { model } = context;
  const frame = panel(context, { name: "breakpoints", title: "Breakpoints", draw });
  const input = (label, title, more = {}) => h("input", { "aria-label": label, title, spellcheck: "false", ...more });
  const where = input("Place: symbol or address", "Symbol or address, such as loop+4 or 0x1000", { placeholder: "symbol or address", class: "kb-where-to" });
  const kind = h("select", { "aria-label": "Kind", title: "What stops the guest" },
    h("option", { value: "x" }, "execute"), h("option", { value: "w" }, "write"), h("option", { value: "rw" }, "read or write"));
  const size = input("Bytes watched", "Bytes watched, 1 to 4096", { type: "number", min: "1", max: "4096", value: "8", class: "kb-size" });
  const bytes = h("label", { class: "kb-dim", hidden: true }, size, " bytes");
  const condition = input("Condition", KERNEL, { placeholder: "if… regs.rax > 5", class: "kb-condition-new" });
  const form = h("form", { class: "kb-add", "aria-label": "New breakpoint" }, where, kind, bytes, condition,
    h("button", { class: "kb-button", title: "Set it (Enter)" }, "Add"));
  kind.addEventListener("change", () => { bytes.hidden = kind.value === "x"; });
  // The place is cleared when the new one is there: what was refused is still there to be mended.
  let waiting = null;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    waiting = where.value;
    frame.act("add", { where: where.value.trim(), kind: kind.value, size_bytes: Number.parseInt(size.value, 10) || 0, condition: condition.value });
  });
  // A notebook takes Enter for itself, so the browser would not send the form.
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !event.target.matches("input")) return;
    event.preventDefault();
    event.stopPropagation();
    form.requestSubmit();
  });
  const none = h("div", { class: "kb-dim" }, "none yet: add one here, or press b in the disassembly");
  const list = h("div", { class: "kb-list", role: "list", "aria-label": "Breakpoints" });
  frame.body.append(form, none, list);
  let known = new Set();

  function draw(view, state) {
    const rows = view.rows ?? [];
    const busy = state !== "stopped";
    for (const each of form.elements) each.disabled = busy;
    none.hidden = rows.length > 0;
    list.hidden = rows.length === 0;
    each(list, rows, (row) => row.number, create, (node, row) => update(node, row, busy));
    const now = new Set(rows.map((row) => row.number));
    if (waiting !== null && [...now].some((number) => !known.has(number))) {
      if (where.value === waiting) where.value = condition.value = "";
      waiting = null;
    }
    known = now;
  }

  function create({ number }) {
    const enabled = h("input", { type: "checkbox", onchange: () => frame.act("enable", { number, on: enabled.checked }) });
    const place = h("button", { class: "kb-place", onclick: () => frame.act("goto", { number }) });
    const text = h("span", { class: "kb-value kb-condition", tabindex: "0", role: "button" });
    const open = () => {
      if (enabled.disabled) return;
      edit(text, text.dataset.text, `Condition of breakpoint ${number}`, (words) => frame.act("set_condition", { number, text: words }), true);
    };
    text.addEventListener("click", open);
    text.addEventListener("keydown", (event) => {
      if (event.target !== text) return;
      if (event.key === "Enter") open();
      else if ((event.key === "Delete" || event.key === "Backspace") && !enabled.disabled) frame.act("set_condition", { number, text: "" });
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const node = h("div", { class: "kb-stopper", role: "listitem", "data-number": String(number) },
      enabled, h("span", { class: "kb-dim kb-number" }, String(number)), place,
      h("span", { class: "kb-noun" }), h("span", { class: "kb-dim kb-mechanism" }), h("span", { class: "kb-hits" }), text,
      button("✕", `Remove breakpoint ${number}`, () => frame.act("remove", { number }), { key: "Delete", class: "kb-button kb-remove" }),
      h("span", { class: "kb-dim kb-notes" }));
    // Anywhere in the row but in its texts.
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Delete" || event.target.closest(".kb-condition") || enabled.disabled) return;
      event.preventDefault();
      (node.nextSibling ?? node.previousSibling)?.querySelector("input").focus();
      frame.act("remove", { number });
    });
    return node;
  }

  function update(node, row, busy) {
    const [enabled, , place, noun, mechanism, hits, text, remove, notes] = node.children;
    node.classList.toggle("kb-off", !row.enabled);
    enabled.checked = row.enabled;
    enabled.disabled = remove.disabled = busy;
    setAttribute(enabled, "title", row.enabled ? "Enabled: uncheck to let the guest pass" : "Disabled: check to stop the guest");
    setAttribute(enabled, "aria-label", `Breakpoint ${row.number} at ${row.place} enabled`);
    // What the mechanism's tooltip says, for those who come by keyboard.
    setAttribute(enabled, "aria-description", row.why);
    setText(place, row.place === row.address ? row.address : `${row.place} ${row.address}`);
    setAttribute(place, "title", `Show ${row.address} in the ${row.kind === "x" ? "disassembly" : "memory"}`);
    setText(noun, row.noun);
    setText(mechanism, row.mechanism);
    setAttribute(mechanism, "title", row.why);
    setText(hits, `${row.hits} hit${row.hits === "1" ? "" : "s"}${row.condition ? `, ${row.passes} passed` : ""}${row.hit ? ", stopped here" : ""}`);
    hits.classList.toggle("kb-changed", Boolean(row.hit));
    setAttribute(hits, "title", "How often it was reached with its condition true; ignored hits count" + (row.condition ? ". Passed: with its condition false" : ""));
    notes.hidden = row.notes.length === 0;
    setText(notes, row.notes.join("; "));
    if (text.querySelector("input")) return;
    text.dataset.text = row.condition;
    setText(text, row.condition ? `if ${row.condition}` : "if…");
    text.classList.toggle("kb-dim", !row.condition);
    setAttribute(text, "title", `${KERNEL}. Enter edits${row.condition ? ", Delete takes it away" : ""}`);
    setAttribute(text, "aria-label", `Condition of breakpoint ${row.number}: ${row.condition || "none"}`);
  }
}

export default { render };
