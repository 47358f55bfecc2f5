// All panels together: a code column, a side column, tabs below them, splitters between, and keys for everything.

import { h, setText, setAttribute, unique } from "./element.js";
import { panel, button } from "./panel.js";

const TITLES = {
  controls: "Controls", disassembly: "Disassembly", registers: "Registers", stack: "Stack", memory: "Memory",
  breakpoints: "Breakpoints", exits: "Exits", console: "Console",
};
// Where each panel is at first; a group with more than one has tabs.
const GROUPS = { code: ["disassembly"], side: ["registers"], below: ["memory", "exits"], corner: ["stack", "breakpoints", "console"] };
const KEYS = [
  ["s", "F11", "step", "Step one instruction"], ["o", "F10", "over", "Step over a call, REP or INT"],
  ["u", "Shift+F11", "out", "Run to the end of this function"], ["r", "F8", "run", "Run"],
  ["p", "F9", "pause", "Pause"],
];
const STORE = "kvmbench-workbench";
const DEFAULTS = { columns: 55, rows: 58, height: 680, front: { below: "memory", corner: "stack" }, hidden: [] };

function render(context) {
  const { model, host, signal } = context;
  const frame = panel(context, { name: "workbench", title: "Workbench", draw, traits: ["where", "children"] });
  const where = h("span", { class: "kb-where" });
  const help = keysHelp();
  frame.tools.append(where);
  frame.head.append(
    panelsMenu(),
    button("?", "Keyboard shortcuts", () => help.showModal(), { key: "?", class: "kb-button kb-help-button" }),
  );
  const area = h("div", { class: "kb-area" });
  const controls = h("div", { class: "kb-place-controls" });
  frame.body.append(controls, area);
  frame.root.append(help);
  const slots = Object.fromEntries(Object.keys(TITLES).map((name) => [name, h("div", { class: "kb-slot", id: unique(`slot-${name}`) })]));
  controls.append(slots.controls);
  const groups = Object.fromEntries(Object.keys(GROUPS).map((name) => [name, group(name)]));
  const columns = splitter("columns", "vertical", "Width of the code column");
  const rows = splitter("rows", "horizontal", "Height of the upper row");
  area.append(groups.code.element, columns, groups.side.element, rows, groups.below.element, groups.corner.element);
  let placed = "", drawn = null;

  // A reader's arrangement is kept with the widget, and by the browser for the next one.
  function arrangement() {
    const kept = model.get("arrangement");
    if (kept.columns) return { ...DEFAULTS, ...kept, front: { ...DEFAULTS.front, ...kept.front } };
    try {
      return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(STORE) ?? "{}") };
    } catch {
      return { ...DEFAULTS };
    }
  }
  function arrange(changes) {
    const now = { ...arrangement(), ...changes };
    model.set("arrangement", now);
    model.save_changes();
    try {
      localStorage.setItem(STORE, JSON.stringify(now));
    } catch {
      // No storage in this front end: the widget itself still remembers.
    }
    lay(now);
  }
  function lay({ columns: width, rows: height, height: all, front, hidden }) {
    area.style.setProperty("--kb-columns", `${width}%`);
    area.style.setProperty("--kb-rows", `${height}%`);
    area.style.setProperty("--kb-height", `${all}px`);
    setAttribute(columns, "aria-valuenow", Math.round(width));
    setAttribute(rows, "aria-valuenow", Math.round(height));
    for (const each of Object.values(groups)) each.show(front, hidden);
    slots.controls.hidden = hidden.includes("controls");
    for (const box of frame.head.querySelectorAll("[data-panel]")) box.checked = !hidden.includes(box.dataset.panel);
  }

  function group(name) {
    const list = h("div", { class: "kb-tabs", role: "tablist", "aria-label": `Panels ${name}` });
    const element = h("div", { class: `kb-group kb-group-${name}` }, list);
    const tabs = {};
    for (const each of GROUPS[name]) {
      tabs[each] = h("button", { class: "kb-tab", role: "tab", id: `${slots[each].id}-tab`, "aria-controls": slots[each].id, onclick: () => front(each) }, TITLES[each]);
      list.append(tabs[each]);
      slots[each].setAttribute("role", "tabpanel");
      slots[each].setAttribute("aria-labelledby", tabs[each].id);
      element.append(slots[each]);
    }
    list.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const open = GROUPS[name].filter((each) => !tabs[each].hidden);
      const next = open[(open.indexOf(event.target.dataset.panel ?? open.find((each) => tabs[each] === event.target)) + step + open.length) % open.length];
      front(next);
      tabs[next].focus();
      event.preventDefault();
      event.stopPropagation();
    });
    return {
      element,
      show(fronts, hidden) {
        const open = GROUPS[name].filter((each) => !hidden.includes(each));
        const chosen = open.includes(fronts[name]) ? fronts[name] : open[0];
        element.hidden = open.length === 0;
        list.hidden = GROUPS[name].length < 2;
        for (const each of GROUPS[name]) {
          tabs[each].hidden = !open.includes(each);
          setAttribute(tabs[each], "aria-selected", each === chosen ? "true" : "false");
          tabs[each].tabIndex = each === chosen ? 0 : -1;
          slots[each].hidden = each !== chosen;
        }
      },
    };
  }
  function front(name) {
    const [group] = Object.entries(GROUPS).find(([, names]) => names.includes(name)) ?? [];
    if (group) arrange({ front: { ...arrangement().front, [group]: name }, hidden: arrangement().hidden.filter((each) => each !== name) });
  }

  function splitter(name, orientation, label) {
    const bar = h("div", {
      class: `kb-splitter kb-splitter-${name}`, role: "separator", tabindex: "0", "aria-label": label,
      "aria-orientation": orientation, "aria-valuemin": "15", "aria-valuemax": "85", title: `${label}: drag, or arrow keys`,
    });
    const set = (value) => arrange({ [name]: Math.max(15, Math.min(85, value)) });
    bar.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -2, ArrowUp: -2, ArrowRight: 2, ArrowDown: 2 }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      set(arrangement()[name] + step);
    });
    bar.addEventListener("pointerdown", (event) => {
      bar.setPointerCapture(event.pointerId);
      event.preventDefault();
    });
    bar.addEventListener("pointermove", (event) => {
      if (!bar.hasPointerCapture(event.pointerId)) return;
      const box = area.getBoundingClientRect();
      set(orientation === "vertical" ? (100 * (event.clientX - box.left)) / box.width : (100 * (event.clientY - box.top)) / box.height);
    });
    return bar;
  }

  function panelsMenu() {
    const list = h("div", { class: "kb-menu", role: "group", "aria-label": "Panels shown" });
    for (const [name, title] of Object.entries(TITLES)) {
      const box = h("input", { type: "checkbox", "data-panel": name, onchange: () => {
        const hidden = arrangement().hidden.filter((each) => each !== name);
        arrange({ hidden: box.checked ? hidden : [...hidden, name] });
      } });
      list.append(h("label", { class: "kb-menu-item" }, box, ` ${title}`));
    }
    list.append(h("button", { onclick: () => arrange({ ...DEFAULTS }) }, "Original arrangement"));
    const details = h("details", { class: "kb-export" }, h("summary", { title: "Which panels are shown", "aria-label": "Panels shown" }, "☰"), list);
    details.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !details.open) return;
      details.open = false;
      details.firstChild.focus();
      event.stopPropagation();
    });
    return details;
  }

  function keysHelp() {
    const more = [
      ["1 … 8", "", "", "Go to a panel: controls, disassembly, registers, stack, memory, breakpoints, exits, console"],
      ["g", "", "", "Go to an address in the disassembly"], ["b", "", "", "In the disassembly: breakpoint on or off"],
      ["Tab, arrows", "", "", "Between controls; within lists, tabs and splitters"], ["Enter, Esc", "", "", "Edit a value; give up editing"],
      ["?", "", "", "This list"],
    ];
    const dialog = h("dialog", { class: "kb-help", "aria-label": "Keyboard shortcuts" }, h("h4", {}, "Keyboard shortcuts"));
    const table = h("table", {});
    for (const [key, code, , words] of [...KEYS, ...more]) {
      table.append(h("tr", {}, h("td", {}, h("kbd", {}, key), code ? " or " : "", code ? h("kbd", {}, code) : null), h("td", {}, words)));
    }
    dialog.append(table, h("button", { onclick: () => dialog.close() }, "Close"));
    return dialog;
  }

  frame.root.addEventListener("keydown", async (event) => {
    if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    if (event.target.closest("input, select, textarea, [contenteditable]") && !/^F\d+$/.test(event.key)) return;
    const pressed = `${event.shiftKey && event.key.length > 1 ? "Shift+" : ""}${event.key}`;
    const found = KEYS.find(([key, code]) => pressed === key || pressed === code);
    const number = Number.parseInt(pressed, 10);
    if (found) {
      event.preventDefault();
      const controls = await host.getModel(model.get("children").controls);
      if (found[2] !== "pause" && controls.get("state") === "running") return;
      // A key held down steps as quickly as can be seen, and no step is left to make when it is let go.
      if (event.repeat && drawn === controls.get("view")) return;
      drawn = controls.get("view");
      controls.send({ do: found[2] });
    } else if (pressed === "?") {
      event.preventDefault();
      help.showModal();
    } else if (number >= 1 && number <= 8) {
      event.preventDefault();
      const name = Object.keys(TITLES)[number - 1];
      front(name);
      focusIn(slots[name]);
    } else if (pressed === "g") {
      const box = slots.disassembly.querySelector("input");
      if (box) {
        event.preventDefault();
        front("disassembly");
        box.focus();
        box.select();
      }
    }
  });
  function focusIn(slot) {
    const body = slot.querySelector(".kb-body");
    (body?.querySelector("[tabindex='0'], button, input") ?? slot.querySelector(".kb-tools :is(button, input)"))?.focus();
  }

  async function place() {
    const children = model.get("children");
    const key = JSON.stringify(children);
    if (placed === key) return;
    placed = key;
    for (const [name, reference] of Object.entries(children)) {
      if (!slots[name]) continue;
      slots[name].replaceChildren();
      const child = await host.getWidget(reference);
      await child.render({ el: slots[name], signal });
    }
  }

  function draw() {
    setText(where, model.get("where"));
    where.title = model.get("where");
    lay(arrangement());
    place();
  }
}

export default { render };
