"""cffi's `from_buffer` of a memoryview ends Python where a traceback with it is collected (cffi 2.1, Python 3.11).

The collector clears the memoryview first, which fails, and then what was made of it. Of bytes nothing is exported.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = """
import gc
from kvmbench.debug.state import STATE_END, STATE_OFFSET, Stopped
def fail(state):
    regs, sregs = state.regs, state.sregs
    error = ValueError()
    error.itself = error
    raise error
for _ in range(300):
    try:
        fail(Stopped(bytes(STATE_END - STATE_OFFSET)))
    except ValueError:
        pass
    gc.collect()
"""


def test_a_state_in_a_traceback_can_be_collected():
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_buffer_is_made_of_a_memoryview():
    found = []
    for path in sorted((ROOT / "kvmbench").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "from_buffer":
                told = ast.unparse(node)
                if "memoryview" in told or "view[" in told:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {told}")
    assert not found
