// The registers of a vcpu, in sections that fold; a click or Enter on a value edits it, on a bit flips it.

import { h, each, setText, setAttribute } from "./element.js";
import { panel, edit } from "./panel.js";

const SECTIONS = [
  ["general", "General"], ["flags", "Flags"], ["segments", "Segments and descriptor tables"], ["control", "Control"],
  ["debug", "Debug"], ["msrs", "MSRs"], ["vector", "Vector and x87"],
];

function render(context) {
  const { model } = context;
  const frame = panel(context, { name: "registers", title: "Registers", draw, traits: ["sections"] });
  const mode = h("span", { class: "kb-dim kb-mode" });
  frame.tools.append(mode);
  const sections = SECTIONS.map(([name, title]) => {
    const rows = h("div", { class: `kb-rows kb-rows-${name}` });
    const details = h("details", {}, h("summary", {}, title), rows);
    details.addEventListener("toggle", () => {
      const open = new Set(model.get("sections"));
      if (open.has(name) === details.open) return;
      if (details.open) open.add(name);
      else open.delete(name);
      model.set("sections", SECTIONS.map(([each]) => each).filter((each) => open.has(each)));
      model.save_changes();
    });
    frame.body.append(details);
    return { name, details, rows };
  });

  function draw(view) {
    setText(mode, view.mode ? `vcpu ${view.vcpu}: ${view.mode}` : "");
    for (const { name, details, rows } of sections) {
      details.open = model.get("sections").includes(name);
      each(rows, (details.open && view.rows?.[name]) || [], (row) => row.name, create, update);
    }
  }

  function create(row) {
    const node = h("div", { class: "kb-row" }, h("span", { class: "kb-name kb-register" }, row.name));
    if (row.fields) {
      for (const field of row.fields) {
        node.append(h("span", { class: "kb-dim" }, field.name), value(`${row.name}.${field.name}`));
      }
      node.append(h("span", { class: "kb-words" }));
    } else if (row.note === undefined) {
      node.append(value(row.name));
      node.append(h("span", { class: "kb-bits" }), h("span", { class: "kb-words" }));
    } else {
      node.append(h("span", { class: "kb-words kb-bad" }));
    }
    return node;
  }

  function value(name) {
    const cell = h("span", { class: "kb-value", tabindex: "0", role: "button", "data-register": name });
    const open = () => edit(cell, cell.dataset.hex, `New value of ${name}`, (text) => frame.act("set", { name, value: text }));
    cell.addEventListener("click", open);
    cell.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.target !== cell) return;
      event.preventDefault();
      open();
    });
    return cell;
  }

  function show(cell, name, text, was) {
    if (cell.querySelector("input")) return;
    const hex = text.startsWith("0x") ? text : `0x${text}`;
    cell.dataset.hex = hex.replace(/^0x0+(?=.)/, "0x");
    setText(cell, text);
    cell.classList.toggle("kb-changed", was !== undefined);
    setAttribute(cell, "title", was === undefined ? `${name}: Enter edits` : `was ${was}`);
    setAttribute(cell, "aria-label", `${name} ${hex}${was === undefined ? "" : `, changed, was ${was}`}`);
  }

  function update(node, row) {
    const values = node.querySelectorAll(".kb-value");
    const words = node.querySelector(".kb-words");
    if (row.fields) {
      row.fields.forEach((field, n) => show(values[n], `${row.name} ${field.name}`, field.hex, field.was));
      setText(words, row.words);
      words.classList.toggle("kb-changed", Boolean(row.changed) && row.fields.every((field) => field.was === undefined));
      return;
    }
    if (row.note !== undefined) {
      setText(words, row.note);
      return;
    }
    show(values[0], row.name, row.hex, row.was);
    setText(words, row.remark ?? row.more ?? "");
    each(node.querySelector(".kb-bits"), row.bits ?? [], (bit) => bit.name, (bit) => h(
      "button",
      { class: "kb-bit", onclick: () => frame.act("flip", { name: row.name, bit: bit.name }) },
      bit.name,
    ), (button, bit) => {
      setAttribute(button, "aria-pressed", bit.set ? "true" : "false");
      button.classList.toggle("kb-changed", Boolean(bit.changed));
      setAttribute(button, "title", `${row.name}.${bit.name} is ${bit.set ? 1 : 0}${bit.changed ? ", changed" : ""}; click flips it`);
    });
  }
}

export default { render };
