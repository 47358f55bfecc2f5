"""A real JupyterLab with a real Chromium in front, for the widget tests."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client.blocking.client import BlockingKernelClient

# Started with only what a test needs: Debian's browser asks the network for nothing then.
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
)  # fmt: skip
WAIT_S = 60.0


class Lab:
    """A Jupyter server on a free port of this machine, its folders below `root`."""

    def __init__(self, root: Path, url: str, token: str, runtime: Path) -> None:
        self.root, self.url, self.token, self.runtime = root, url, token, runtime

    def request(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """One call of the server's REST API."""
        request = urllib.request.Request(
            f"{self.url}api/{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"token {self.token}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            text = answer.read()
        return json.loads(text) if text else None


@contextmanager
def start_lab(root: Path, *, application: str = "lab") -> Iterator[Lab]:
    """Starts ``jupyter lab`` (or ``notebook``) in `root`, and ends it."""
    token = secrets.token_hex(16)
    runtime, settings = root / "runtime", root / "settings"
    work = root / "work"
    for folder in (runtime, settings, work):
        folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ,
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_CONFIG_DIR": str(root / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
        "JUPYTER_DATA_DIR": str(root / "data"),
        "IPYTHONDIR": str(root / "ipython"),
    }
    news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True, exist_ok=True)
    news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    log = (root / "server.log").open("w")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "jupyter", application, "--no-browser", "--ip=127.0.0.1", "--port=0",
            f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={work}", "--allow-root",
            "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
        ],
        stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=work, start_new_session=True,
    )  # fmt: skip
    try:
        info = runtime / f"jpserver-{process.pid}.json"
        url = _wait_for_server(process, info, root / "server.log")
        yield Lab(work, url, token, runtime)
    finally:
        # Its own group: the kernels, and what they started, end with it.
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def _wait_for_server(process: subprocess.Popen[bytes], info: Path, log: Path) -> str:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            found = json.loads(info.read_text())
            urllib.request.urlopen(f"{found['url']}api", timeout=5).close()
            return str(found["url"])
        except (OSError, ValueError):
            time.sleep(0.1)
    raise RuntimeError(f"the Jupyter server did not start:\n{log.read_text()[-3000:]}")


class Notebook:
    """One notebook, open in a page, and its kernel."""

    def __init__(self, lab: Lab, page: Any, name: str) -> None:
        self.lab, self.page, self.name = lab, page, name
        self._client: BlockingKernelClient | None = None

    @classmethod
    def open(
        cls, lab: Lab, page: Any, cells: list[str], *, name: str | None = None, tree: str = "lab/tree"
    ) -> Notebook:
        """Writes a notebook of code cells and opens it."""
        name = name or f"test-{secrets.token_hex(4)}.ipynb"
        document = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        document.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(document, lab.root / name)
        page.goto(f"{lab.url}{tree}/{name}?token={lab.token}&reset")
        page.wait_for_function("window.jupyterapp !== undefined")
        page.locator(".jp-Notebook").first.wait_for()
        return cls(lab, page, name)

    def command(self, name: str) -> None:
        """Executes a command of the application and waits for it."""
        self.page.evaluate("name => window.jupyterapp.commands.execute(name)", name)

    def run_all(self, *, wait: bool = True) -> None:
        """Runs every cell; with `wait` until they are done, and fails if one does."""
        self.page.wait_for_function(
            "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
        )
        if not wait:
            self.page.evaluate("() => void window.jupyterapp.commands.execute('notebook:run-all-cells')")
            return
        self.command("notebook:run-all-cells")
        errors = self.page.locator("[data-mime-type='application/vnd.jupyter.error']").all_inner_texts()
        assert not errors, errors

    def reload(self) -> None:
        """Loads the page anew, as a reader would; the kernel stays."""
        self.page.reload()
        self.page.wait_for_function("window.jupyterapp !== undefined")
        self.page.locator(".jp-Notebook").first.wait_for()

    def restart_kernel(self) -> None:
        """Restarts the kernel without asking."""
        self._disconnect()
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.restartKernel()")

    def set_theme(self, name: str) -> None:
        """Changes the application's theme and waits for it."""
        self.page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', { theme: name })", name)
        light = "true" if name.endswith("Light") else "false"
        self.page.locator(f"body[data-jp-theme-light='{light}']").wait_for(state="attached")

    def panel(self, title: str) -> Any:
        """The panel of that title, in the page."""
        return self.page.locator(f"section.kb-panel[aria-label='{title}']")

    @property
    def kernel_id(self) -> str:
        for session in self.lab.request("sessions"):
            if session["path"] == self.name:
                return str(session["kernel"]["id"])
        raise AssertionError(f"no kernel runs {self.name}")

    def python(self, expression: str) -> Any:
        """The value of an expression in the notebook's kernel (through its repr), while the page stays as it is."""
        if self._client is None:
            self._client = BlockingKernelClient(connection_file=str(self.lab.runtime / f"kernel-{self.kernel_id}.json"))
            self._client.load_connection_file()
            self._client.start_channels()
            self._client.wait_for_ready(timeout=WAIT_S)
        reply = self._client.execute_interactive(
            "", silent=True, user_expressions={"value": expression}, timeout=WAIT_S, output_hook=lambda _: None
        )
        answer = reply["content"]["user_expressions"]["value"]
        if answer["status"] != "ok":
            raise AssertionError(f"{expression}: {answer['ename']}: {answer['evalue']}")
        text = answer["data"]["text/plain"]
        try:
            import ast

            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    def close(self) -> None:
        """Ends the notebook's kernel."""
        self._disconnect()
        for session in self.lab.request("sessions"):
            if session["path"] == self.name:
                self.lab.request(f"sessions/{session['id']}", "DELETE")

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.stop_channels()
            self._client = None
