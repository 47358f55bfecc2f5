// Lines of text as a terminal shows them: carriage return, backspace, tabs and colours; all else that controls is left out.

import { h } from "./element.js";

const MOST_LINES = 2000;
const MOST_COLUMNS = 4000;

// terminal(element): write(text) adds to it, note(words) a remark of ours, clear() empties it. Text is never read as HTML.
export function terminal(element) {
  let line = [], column = 0, style = "", node = null, held = "", sgr = {};

  const close = () => {
    show();
    node = null;
    line = [];
    column = 0;
  };
  // The line under way, one span a run of one style.
  const show = () => {
    if (!line.length && !node) return;
    node ??= append(h("div", { class: "kb-out" }));
    const runs = [];
    for (const [character, look] of line) {
      if (runs.length && runs.at(-1)[1] === look) runs.at(-1)[0] += character;
      else runs.push([character, look]);
    }
    node.replaceChildren(...runs.map(([text, look]) => (look ? h("span", { class: look }, text) : text)));
  };
  const append = (made) => {
    element.append(made);
    while (element.childElementCount > MOST_LINES) element.firstChild.remove();
    return made;
  };
  const put = (character) => {
    if (column >= MOST_COLUMNS) close();
    while (line.length < column) line.push([" ", ""]);
    line[column] = [character, style];
    column += 1;
  };
  const colours = (parameters) => {
    const codes = parameters.split(";").map(Number);
    for (let n = 0; n < codes.length; n += 1) {
      const code = codes[n];
      if (code === 0) sgr = {};
      else if (code === 1) sgr.b = true;
      else if (code === 2) sgr.d = true;
      else if (code === 3) sgr.i = true;
      else if (code === 4) sgr.u = true;
      else if (code === 7) sgr.v = true;
      else if (code === 22) sgr.b = sgr.d = false;
      else if (code === 23) sgr.i = false;
      else if (code === 24) sgr.u = false;
      else if (code === 27) sgr.v = false;
      else if (code >= 30 && code <= 37) sgr.c = code - 30;
      else if (code >= 90 && code <= 97) sgr.c = code - 90;
      else if (code === 39) sgr.c = 0;
      else if (code === 38 || code === 48) n += codes[n + 1] === 5 ? 2 : 4; // of 256 or of all colours: left out
    }
    const classes = ["b", "d", "i", "u", "v"].filter((each) => sgr[each]).map((each) => `kb-${each}`);
    if (sgr.c >= 1 && sgr.c <= 6) classes.push(`kb-c${sgr.c}`);
    style = classes.join(" ");
  };

  return {
    write(more) {
      let text = held + more;
      held = "";
      // A sequence cut in two waits for its end, but not for ever.
      const cut = /\x1b(?:\[[\x20-\x3f]*|\][^\x07\x1b]*|[()*+#%]?)$/.exec(text);
      if (cut && cut[0].length < 200) {
        held = cut[0];
        text = text.slice(0, cut.index);
      }
      for (const [, csi, final, other, character] of text.matchAll(/\x1b(?:\[([\x20-\x3f]*)([@-~])|(\][^\x07\x1b]*(?:\x07|\x1b\\)?|[()*+#%]?.))|([^\x1b])/gsu)) {
        if (other !== undefined) continue;
        if (final === "m") colours(csi);
        else if (final === "K" && !(csi > 0)) line.length = Math.min(line.length, column);
        else if (character === "\n") {
          if (!line.length && !node) append(h("div", { class: "kb-out" }));
          close();
        } else if (character === "\r") column = 0;
        else if (character === "\b") column = Math.max(0, column - 1);
        else if (character === "\t") do put(" "); while (column % 8);
        else if (character >= " " && character !== "\x7f") put(character);
      }
      show();
    },
    note(words) {
      close();
      append(h("div", { class: "kb-out kb-skipped" }, words));
    },
    clear() {
      element.replaceChildren();
      [line, column, node, held, style, sgr] = [[], 0, null, "", "", {}];
    },
  };
}
