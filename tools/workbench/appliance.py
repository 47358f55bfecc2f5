"""The agent and the appliance: built once by `kvmbench appliance build`.

What it builds is kept in the user's cache, shared by all checkouts; the stamp
only saves asking again at each start.
"""

from __future__ import annotations

import os
from pathlib import Path

from checkout import LOGS, PYTHON, ROOT, STATE, environment
from progress import SetupError, Timer, run_logged, say, step_done
from stamp import Stamp, fingerprint


def ensure() -> bool:
    """Builds the agent and the default appliance, unless that is done.

    A failure is told and does not stop the set-up: `local` and ssh hosts, and
    all tests that need no host, work without an appliance.

    Returns:
        True when something was done or failed (a line was printed).
    """
    built = Stamp(STATE / "appliance")
    key = _key()
    if built.holds(key):
        return False
    timer = Timer()
    try:
        lines = run_logged(
            [str(PYTHON), "-m", "kvmbench", "appliance", "build"],
            name="appliance",
            log=LOGS / "appliance.log",
            env=environment(),
            cwd=ROOT,
        )
    except SetupError as error:
        say(f"  appliance         not built, going on without\n{error}")
        return True
    made = [Path(word) for line in lines for word in line.split() if word.startswith("/") and Path(word).is_file()]
    built.write(key, made=made)
    step_done("agent, appliance", "built", timer.seconds)
    return True


def _key() -> str:
    host = ROOT / "kvmbench" / "host"
    files = [*(ROOT / "kvmbench" / "core").glob("*.[ch]"), *host.rglob("*.py")]
    where = [os.environ.get(name, "") for name in ("HOME", "XDG_CACHE_HOME", "KVMBENCH_CACHE")]
    return fingerprint(files, facts=where)
