// Exits to user space: how often each place was used, when, and one by one.

import { h, each, setText } from "./element.js";
import { panel, button } from "./panel.js";
import { rows } from "./rows.js";

const ROW = 18;
const SVG = "http://www.w3.org/2000/svg";

function render(context) {
  const { model, signal } = context;
  const frame = panel(context, { name: "exits", title: "Exits", draw, traits: ["follow"] });
  const total = h("span", { class: "kb-total" });
  const follow = h("input", { type: "checkbox" });
  follow.addEventListener("change", () => {
    model.set("follow", follow.checked);
    model.save_changes();
    if (follow.checked) list.scrollToEnd();
  });
  frame.tools.append(
    total,
    h("label", { title: "Stay at the newest exit" }, follow, " follow"),
    button("Clear", "Forget all exits so far", () => frame.act("clear"), { "data-do": "clear" }),
  );
  const lanes = h("div", { class: "kb-lanes", role: "img" });
  const span = h("div", { class: "kb-dim kb-span" });
  const list = rows({
    label: "Exits, oldest first", height: ROW, signal,
    create: () => h("div", { class: "kb-exit" }, ...["n", "us", "kind", "where", "value", "label"].map((name) => h("span", { class: `kb-exit-${name}` }))),
    update(node, row) {
      const cells = node.children;
      const words = row ? [row.n, `${row.us} µs`, row.kind, row.device || row.where, row.value, row.label || row.rip || ""] : ["…", "", "", "", "", ""];
      words.forEach((word, n) => setText(cells[n], String(word)));
      node.title = row ? `${row.kind} ${row.where} ${row.value} ${row.device ?? ""}` : "";
    },
    wanted: (first, count) => frame.act("show", { first, count }),
  });
  // Reading older exits while the guest makes new ones: the list stays where the reader is.
  const stay = () => {
    if (!model.get("follow")) return;
    model.set("follow", false);
    model.save_changes();
  };
  list.element.addEventListener("wheel", (event) => event.deltaY < 0 && stay());
  list.element.addEventListener("keydown", (event) => ["ArrowUp", "PageUp", "Home"].includes(event.key) && stay(), { capture: true });
  frame.body.append(lanes, span, list.element);

  function draw(view, state) {
    follow.checked = model.get("follow");
    setText(total, `${view.all ?? 0} exits${state === "running" && view.rate ? `, ${view.rate} a second` : ""}`);
    setText(span, view.span ? `the latest ${(view.total ?? 0).toLocaleString("en")}, over ${view.span}` : "no exits yet: step or run the guest");
    const peak = Math.max(1, ...(view.lanes ?? []).flatMap((lane) => lane.bins));
    lanes.setAttribute("aria-label", (view.lanes ?? []).map((lane) => `${lane.name}: ${lane.count}`).join(", ") || "no exits");
    each(lanes, view.lanes ?? [], (lane) => lane.name, create, (node, lane) => update(node, lane, peak));
    list.set(view.total ?? 0, view.first ?? 0, view.rows ?? []);
    if (model.get("follow")) list.scrollToEnd();
  }

  function create(lane) {
    const bars = document.createElementNS(SVG, "svg");
    bars.setAttribute("viewBox", `0 0 ${lane.bins.length} 10`);
    bars.setAttribute("preserveAspectRatio", "none");
    const path = document.createElementNS(SVG, "path");
    bars.append(path);
    return h("div", { class: "kb-lane" }, h("span", { class: "kb-name" }, lane.name), bars, h("span", { class: "kb-count" }));
  }

  function update(node, lane, peak) {
    const steps = lane.bins.map((count, n) => (count ? `M${n} 10V${10 - Math.max(1.5, (10 * count) / peak)}h.9V10z` : ""));
    node.querySelector("path").setAttribute("d", steps.join(""));
    setText(node.querySelector(".kb-count"), lane.count);
  }
}

export default { render };
