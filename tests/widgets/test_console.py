"""The Console panel: a guest that talks, one that floods, and a page that reloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from playwright.sync_api import expect

from .. import panel_guests as programs
from .guests import MACHINE
from .lab import Notebook

ECHO = f"m.load_asm({programs.ECHO!r}, at=0x1000)\ncon = kw.Console(m); con"
FLOOD = """
m.load_asm('''
        mov dx, 0x3f8
again:  mov al, '#'
        mov ecx, 60
line:   out dx, al
        loop line
        mov al, 10
        out dx, al
        jmp again
''', at=0x1000)
con = kw.Console(m); con
"""


def log(panel: Any, name: str = "Serial") -> Any:
    return panel.get_by_role("log", name=f"{name}")


def test_keys_alone_talk_with_a_running_guest(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, ECHO, "c = kw.Controls(m); c"])
    opened.run_all()
    panel = opened.panel("Console")
    box = panel.get_by_label("Line to send to the guest")
    opened.panel("Controls").locator("[data-do=run]").click()
    panel.get_by_label("What Enter sends").select_option("lf")
    box.focus()
    page.keyboard.type("first line")
    page.keyboard.press("Enter")
    expect(log(panel).locator(".kb-out").first).to_have_text("first line")
    page.keyboard.type("second <b>é</b>")
    page.keyboard.press("Enter")
    expect(log(panel).locator(".kb-out").nth(1)).to_have_text("second <b>é</b>")
    expect(log(panel).locator("b")).to_have_count(0)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowUp")
    expect(box).to_have_value("first line")
    panel.get_by_label("Send a control character").select_option("C")
    # The guest has the byte once the dot behind it is out.
    panel.get_by_role("tab", name="Debug 0xe9").click()
    expect(log(panel, "Debug 0xe9")).to_have_text("." * (11 + 17 + 1))
    expect(box).to_be_hidden()
    assert opened.python("m.serial.text") == "first line\nsecond <b>é</b>\n\x03"
    opened.panel("Controls").locator("[data-do=pause]").click()

    # A page that loads later shows the same.
    opened.command("docmanager:save")
    opened.reload()
    expect(log(panel).locator(".kb-out").nth(1)).to_have_text("second <b>é</b>")
    panel.get_by_role("button", name="Empty this output").click()
    expect(log(panel).locator(".kb-out")).to_have_count(0)


def test_terminal_output_is_drawn_and_copied_as_text(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook([MACHINE, ECHO])
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.run_all()
    panel = opened.panel("Console")
    lines = log(panel).locator(".kb-out")

    def send(text: str) -> None:
        opened.python(f"[m.serial.port_out(0x3f8, byte, 1) for byte in {text.encode()!r}] and con.refresh()")

    send("\x1b[1;31mred\x1b[0m plain\r\n10%\r")
    send("100%\r\na\tb\x1b[")
    send("32mgreen\x1b[0m\x1b]0;title\x07 <img src=x onerror=alert(1)>\nabcd\b\bX")
    expect(lines).to_have_text(
        ["red plain", "100%", "a       bgreen <img src=x onerror=alert(1)>", "abXd"], use_inner_text=True
    )
    expect(lines.first.locator(".kb-b.kb-c1")).to_have_text("red")
    expect(lines.nth(2).locator(".kb-c2")).to_have_text("green")
    assert log(panel).locator("img").count() == 0
    panel.get_by_role("button", name="Copy this output").click()
    page.wait_for_function("navigator.clipboard.readText().then(text => text.startsWith('red plain\\n100%'))")
    # A reader who has scrolled up is left there.
    send("\n" + "line\n" * 100)
    expect(lines).to_have_count(104)
    assert log(panel).evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 24
    log(panel).evaluate("e => { e.scrollTop = 0; }")
    newest = panel.get_by_role("button", name="Scroll to what came last")
    page.wait_for_function("() => document.querySelector('.kb-log').scrollTop === 0")
    send("one more\n")
    expect(newest).to_be_visible()
    assert log(panel).evaluate("e => e.scrollTop") == 0
    newest.click()
    expect(newest).to_be_hidden()
    assert log(panel).evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 24


def test_a_flood_leaves_the_page_quick(notebook: Callable[..., Notebook], page: Any) -> None:
    opened = notebook(
        [MACHINE, FLOOD, "c = kw.Controls(m); c", "m.serial.output.extend((b'o' * 99 + b'\\n') * 20_000)"]
    )
    opened.run_all()
    panel = opened.panel("Console")
    expect(log(panel).locator(".kb-skipped").first).to_contain_text("…")
    opened.panel("Controls").locator("[data-do=run]").click()
    expect(log(panel)).to_contain_text("#" * 60)
    # The longest time the page took for anything while the guest talked as fast as it can.
    worst = page.evaluate(
        """() => new Promise(done => {
            let last = performance.now(), worst = 0, frames = 0;
            const frame = now => {
                worst = Math.max(worst, now - last);
                last = now;
                if ((frames += 1) < 60) requestAnimationFrame(frame);
                else done(worst);
            };
            requestAnimationFrame(frame);
        })"""
    )
    opened.panel("Controls").locator("[data-do=pause]").click()
    expect(opened.panel("Controls").locator(".kb-cause")).to_have_text("interrupted")
    assert log(panel).locator(".kb-out").count() <= 2000
    assert worst < 500
