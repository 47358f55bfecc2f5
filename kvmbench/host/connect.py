"""`connect()`: from a name to a host, and which one when no name is given."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from kvmbench import errors
from kvmbench.arguments import instead
from kvmbench.host import selfcheck
from kvmbench.host.cache import cache_directory, write_file
from kvmbench.host.channel import Channel, LocalChannel
from kvmbench.host.client import Core
from kvmbench.host.host import Host, HostInfo
from kvmbench.host.selfcheck import Mechanisms, check

KINDS = ("local", "appliance", "appliance:amd", "appliance:intel", "ssh://[user@]server[:port]")


def connect(spec: str | None = None, *, quiet: bool = False, **options: Any) -> Host:
    """Opens a host: a Linux whose /dev/kvm runs the guests.

    Without a name it takes the one in ``$KVMBENCH_HOST``; where that is not set, this machine's own
    /dev/kvm if a self-check (a few milliseconds, remembered until the next boot) shows that stepping,
    breakpoints and watchpoints work there at CPL 0 and CPL 3; otherwise the appliance. It prints one
    line that says which and why.

    Args:
        spec: "local", "appliance" (or "appliance:amd"), "appliance:intel", "ssh://[user@]server[:port]", or None.
        quiet: print nothing.
        **options: for the kind of host.
            local: ``sudo`` (run the core in a child started with sudo), ``agent`` (in a child).
            appliance: ``npt`` (0 or 1), ``vcpus``, ``memory`` ("256M"), ``parameters``
            ({"kvm.enable_vmware_backdoor": 1}), ``warm`` (False: no saved state),
            ``progress`` (called with each line said during a long start).
            appliance:intel: ``ept`` (0 or 1), ``memory``, ``parameters``, ``warm``, ``progress``.
            ssh: ``ssh_options`` (a list of words for the ssh command).

    Returns:
        A `Host`; close it, or use it in a `with` statement.

    Raises:
        HostUnavailable: it cannot be had; the message says what is missing.
        MisuseError: no such kind of host, or an option it does not know.
    """
    host = _choose(options, quiet) if spec is None else _named(spec, options, quiet)
    if not quiet:
        _say(f"{host.info.describe()} - {host.why}" if host.why else host.info.describe())
    return host


def _named(spec: Any, options: dict[str, Any], quiet: bool) -> Host:
    if not isinstance(spec, str):
        raise errors.MisuseError(f"a host is named by a str, not {spec!r}; there are {', '.join(KINDS)}")
    if spec == "local":
        return _local(**_known(options, "local", ("sudo", "agent")))
    if spec in ("appliance", "appliance:amd"):
        return _appliance(spec, options, quiet)
    if spec == "appliance:intel":
        return _intel(spec, options, quiet)
    if spec.startswith("ssh://"):
        return _ssh(spec, options)
    raise errors.MisuseError(f"no host {spec!r}; there are {', '.join(KINDS)}")


def _known(options: dict[str, Any], kind: str, names: tuple[str, ...]) -> dict[str, Any]:
    for name in options:
        if name not in names:
            raise errors.MisuseError(f"host {kind!r} has no option {name!r}; {instead(name, (*names, 'quiet'))}")
    return options


def _choose(options: dict[str, Any], quiet: bool) -> Host:
    if options:  # options are for the appliance: local has none that matter here
        return _appliance("appliance", options, quiet, "its options were given")
    named = os.environ.get("KVMBENCH_HOST")
    if named:
        try:
            host = _named(named, {}, quiet)
        except errors.MisuseError as error:
            raise errors.MisuseError(f"$KVMBENCH_HOST: {error}") from None
        host.why = "named by $KVMBENCH_HOST" + (f"; {host.why}" if host.why else "")
        return host
    try:
        host = _local()
    except errors.HostUnavailable as error:
        return _appliance("appliance", {}, quiet, f"no local KVM: {error}")
    if host.mechanisms.complete:
        host.why = "picked: stepping, breakpoints and watchpoints work at CPL 0 and CPL 3"
        return host
    lacking = host.mechanisms.shortcomings
    host.close()
    more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
    return _appliance("appliance", {}, quiet, f"picked: local KVM fails the self-check ({lacking[0]}{more})")


def _local(*, sudo: bool = False, agent: bool = False) -> Host:
    closer: Callable[[], None] | None = None
    channel: Channel
    if sudo or agent:
        from kvmbench.host.child import start_child

        channel, closer = start_child(sudo=sudo)
    else:
        channel = LocalChannel()
    core = Core(channel)
    try:
        info = HostInfo.read(core, kind="local")
        # The check itself may be newer than what it found, and the module loaded again with other parameters.
        checker = os.stat(selfcheck.__file__).st_mtime_ns
        key = core.host_info().get("boot_id", "") + f"-{info.kernel}-{info.module}-{info.parameters}-{checker}"
        mechanisms = _remembered_check(core, key)
        host = Host("local", core, info, mechanisms, closer=closer)
    except BaseException:
        core.close()
        if closer is not None:
            closer()
        raise
    limits = mechanisms.summary
    host.why = f"the self-check found: {limits}" if limits else "the self-check found no fault"
    return host


def _remembered_check(core: Core, key: str) -> Mechanisms:
    """The self-check, kept in the cache for as long as `key` stays the same."""
    path = cache_directory() / "selfcheck-local.json"
    try:
        stored = json.loads(path.read_text())
        if stored["key"] == key:
            return Mechanisms.from_json(stored["mechanisms"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, of another boot, or damaged: check again
    mechanisms = check(core)
    with contextlib.suppress(OSError):  # a full disk or a read-only home costs the check next time, nothing else
        write_file(path, json.dumps({"key": key, "mechanisms": mechanisms.to_json()}).encode())
    return mechanisms


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _appliance(spec: str, options: dict[str, Any], quiet: bool, why: str = "") -> Host:
    from kvmbench.host.appliance import start_appliance

    known = _known(options, "appliance", ("npt", "vcpus", "memory", "parameters", "warm", "progress"))
    if not quiet:
        known = {"progress": _say} | known
    found: dict[str, Any] = {}

    def examine(channel: Channel, note: dict[str, Any]) -> None:
        # Before the appliance is saved: it then starts with a KVM that has run guests already, and one that
        # cannot is not met again.
        if _noted(note)[1].step:
            return
        core = Core(channel)
        mechanisms = check(core)
        if not mechanisms.step:
            raise errors.HostUnavailable(
                f"the appliance came up but its KVM does not step a guest ({mechanisms.shortcomings[0]}); "
                "connect again, and if that does not help run `kvmbench doctor --deep`"
            )
        found.update(mechanisms=mechanisms.to_json(), info=core.host_info())

    started = start_appliance(**known, prepare=examine)
    core = Core(started.channel)
    try:
        # A warm appliance is the one that was saved: what it said then, and what was tried then, still holds.
        raw, mechanisms = _noted(found or started.read_note())
        if raw is None or not mechanisms.step:
            examine(started.channel, {})
            raw, mechanisms = _noted(found)
        if found:
            started.write_note(found)
        info = HostInfo.read(
            core, kind="appliance", emulator=started.emulator, emulator_version=started.emulator_version, raw=raw
        )
        return Host(spec, core, info, mechanisms, why=why, closer=started.close)
    except BaseException:
        core.close()
        started.close()
        raise


def _intel(spec: str, options: dict[str, Any], quiet: bool) -> Host:
    from kvmbench.host.intel import start_intel

    known = _known(options, spec, ("ept", "memory", "parameters", "warm", "progress"))
    if not quiet:
        known = {"progress": _say} | known

    def examine(channel: Channel) -> dict[str, Any]:
        # Before it is saved: what was tried then still holds for whoever loads it.
        core = Core(channel)
        mechanisms = check(core)
        if not mechanisms.step:
            raise errors.HostUnavailable(
                f"the Intel appliance came up but its KVM does not step a guest ({mechanisms.shortcomings[0]})"
            )
        return {"mechanisms": mechanisms.to_json(), "info": core.host_info()}

    started = start_intel(**known, prepare=examine)
    core = Core(started.channel)
    try:
        raw, mechanisms = _noted(started.note)
        if raw is None or not mechanisms.step:
            raw, mechanisms = _noted(examine(started.channel))
        info = HostInfo.read(
            core, kind="appliance", emulator=started.emulator, emulator_version=started.emulator_version, raw=raw
        )
        return Host(spec, core, info, mechanisms, closer=started.close)
    except BaseException:
        core.close()
        started.close()
        raise


def _noted(note: Mapping[str, Any]) -> tuple[dict[str, str] | None, Mechanisms]:
    """What `_appliance` or `_intel` wrote down at an earlier start, or (None, nothing works) if that is no good."""
    try:
        raw = {str(key): str(value) for key, value in note["info"].items()}
        return raw, Mechanisms.from_json(note["mechanisms"])
    except (KeyError, AttributeError, TypeError, ValueError):
        return None, Mechanisms()


def _ssh(spec: str, options: dict[str, Any]) -> Host:
    from kvmbench.host.ssh import start_ssh

    channel, closer = start_ssh(spec, **_known(options, "ssh", ("ssh_options",)))
    core = Core(channel)
    try:
        info = HostInfo.read(core, kind="ssh")
        return Host(spec, core, info, check(core), closer=closer)
    except BaseException:
        core.close()
        closer()
        raise
