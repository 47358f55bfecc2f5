// Bytes of the guest as hex and as text: a cursor that keys move, marks on what changed, edits written with Enter.

import { h, setText, setAttribute, unique } from "./element.js";
import { panel, button } from "./panel.js";
import { rows } from "./rows.js";

const ROW = 18;
const WATCH_MS = 1500;


function render(context) {
  const { model, signal } = context;
  const frame = panel(context, { name: "memory", title: "Memory", draw, traits: ["space", "width", "group", "live"] });
  const id = unique("memory");
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const select = (name, title, options) => {
    const element = h("select", { "aria-label": title, title }, ...options.map(([value, words]) => h("option", { value }, words)));
    element.addEventListener("change", () => set(name, name === "space" ? element.value : Number(element.value)));
    return element;
  };
  const field = (name, title, placeholder, enter) => {
    const element = h("input", { class: `kb-${name}`, "aria-label": title, title: `${title} (Enter)`, placeholder, spellcheck: "false" });
    element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && element.value) enter(element.value);
    });
    return element;
  };

  const space = select("space", "Kind of address", [["gpa", "gpa"], ["gva", "gva"]]);
  const go = field("go", "Go to a symbol, register or number, such as rsp+8", "go to…", (where) => frame.act("go", { where: where.trim() }));
  const region = h("select", { "aria-label": "Region of memory", title: "Go to a region of memory", class: "kb-region" }, h("option", { value: "" }, "region…"));
  region.addEventListener("change", () => {
    if (region.value) frame.act("region", { at: region.value });
    region.value = "";
  });
  const width = select("width", "Bytes in a row", [["16", "16 a row"], ["8", "8 a row"]]);
  const group = select("group", "Bytes in a number, little-endian", [["1", "bytes"], ["2", "u16"], ["4", "u32"], ["8", "u64"]]);
  const kind = h("select", { "aria-label": "Look for", title: "What to look for" }, h("option", { value: "text" }, "text"), h("option", { value: "hex" }, "hex"));
  const look = () => what.value && frame.act("find", { pattern: what.value, kind: kind.value });
  const what = field("find", "Find the next place that holds this", "find…", look);
  const live = h("input", { type: "checkbox" });
  live.addEventListener("change", () => set("live", live.checked));
  frame.tools.append(
    space, go, region, width, group, kind, what, button("Next", "Find the next place", look, { "data-do": "find" }),
    h("label", { title: "Read guest-physical memory again and again while the guest runs" }, live, " live"),
  );

  const list = rows({
    label: "Memory: arrows move, Enter edits, F2 changes between hex and text", height: ROW, signal, role: "grid", itemRole: "row", create, update,
    drawn: describe,
    wanted: (first, count) => frame.act("show", { first, count }),
  });
  const grid = list.element;
  const cells = h("div", { class: "kb-cells" }, grid);
  const inspector = h("div", { class: "kb-inspector", "aria-live": "polite" });
  frame.body.append(cells, inspector);

  // Where the cursor is: row and byte in it, in which column; with `editing`, which digit of the number is typed next.
  const cursor = { row: 0, column: 0, text: false, editing: false, digit: 0 };
  const pending = new Map(); // address as a decimal string to the byte typed there
  let shown = "", placed = -1, fitted = false;
  const view = () => model.get("view");
  const size = () => Number(model.get("group"));
  const known = (index) => list.row(index);
  const address = (row, column) => BigInt(`0x${row.at}`) + BigInt(column);
  const pairs = (hex) => hex?.match(/../g) ?? [];

  // A row as bytes, with what is typed but not yet written.
  function bytesOf(row) {
    const bytes = pairs(row.hex);
    return pending.size ? bytes.map((byte, n) => pending.get(String(address(row, n))) ?? byte) : bytes;
  }

  function create() {
    return h(
      "div", { class: "kb-line" },
      h("span", { class: "kb-name kb-at", role: "rowheader" }), "  ", h("span", { class: "kb-hex" }), " ", h("span", { class: "kb-text", role: "gridcell" }),
      "  ", h("span", { class: "kb-dim kb-note", role: "gridcell" }),
    );
  }

  function update(node, row, index) {
    const [at, hex, text, note] = node.children;
    node.dataset.row = index;
    setText(at, row ? row.at : "…");
    setText(note, row?.note ?? row?.label ?? "");
    const bytes = row?.hex ? bytesOf(row) : [];
    const was = row?.was ? pairs(row.was) : null;
    const now = pairs(row?.hex);
    const step = size();
    fill(hex, bytes.length / step, "gridcell", " ");
    fill(text, bytes.length, null, "");
    text.hidden = hex.hidden = !bytes.length;
    const here = index === cursor.row;
    text.id = `${id}-text-${index}`;
    const place = view().place?.length ? [BigInt(view().place.at), BigInt(view().place.length)] : null;
    const mark = (cell, from, count, old) => {
      const part = (list) => list.slice(from, from + count).reverse().join("");
      const typed = pending.size > 0 && part(bytes) !== part(now);
      const changed = was && part(was) !== part(now);
      const first = address(row, from);
      cell.classList.toggle("kb-changed", Boolean(changed));
      cell.classList.toggle("kb-typed", typed);
      cell.classList.toggle("kb-found", Boolean(place) && first < place[0] + place[1] && first + BigInt(count) > place[0]);
      const on = here && cursor.column >= from && cursor.column < from + count;
      cell.classList.toggle("kb-cursor", on && old === cursor.text);
      cell.classList.toggle("kb-editing", on && old === cursor.text && cursor.editing);
      setAttribute(cell, "title", changed ? `was ${part(was)}` : null);
    };
    [...hex.children].forEach((cell, n) => {
      setText(cell, bytes.slice(n * step, n * step + step).reverse().join(""));
      cell.id = `${id}-${index}-${n}`;
      mark(cell, n * step, step, false);
    });
    [...text.children].forEach((cell, n) => {
      const code = Number.parseInt(bytes[n], 16);
      setText(cell, code >= 0x20 && code < 0x7f ? String.fromCharCode(code) : ".");
      mark(cell, n, 1, true);
    });
  }

  // Spans with a blank between them that is text too, so that copied rows read as they look.
  function fill(parent, count, role, between) {
    if (parent.children.length === count) return;
    parent.replaceChildren(...Array.from({ length: count }, () => [h("span", { role, class: "kb-byte" }), between]).flat());
  }

  function draw(now, state) {
    const frozen = state === "running" && !now.live;
    const key = `${now.space} ${now.width}`;
    if (shown !== key) {
      if (shown) stopEditing();
      shown = key;
    }
    space.value = model.get("space");
    width.value = String(model.get("width"));
    group.value = String(size());
    live.checked = model.get("live");
    live.disabled = model.get("space") !== "gpa";
    const choices = now.regions ?? [];
    if (region.options.length !== choices.length + 1 || choices.some((each, n) => region.options[n + 1].textContent !== each.words)) {
      region.replaceChildren(region.options[0], ...choices.map((each) => h("option", { value: each.at }, each.words)));
    }
    const digits = now.digits ?? 8, bytes = now.width ?? 16;
    cells.style.setProperty("--kb-columns", `${digits + 3 + (bytes / size()) * (2 * size() + 1) + bytes + 1}ch`);
    frame.root.classList.toggle("kb-frozen", frozen);
    setAttribute(grid, "aria-rowcount", now.total < 2 ** 31 ? now.total : -1);
    const moved = now.place?.n !== undefined && now.place.n !== placed;
    if (moved) {
      placed = now.place.n;
      stopEditing();
      Object.assign(cursor, { row: now.place.row, column: now.place.column, digit: 0 });
    }
    list.set(now.total ?? 0, now.first ?? 0, now.rows ?? [], moved ? cursor.row : null);
    inspect(frozen);
  }

  // What the bytes at the cursor are as numbers: BigInt, since a double has 53 bits.
  function inspect(frozen) {
    const row = known(cursor.row);
    const notes = frozen ? ["as of the last stop"] : [];
    if (pending.size) notes.push(`${pending.size} byte${pending.size > 1 ? "s" : ""} typed: Enter writes, Esc gives up`);
    else if (cursor.editing) notes.push("type over it; Esc leaves");
    if (row?.hex) {
      const near = [...bytesOf(row), ...(known(cursor.row + 1)?.hex ? bytesOf(known(cursor.row + 1)) : [])].slice(cursor.column, cursor.column + 8);
      notes.push(`0x${address(row, cursor.column).toString(16)}`);
      for (const count of [1, 2, 4, 8]) {
        if (near.length >= count) {
          const value = BigInt(`0x${near.slice(0, count).reverse().join("")}`);
          notes.push(`u${count * 8} 0x${value.toString(16)}${count < 8 ? ` = ${value}` : ""}`);
        }
      }
    } else if (row?.note) notes.push(`0x${row.at}: ${row.note}`);
    setText(inspector, notes.join("   "));
  }

  // What a screen reader says: the number or the text at the cursor, if it is in sight.
  function describe() {
    setAttribute(grid, "aria-activedescendant", grid.querySelector(".kb-cursor")?.closest("[role=gridcell]").id ?? null);
  }

  function redraw() {
    list.set(view().total ?? 0, view().first ?? 0, view().rows ?? []);
    inspect(frame.root.classList.contains("kb-frozen"));
  }

  function stopEditing() {
    pending.clear();
    cursor.editing = false;
    cursor.digit = 0;
  }

  function moveTo(row, column) {
    const bytes = view().width ?? 16;
    row += Math.floor(column / bytes);
    column = ((column % bytes) + bytes) % bytes;
    if (row < 0 || row >= (view().total ?? 0)) return;
    cursor.row = row;
    cursor.column = column;
    cursor.digit = 0;
    list.scrollTo(row, true);
    redraw();
  }

  function type(key) {
    const row = known(cursor.row);
    if (!row?.hex) return;
    const put = (column, byte) => pending.set(String(address(row, column)), byte);
    if (cursor.text) {
      put(cursor.column, key.charCodeAt(0).toString(16).padStart(2, "0"));
      moveTo(cursor.row, cursor.column + 1);
      return;
    }
    // The digits of a number are typed as they stand, the highest first; its lowest byte comes first in memory.
    const step = size(), start = cursor.column - (cursor.column % step);
    const column = start + step - 1 - Math.floor(cursor.digit / 2);
    const old = bytesOf(row)[column];
    put(column, cursor.digit % 2 ? old[0] + key : key + old[1]);
    const digit = cursor.digit + 1;
    if (digit === 2 * step) moveTo(cursor.row, start + step);
    else cursor.digit = digit;
    redraw();
  }

  function commit() {
    const edits = [];
    let last = null;
    for (const at of [...pending.keys()].map(BigInt).sort((a, b) => (a < b ? -1 : 1))) {
      const byte = pending.get(String(at));
      if (last !== null && at === last + 1n) edits.at(-1)[1] += byte;
      else edits.push([`0x${at.toString(16)}`, byte]);
      last = at;
    }
    stopEditing();
    frame.act("write", { edits });
    redraw();
  }

  // Ahead of the list's own keys, which scroll.
  frame.body.addEventListener("keydown", (event) => {
    if (event.target !== grid || event.altKey || event.metaKey) return;
    const bytes = view().width ?? 16, step = cursor.text ? 1 : size();
    const column = cursor.column - (cursor.column % step), page = Math.max(1, Math.floor(grid.clientHeight / ROW) - 1);
    const edges = event.ctrlKey ? { Home: [0, 0], End: [(view().total ?? 1) - 1, bytes - step] } : { Home: [cursor.row, 0], End: [cursor.row, bytes - step] };
    const to = {
      ArrowLeft: [cursor.row, column - step], ArrowRight: [cursor.row, column + step], ArrowUp: [cursor.row - 1, column],
      ArrowDown: [cursor.row + 1, column], PageUp: [Math.max(0, cursor.row - page), column],
      PageDown: [Math.min((view().total ?? 1) - 1, cursor.row + page), column], ...edges,
    }[event.key];
    if (to) moveTo(...to);
    else if (event.ctrlKey) return;
    else if (event.key === "F2") cursor.text = !cursor.text;
    else if (event.key === "Enter" && pending.size) commit();
    else if (event.key === "Enter") cursor.editing = !cursor.editing;
    else if (event.key === "Escape" && cursor.editing) stopEditing();
    else if (event.key === "Backspace" && cursor.editing) {
      const row = known(cursor.row);
      if (cursor.digit) cursor.digit = 0;
      else moveTo(cursor.row, column - step);
      const again = known(cursor.row) ?? row;
      for (let n = 0; again && n < step; n += 1) pending.delete(String(address(again, cursor.column - (cursor.column % step) + n)));
    } else if (cursor.editing && (cursor.text ? /^[ -~]$/ : /^[0-9a-fA-F]$/).test(event.key)) type(cursor.text ? event.key : event.key.toLowerCase());
    else if (!(cursor.editing && pending.size && event.key.length === 1)) return; // a step would take away what is typed
    event.preventDefault();
    event.stopPropagation();
    redraw();
  }, true);

  grid.addEventListener("click", (event) => {
    const cell = event.target.closest(".kb-byte");
    // A drag selects text to copy; it must not begin an edit.
    if (!cell || !document.getSelection().isCollapsed) return;
    const text = cell.parentElement.classList.contains("kb-text");
    cursor.text = text;
    cursor.editing = true;
    moveTo(Number(cell.closest("[data-row]").dataset.row), [...cell.parentElement.children].indexOf(cell) * (text ? 1 : size()));
  });

  // Live reading costs the guest's host something: it goes on only while somebody can see it.
  let visible = false;
  const watch = () => {
    if (visible && document.visibilityState === "visible" && model.get("state") === "running" && model.get("live")) set("looked_at", (model.get("looked_at") + 1) % 1_000_000);
  };
  const observer = new IntersectionObserver((entries) => {
    visible = entries.at(-1).isIntersecting;
    watch();
  });
  observer.observe(frame.root);
  const timer = setInterval(watch, WATCH_MS);
  model.on("change:state", watch);
  // In a narrow column rows of 16 do not fit: 8 do. Once; what the reader chooses afterwards stays.
  const resized = new ResizeObserver(() => {
    if (fitted || !cells.clientWidth || !grid.scrollWidth) return;
    fitted = true;
    if (model.get("width") === 16 && cells.clientWidth < cells.scrollWidth) set("width", 8);
  });
  resized.observe(cells);
  signal.addEventListener("abort", () => {
    observer.disconnect();
    resized.disconnect();
    clearInterval(timer);
    model.off("change:state", watch);
  });
}

export default { render };
