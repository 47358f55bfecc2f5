"""The workbench in a real JupyterLab and Chromium: from a click to what it shows, scrolling, and a storm of exits.

Needs what the browser tests need (`./workbench test` installs it). Times are the page's own, performance.now() and
frames drawn; a headless Chromium draws 60 frames a second, so 16.7 ms is the least a change can take to be seen.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "widgets"))

from lab import CHROMIUM, CHROMIUM_OPTIONS, Lab, Notebook, start_lab
from playwright.sync_api import sync_playwright

GUEST = """
import kvmbench as kb, kvmbench_widgets as kw
host = kb.connect({host!r}, quiet=True)
m = kb.Machine(host, memory="16M", mode="long")
m.load_asm('''
start:  inc rax
        add rbx, rax
        push rax
        pop rcx
        jmp start
storm:  mov dx, 0x80
again:  out dx, al
        jmp again
''' + "nop; inc r8\\n" * 5000, at=0x1000)
cpu = m.cpu
wb = kw.Workbench(m)
wb
"""
# From the click until the registers, the code and the controls show the new rip.
CLICK = """async () => {
  const find = selector => document.querySelector(selector);
  const seen = () => ['[data-register=rip]', '.kb-disassembly [aria-current=true]', '.kb-controls .kb-place']
    .map(each => find(each)?.textContent);
  const before = seen();
  const start = performance.now();
  find('.kb-controls [data-do=step]').click();
  for (;;) {
    await new Promise(requestAnimationFrame);
    if (seen().every((text, n) => text !== before[n])) return performance.now() - start;
    if (performance.now() - start > 5000) throw new Error('not shown: ' + JSON.stringify([before, seen()]));
  }
}"""
# From a jump of the scroll position until no row in sight is a placeholder; then the longest frame of a fast scroll.
SCROLL = """async ([panel, jumps]) => {
  const list = document.querySelector(`.kb-${panel} .kb-scroller`);
  const rows = () => [...list.querySelectorAll('.kb-shown > [role]')];
  const filled = () => rows().length > 3 && rows().every(row => row.textContent.trim().replace('…', '').length > 0);
  const times = [];
  for (let n = 1; n <= jumps; n++) {
    const start = performance.now();
    list.scrollTop = (list.scrollHeight - list.clientHeight) * ((n * 0.381966) % 1);
    do await new Promise(requestAnimationFrame); while (!filled() && performance.now() - start < 3000);
    times.push(performance.now() - start);
  }
  const frames = [];
  let last = performance.now();
  for (let n = 0; n < 120; n++) {
    list.dispatchEvent(new WheelEvent('wheel', { deltaY: 120, cancelable: true, bubbles: true }));
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return [times, frames];
}"""
FRAMES = """async seconds => {
  const frames = [];
  let last = performance.now();
  const end = last + seconds * 1000;
  while (last < end) {
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
  }
  return frames;
}"""


def late(times: list[float]) -> float:
    """What 95 of 100 keep."""
    return statistics.quantiles(times, n=20)[-1]


def tell(what: str, times: list[float], more: str) -> None:
    """Prints one line."""
    print(f"    {what:<44} {statistics.median(times):6.1f} ms, p95 {late(times):6.1f} ms; {more}")


def measure(lab: Lab, browser: Any, host: str, clicks: int) -> None:
    page = browser.new_page(viewport={"width": 1500, "height": 1100})
    opened = Notebook.open(lab, page, [GUEST.format(host=host)])
    try:
        opened.run_all()
        print(f"  {opened.python('str(host.provenance)')}")
        page.locator(".kb-disassembly [aria-current=true]").wait_for()
        for _ in range(10):
            page.evaluate(CLICK)
        times = [page.evaluate(CLICK) for _ in range(clicks)]
        tell("click on Step to all panels", times, "goal 100")
        for panel in ("disassembly", "memory"):
            jumps, frames = page.evaluate(SCROLL, [panel, 30])
            tell(f"a jump in {panel} to rows in sight", jumps, f"scrolling: frames p95 {late(frames):.1f} ms")
        page.locator(".kb-workbench [role=tab]", has_text="Exits").click()
        opened.python("setattr(cpu.regs, 'rip', cpu.symbols['storm'])")
        before = int(opened.python("wb.exits.log.total"))
        page.locator(".kb-controls [data-do=run]").click()
        page.wait_for_function("() => document.querySelector('.kb-exits').dataset.state === 'running'")
        frames = page.evaluate(FRAMES, 5)
        rate = page.locator(".kb-exits .kb-total").inner_text()
        page.locator(".kb-controls [data-do=pause]").click()
        page.wait_for_function("() => document.querySelector('.kb-exits').dataset.state === 'stopped'")
        made = int(opened.python("wb.exits.log.total")) - before
        tell("frames while a guest makes exits", frames, f"{made:,} exits ({rate})")
    finally:
        opened.close()
        page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", default="local,npt1", help="comma-separated: local, npt1")
    parser.add_argument("--clicks", type=int, default=200)
    options = parser.parse_args()
    print((__doc__ or "").strip().splitlines()[0])
    if not Path(CHROMIUM).exists():
        print(f"  {CHROMIUM} is missing (apt-get install chromium)")
        return
    with tempfile.TemporaryDirectory() as folder, start_lab(Path(folder)) as lab, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(CHROMIUM_OPTIONS))
        for host in options.hosts.split(","):
            measure(lab, browser, {"npt1": "appliance"}.get(host, host), options.clicks)
        browser.close()


if __name__ == "__main__":
    main()
