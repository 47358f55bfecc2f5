// Code in rows: breakpoint gutter, branch arrows, the current instruction, labels and source; follows rip or browses.

import { h, each, setText, setAttribute } from "./element.js";
import { panel, button } from "./panel.js";
import { rows } from "./rows.js";

const ROW = 18, LANE = 7;
const SVG = "http://www.w3.org/2000/svg";

function render(context) {
  const { model, signal } = context;
  const frame = panel(context, { name: "disassembly", title: "Disassembly", draw, traits: ["follow", "show_bytes", "bits"] });
  const where = h("input", {
    class: "kb-goto", placeholder: "go to…", spellcheck: "false", "aria-label": "Go to a symbol, an address or a register",
    title: "Symbol, address or register such as loop+8, 0x1000, rip: Enter goes there (g)",
  });
  where.addEventListener("keydown", (event) => {
    if (event.key === "Escape") list.element.focus();
    if (event.key !== "Enter" || !where.value.trim()) return;
    event.preventDefault();
    goto(where.value.trim());
    list.element.focus();
  });
  const back = button("←", "Go back", () => frame.act("back"), { key: "-" });
  const forward = button("→", "Go forward", () => frame.act("forward"), { key: "+" });
  const follow = check("follow", "follow", "Each stop brings rip into sight (f)");
  const bytes = check("show_bytes", "bytes", "Show encodings");
  const bits = h("select", { "aria-label": "Width of code", title: "Decode as code of this width" },
    ...[[0, "auto"], [16, "16 bit"], [32, "32 bit"], [64, "64 bit"]].map(([value, words]) => h("option", { value: String(value) }, words)));
  bits.addEventListener("change", () => choose("bits", Number(bits.value)));
  const mode = h("span", { class: "kb-dim kb-mode" });
  frame.tools.append(where, back, forward, follow.label, bytes.label, bits, mode);

  const arrows = document.createElementNS(SVG, "svg");
  arrows.setAttribute("class", "kb-arrows");
  arrows.setAttribute("aria-hidden", "true");
  const list = rows({
    label: "Instructions: b breakpoint, t run to here, Enter goes to the target", height: ROW, signal, cursor: true,
    create, update, wanted: (first, count) => frame.act("show", { first, count }), drawn,
  });
  frame.body.append(list.element);
  let moves = null;

  function check(trait, words, title) {
    const box = h("input", { type: "checkbox" });
    box.addEventListener("change", () => choose(trait, box.checked));
    return { box, label: h("label", { title }, box, ` ${words}`) };
  }
  function choose(trait, value) {
    model.set(trait, value);
    model.save_changes();
  }
  const goto = (address) => frame.act("goto", { where: address });

  function draw(view, state) {
    follow.box.checked = model.get("follow");
    bytes.box.checked = model.get("show_bytes");
    bits.value = String(model.get("bits"));
    back.disabled = !view.back;
    forward.disabled = !view.forward;
    setText(mode, view.mode ? `vcpu ${view.vcpu}: ${view.mode}` : "");
    frame.root.classList.toggle("kb-no-bytes", !model.get("show_bytes"));
    const style = list.element.style;
    const width = (of, most) => Math.min(most, Math.max(0, ...(view.rows ?? []).map((row) => (row[of] ?? "").length)));
    style.setProperty("--kb-lanes", `${gutter()}px`);
    style.setProperty("--kb-address", `${width("address", 18)}ch`);
    style.setProperty("--kb-code", `${width("bytes", 23)}ch`);
    list.set(view.total ?? 0, view.first ?? 0, view.rows ?? []);
    if (view.moves === moves) return;
    moves = view.moves;
    list.setCursor(view.at ?? 0);
    list.scrollTo(view.at ?? 0, true);
  }
  const gutter = () => 8 + (model.get("view").lanes ?? 0) * LANE;

  function create() {
    const cells = ["mark", "gap", "here", "address", "bytes", "text", "source"];
    const node = h("div", { class: "kb-code" }, ...cells.map((name) => h("span", { class: `kb-${name}` })));
    node.children[5].append(h("span", { class: "kb-mnemonic" }), h("span", { class: "kb-operands" }), h("span", { class: "kb-comment" }), h("span", { class: "kb-taken" }));
    return node;
  }

  function update(node, row, index) {
    const view = model.get("view");
    const [mark, , here, address, bytes, text, source] = node.children;
    const [mnemonic, operands, comment, taken] = text.children;
    const code = row?.kind === "code", at = row?.breakpoint, now = code && index === view.here;
    setAttribute(node, "aria-current", now ? "true" : null);
    setAttribute(node, "class", `kb-code kb-is-${row?.kind ?? "unknown"}${now ? " kb-now" : ""}`);
    setText(mark, at ? (at.conditional ? "◆◇" : "●○")[at.enabled ? 0 : 1] : "");
    setAttribute(mark, "title", !code ? null : at ? `${at.words}: click removes it (b)` : "Click sets a breakpoint (b)");
    setText(here, now ? "➤" : "");
    setText(address, code ? row.address : "");
    setAttribute(address, "title", code ? [row.label, row.linear === row.address ? "" : `linear ${row.linear}`, "double click runs to here (t)"].filter(Boolean).join(", ") : null);
    setText(bytes, code ? row.bytes : "");
    bytes.classList.toggle("kb-changed", Boolean(row?.was));
    setAttribute(bytes, "title", row?.was ? `loaded as ${row.was}` : code ? row.bytes : null);
    setText(mnemonic, code ? row.mnemonic : row?.text ?? "…");
    setText(operands, row?.operands ?? "");
    operands.classList.toggle("kb-target", Boolean(code && row.target));
    mnemonic.classList.toggle("kb-target", Boolean(!code && row?.target));
    setAttribute(operands, "title", row?.target ? `${row.target}: click goes there (Enter)` : null);
    setText(comment, row?.comment ? `; ${row.comment}` : "");
    setText(taken, row?.taken === undefined ? "" : row.taken ? "jumps" : "falls through");
    const line = row?.line === undefined ? "" : `${row.line}${row.source ? `: ${row.source}` : ""}`;
    setText(source, line);
    setAttribute(source, "title", line ? `source line ${line}` : null);
    const words = code ? [now ? "current" : "", at ? (at.enabled ? "breakpoint" : "disabled breakpoint") : "", row.address, row.mnemonic, row.operands, row.comment ?? "", taken.textContent] : [row?.text ?? "not loaded"];
    setAttribute(node, "aria-label", words.filter(Boolean).join(" "));
  }

  // Arrows from jumps to their targets, left of the rows; those that only pass by are cut at the edges.
  function drawn(shown, top, count) {
    if (arrows.parentNode !== shown || arrows.nextSibling) shown.append(arrows);
    const width = gutter(), middle = (row) => (row - top) * ROW + ROW / 2;
    setAttribute(arrows, "width", width);
    setAttribute(arrows, "height", Math.max(0, count) * ROW);
    const seen = (model.get("view").arrows ?? []).filter(({ from, to }) => Math.max(from, to) >= top && Math.min(from, to) <= top + count);
    // The current one last: drawn over the others.
    seen.sort((one, other) => Number(Boolean(one.here)) - Number(Boolean(other.here)));
    each(arrows, seen, ({ from, to }) => `${from} ${to}`, () => document.createElementNS(SVG, "path"), (path, { from, to, lane, here, taken }) => {
      const x = width - 6 - lane * LANE, end = width - 1;
      const not = here && !taken;
      setAttribute(path, "d", `M${end} ${middle(from)}H${x}V${middle(to)}H${end}${not ? "" : "m-4 -3l4 3l-4 3"}`);
      setAttribute(path, "class", `kb-arrow${here ? " kb-arrow-here" : ""}${not ? " kb-arrow-not" : ""}`);
      if (here) path.parentNode?.append(path);
    });
  }

  const toggle = (row) => row?.kind === "code" && frame.act("toggle", { where: row.linear });
  const runTo = (row) => row?.kind === "code" && frame.act("run_to", { where: row.linear });
  const rowOf = (event) => {
    const node = event.target.closest("[aria-posinset]");
    return node && list.row(Number(node.getAttribute("aria-posinset")) - 1);
  };
  list.element.addEventListener("click", (event) => {
    const row = rowOf(event);
    if (!row) return;
    if (event.target.closest(".kb-mark")) toggle(row);
    else if (event.target.closest(".kb-target") && row.target) goto(row.target);
  });
  list.element.addEventListener("dblclick", (event) => {
    if (event.target.closest(".kb-address")) runTo(rowOf(event));
  });
  const keys = {
    b: toggle, t: runTo, Enter: (row) => row?.target && goto(row.target),
    "-": () => frame.act("back"), "+": () => frame.act("forward"), "=": () => frame.act("forward"),
    f: () => choose("follow", !model.get("follow")), g: () => { where.focus(); where.select(); },
  };
  list.element.addEventListener("keydown", (event) => {
    const act = keys[event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    act(list.row(list.cursor()));
  });
}

export default { render };
