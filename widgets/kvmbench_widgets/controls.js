// The buttons that move the guest, and one line that says where it stands.

import { h, setText } from "./element.js";
import { panel, button } from "./panel.js";

// Keys are those of the browser's own debuggers, each with a plain letter beside it.
export const COMMANDS = [
  { do: "step", label: "Step", title: "Execute one instruction", key: "s", code: "F11" },
  { do: "over", label: "Over", title: "Step over a call, a REP instruction or an INT", key: "o", code: "F10" },
  { do: "out", label: "Out", title: "Run to the end of this function", key: "u", code: "Shift+F11" },
  { do: "run", label: "Run", title: "Run until something stops the guest", key: "r", code: "F8" },
  { do: "pause", label: "Pause", title: "Stop the guest where it is", key: "p", code: "F9" },
  { do: "reset", label: "Reset", title: "Start anew: memory as loaded", key: "" },
];

function render(context) {
  const { model } = context;
  const frame = panel(context, { name: "controls", title: "Controls", draw, traits: ["vcpu", "deadline_s"] });
  const buttons = {};
  for (const command of COMMANDS) {
    buttons[command.do] = button(command.label, command.title, () => frame.act(command.do), { key: command.key, "data-do": command.do });
    frame.tools.append(buttons[command.do]);
  }
  buttons.run_all = button("Run all", "Run all vcpus at once until one stops", () => frame.act("run_all"), { "data-do": "run_all" });
  buttons.run.after(buttons.run_all);
  const count = h("input", { type: "number", min: "1", value: "1000", "aria-label": "How many steps", title: "How many steps", class: "kb-count" });
  const steps = () => Math.trunc(Number(count.value)) || 0; // 1e6 too
  buttons.many = button("×N", "Step that many instructions", () => frame.act("step", { count: steps() }), { "data-do": "many" });
  buttons.record = button("Record", "Keep every step: cpu.last_record", () => frame.act("record", { steps: steps() }), { "data-do": "record" });
  const where = h("input", { "aria-label": "Run until: symbol or address", title: "Symbol or address; Enter runs there", placeholder: "until…", class: "kb-until" });
  where.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && where.value.trim()) frame.act("until", { where: where.value.trim() });
  });
  const deadline = h("input", { type: "number", min: "0", step: "any", class: "kb-count", "aria-label": "Deadline in seconds, 0 for none", title: "A run ends by itself after so many seconds; 0: never" });
  deadline.addEventListener("change", () => {
    const value = Number(deadline.value);
    if (!(value >= 0)) return;
    model.set("deadline_s", value);
    model.save_changes();
  });
  const vcpu = h("select", { "aria-label": "vcpu", title: "Which vcpu is shown and moved" });
  vcpu.addEventListener("change", () => frame.act("choose", { vcpu: Number(vcpu.value) }));
  frame.tools.append(count, buttons.many, buttons.record, where, h("label", { class: "kb-dim" }, "deadline ", deadline, " s"), vcpu);
  const place = h("span", { class: "kb-place", "aria-live": "polite" });
  const cause = h("span", { class: "kb-cause" });
  const notes = h("div", { class: "kb-notes" });
  frame.body.append(cause, place, notes);

  function draw(view, state) {
    const busy = state === "running";
    const gone = state === "lost" || state === "closed";
    for (const [name, each] of Object.entries(buttons)) each.disabled = gone || (busy && name !== "pause");
    if (document.activeElement !== deadline) deadline.value = String(model.get("deadline_s"));
    while (vcpu.options.length < (view.vcpus ?? 0)) vcpu.append(h("option", { value: String(vcpu.options.length) }, `vcpu ${vcpu.options.length}`));
    vcpu.hidden = buttons.run_all.hidden = (view.vcpus ?? 0) < 2;
    vcpu.value = String(model.get("vcpu"));
    setText(cause, busy ? "running" : view.cause ?? "");
    setText(place, busy || !view.rip ? "" : ` at ${view.rip} ${view.label ?? ""}  ${view.instruction ?? ""}`);
    setText(notes, busy ? "" : (view.notes ?? []).join("; "));
  }
}

export default { render };
