"""Broken messages by the ten thousand, served by a core built with sanitizers.

The ordinary run takes 60,000 messages (a few seconds). For more, and other seeds:

    KVMBENCH_FUZZ=1000000 KVMBENCH_FUZZ_SEED=7 pytest tests/core/test_fuzz.py

A failure prints the seed, the number of the message and its bytes; the same seed
makes the same messages on the same KVM.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmbench.core import wire
from kvmbench.core.agent import agent_binary
from kvmbench.host.cache import cache_directory

from .conftest import REPORTED

MESSAGES = int(os.environ.get("KVMBENCH_FUZZ", "60000"))
SEED = int(os.environ.get("KVMBENCH_FUZZ_SEED", "20240607"))
# The fuzzer itself gives up on a call that hangs; this is for the fuzzer.
WITHIN_S = 120 + MESSAGES / 1000

LEAK = """
#include <stdlib.h>
int main(int argc, char **argv) {
    char *volatile lost = malloc(100);
    (void)argv;
    lost = argc > 9 ? lost : NULL;
    return lost != NULL;
}
"""
OVERREAD = """
#include <stdlib.h>
int main(int argc, char **argv) {
    volatile char *bytes = calloc(1, 16);
    (void)argv;
    int value = bytes[15 + argc];
    free((void *)bytes);
    return value;
}
"""
OVERFLOW = """
int main(int argc, char **argv) {
    volatile int large = 0x7fffffff;
    (void)argv;
    large += argc;
    return large == 5;
}
"""


@pytest.mark.parametrize(
    ("name", "source"),
    [("leak", LEAK), ("overread", OVERREAD), ("overflow", OVERFLOW)],
    ids=["leak", "overread", "overflow"],
)
def test_the_sanitizers_see_a_fault_here(name, source, build, environment, tmp_path):
    # Without this, silence below would mean nothing.
    file = tmp_path / f"{name}.c"
    file.write_text(source)
    done = subprocess.run([build(name, [file])], env=environment, capture_output=True, check=False, timeout=60)
    assert done.returncode == REPORTED, done.stderr


def fuzz(fuzzer: Path, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [fuzzer, *arguments], env=environment, capture_output=True, check=False, timeout=WITHIN_S
    )


def served(output: bytes) -> dict[int, int]:
    return {int(kind): int(count) for kind, count in re.findall(rb"kind (\d+) served (\d+)", output)}


@pytest.mark.timeout(WITHIN_S + 60)
def test_broken_messages_do_not_break_the_core(fuzzer, environment, need):
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        need("local", "no usable /dev/kvm: `sudo usermod -aG kvm $USER` and log in again")
    done = fuzz(fuzzer, environment, str(SEED), str(MESSAGES))
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    # The messages got to where they can do harm: each kind was refused, and each was served.
    counts = served(done.stdout)
    if MESSAGES >= 60000:
        assert [kind for kind in range(1, wire.KB_KIND_END) if counts[kind] == 0] == []


@pytest.mark.timeout(WITHIN_S + 60)
def test_broken_messages_do_not_break_the_core_where_there_is_no_kvm(fuzzer, environment, need):
    done = fuzz(fuzzer, environment, str(SEED), str(MESSAGES), "--absent")
    if done.returncode == 77:
        need("namespaces", f"no mount name space of our own: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    counts = served(done.stdout)
    assert counts[wire.KB_HELLO] > 0
    assert counts[wire.KB_CREATE_VM] == 0


@pytest.fixture(scope="session")
def sanitized_agent(build: Callable[..., Path]) -> Path:
    return agent_binary(cache_directory(), sanitize=True)


def feed(agent: Path, environment: dict[str, str], stream: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [agent, "--stdio"], input=stream, env=environment, capture_output=True, check=False, timeout=60
    )


def replies(output: bytes) -> list[int]:
    """Sizes of the messages in a stream; fails unless it is made of whole ones."""
    sizes = []
    while output:
        sizes.append(int.from_bytes(output[:4], "little"))
        assert 16 <= sizes[-1] <= len(output)
        output = output[sizes[-1] :]
    return sizes


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_of_broken_messages_does_not_break_the_agent(seed, fuzzer, sanitized_agent, environment):
    stream = fuzz(fuzzer, environment, str(SEED + seed), "600", "--stream").stdout
    assert len(stream) > 16 * 600 // 2
    done = feed(sanitized_agent, environment, stream)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert replies(done.stdout)


@pytest.mark.parametrize("seed", range(12))
def test_a_stream_of_noise_does_not_break_the_agent(seed, sanitized_agent, environment):
    rng = random.Random(SEED + seed)
    stream = b""
    for _ in range(rng.randrange(1, 60)):
        # Mostly a length that lets the agent go on, so that the noise gets further in.
        size = rng.randrange(16, 200) if rng.random() < 0.9 else rng.getrandbits(32)
        follows = rng.randrange(0, 200) if rng.random() < 0.2 else size % 200
        stream += size.to_bytes(4, "little") + rng.randbytes(follows)
    done = feed(sanitized_agent, environment, stream)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    replies(done.stdout)


@pytest.mark.parametrize("cut", [1, 4, 15, 16, 17, 40])
def test_a_stream_that_ends_within_a_message_ends_the_agent(cut, sanitized_agent, environment):
    hello = bytes.fromhex("10000000 01000000 01000000 00000000")
    long = (100).to_bytes(4, "little") + bytes(96)
    done = feed(sanitized_agent, environment, hello + (hello + long)[:cut])
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert len(replies(done.stdout)) == (1 if cut < 16 else 2)


@pytest.mark.parametrize("size", [0, 15, 64 * 1024 * 1024 + 1, 0xFFFF_FFFF])
def test_a_length_that_cannot_be_ends_the_stream_with_an_answer(size, sanitized_agent, environment):
    header = size.to_bytes(4, "little") + bytes.fromhex("07000000 01000000 00000000")
    done = feed(sanitized_agent, environment, header + bytes(1000))
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert replies(done.stdout) == [16]
    assert int.from_bytes(done.stdout[12:16], "little") == wire.KB_BAD_LENGTH
    assert b"the stream ends here" in done.stderr
