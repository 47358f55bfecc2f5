// What the guest sends, as it comes, and a line to send it something.

import { h, setText, setAttribute, unique } from "./element.js";
import { panel, button } from "./panel.js";
import { terminal } from "./terminal.js";

const CONTROLS = [["C", "Ctrl-C"], ["D", "Ctrl-D"], ["Z", "Ctrl-Z"], ["A", "Ctrl-A"], ["X", "Ctrl-X"], ["Esc", "Esc"], ["Tab", "Tab"], ["Backspace", "Backspace"]];
const STREAMS = [["serial", "Serial"], ["debug", "Debug 0xe9"]];

function render(context) {
  const { model, signal } = context;
  const frame = panel(context, { name: "console", title: "Console", draw, traits: ["newline"] });
  const id = unique("console");
  let front = "serial";
  const tabs = h("span", { role: "tablist", "aria-label": "Streams" });
  const more = button("↓ newest", "Scroll to what came last", () => toEnd(streams[front].log), { class: "kb-button kb-more", hidden: true });
  const streams = {};
  for (const [name, words] of STREAMS) {
    const log = h("div", { class: "kb-log", role: "log", tabindex: "0", "aria-label": `${words} output`, id: `${id}-${name}` });
    const tab = h("button", { role: "tab", "aria-controls": log.id, onclick: () => bring(name) }, words);
    streams[name] = { log, tab, terminal: terminal(log), end: null, follow: true };
    log.addEventListener("scroll", () => {
      streams[name].follow = atEnd(log);
      if (streams[name].follow) more.hidden = true;
    });
    tabs.append(tab);
    frame.body.append(log);
  }
  tabs.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    event.stopPropagation();
    bring(front === "serial" ? "debug" : "serial");
    streams[front].tab.focus();
  });

  const input = h("input", { "aria-label": "Line to send to the guest", title: "Enter sends it; up and down recall lines", placeholder: "send to the guest…", spellcheck: "false", autocomplete: "off" });
  const history = [];
  let recalled = 0;
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      frame.act("write", { text: input.value });
      if (input.value && history.at(-1) !== input.value) history.push(input.value);
      recalled = history.length;
      input.value = "";
    } else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      recalled = Math.max(0, Math.min(history.length, recalled + (event.key === "ArrowUp" ? -1 : 1)));
      input.value = history[recalled] ?? "";
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const newline = h("select", { "aria-label": "What Enter sends", title: "What Enter sends behind the line" }, ...[["cr", "CR"], ["lf", "LF"], ["none", "nothing"]].map(([value, words]) => h("option", { value }, words)));
  newline.addEventListener("change", () => {
    model.set("newline", newline.value);
    model.save_changes();
  });
  const control = h("select", { "aria-label": "Send a control character", title: "Send a control character" }, h("option", { value: "" }, "Ctrl…"), ...CONTROLS.map(([value, words]) => h("option", { value }, words)));
  control.addEventListener("change", () => {
    if (control.value) frame.act("control", { key: control.value });
    control.value = "";
  });
  const waiting = h("span", { class: "kb-dim" });
  const send = h("div", { class: "kb-send" }, input, newline, control, waiting);
  frame.body.append(send, more);
  frame.tools.append(
    tabs,
    button("Clear", "Empty this output", () => frame.act("clear", { stream: front }), { "data-do": "clear" }),
    button("Copy", "Copy this output, or what is selected in it", copy, { "data-do": "copy" }),
  );

  function bring(name) {
    front = name;
    for (const [each, { log, tab }] of Object.entries(streams)) {
      log.hidden = each !== name;
      setAttribute(tab, "aria-selected", each === name ? "true" : "false");
      tab.tabIndex = each === name ? 0 : -1;
    }
    send.hidden = name !== "serial";
    more.hidden = true;
    if (streams[name].follow) toEnd(streams[name].log);
  }
  function atEnd(log) {
    return log.scrollHeight - log.scrollTop - log.clientHeight < 24;
  }
  function toEnd(log) {
    log.scrollTop = log.scrollHeight;
  }

  // Messages say where their text goes, so none is shown twice and none is missed unnoticed.
  function take({ stream, from, text, reset, skipped, again, cut }) {
    const each = streams[stream];
    if (!each) return;
    const end = from + text.length;
    if (again || reset) {
      if (again && each.end === end) return;
      each.terminal.clear();
      if (cut) each.terminal.note("… what came before is not kept");
    } else if (each.end === null || from > each.end) {
      frame.act("again");
      return;
    } else if (end <= each.end) return;
    else text = text.slice(each.end - from);
    each.end = end;
    // Asked here too: the event of a scroll comes a frame after it.
    if (!each.log.hidden) each.follow = atEnd(each.log);
    if (skipped) each.terminal.note(`… ${skipped.toLocaleString("en")} bytes left out: more than can be read`);
    each.terminal.write(text);
    if (each.follow) toEnd(each.log);
    else if (stream === front) more.hidden = false;
  }
  const onMessage = (message) => {
    if (message.do === "text") take(message);
    else if (message.do === "clear") streams[message.stream]?.terminal.clear();
  };
  model.on("msg:custom", onMessage);
  signal.addEventListener("abort", () => model.off("msg:custom", onMessage));

  async function copy() {
    const { log } = streams[front];
    const selection = document.getSelection();
    const chosen = selection.isCollapsed || !log.contains(selection.anchorNode) ? [...log.children].map((line) => line.textContent).join("\n") : selection.toString();
    try {
      await navigator.clipboard.writeText(chosen);
    } catch {
      // No clipboard for scripts here: select it all, and the reader's own Ctrl-C copies.
      selection.selectAllChildren(log);
    }
  }

  function draw(view, state) {
    newline.value = model.get("newline");
    input.disabled = control.disabled = state === "lost" || state === "closed";
    setText(waiting, view.waiting ? `${view.waiting.toLocaleString("en")} B not read yet` : "");
    for (const { name, bytes } of view.streams ?? []) setAttribute(streams[name].tab, "title", `${bytes} bytes`);
  }

  // What the widget's state holds at once, without a kernel too; a kernel that is there tells what came since.
  for (const [name, { text, end, cut }] of Object.entries(model.get("tail") ?? {})) {
    take({ stream: name, from: end - text.length, text, again: true, cut });
  }
  bring("serial");
  frame.act("again");
}

export default { render };
