"""The cpio writer: what it writes, field by field, and archives one after the other."""

from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmbench.host.initramfs import Archive, agent_layer, entries, module_layer

NAMES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x17E, exclude_characters="\x7f"), min_size=1)


@given(st.dictionaries(NAMES, st.tuples(st.binary(max_size=300), st.integers(0, 0o777)), max_size=8))
def test_what_is_written_is_read_back(files: dict[str, tuple[bytes, int]]) -> None:
    archive = Archive()
    for name, (data, mode) in files.items():
        archive.add_file(name, data, mode=mode)
    written = archive.finish()
    assert len(written) % 4 == 0
    assert entries(written) == {name: (stat.S_IFREG | mode, data) for name, (data, mode) in files.items()}


def test_a_header_has_the_fields_of_the_newc_format_in_order() -> None:
    archive = Archive()
    archive.add_character_device("dev/console", (5, 1))
    header = archive.finish()[:110]
    assert header[:6] == b"070701"
    fields = [int(header[6 + 8 * n : 14 + 8 * n], 16) for n in range(13)]
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    assert fields == [1, stat.S_IFCHR | 0o600, 0, 0, 1, 0, 0, 0, 0, 5, 1, len("dev/console") + 1, 0]


def test_equal_contents_make_equal_archives() -> None:
    assert module_layer([("kvm.ko", b"x")]) == module_layer([("kvm.ko", b"x")])


def test_finish_may_be_called_again_after_more_was_added() -> None:
    archive = Archive()
    archive.add_file("one", b"1")
    archive.finish()
    archive.add_file("two", b"2")
    assert set(entries(archive.finish())) == {"one", "two"}


def test_a_later_layer_replaces_the_entries_of_an_earlier_one() -> None:
    found = entries(agent_layer(b"old") + module_layer([("kvm.ko", b"module")]) + agent_layer(b"new"))
    assert found["init"] == (stat.S_IFREG | 0o755, b"new")
    assert found["lib/modules/kvm.ko"][1] == b"module"


def test_the_initramfs_holds_the_agent_the_modules_in_order_and_nothing_else() -> None:
    found = entries(module_layer([("virtio.ko", b"v"), ("kvm-amd.ko", b"k")]) + agent_layer(b"agent"))
    files = {name: data for name, (mode, data) in found.items() if stat.S_ISREG(mode)}
    assert files == {
        "init": b"agent",
        "modules": b"virtio.ko\nkvm-amd.ko\n",
        "lib/modules/virtio.ko": b"v",
        "lib/modules/kvm-amd.ko": b"k",
    }
    assert {name for name, (mode, _) in found.items() if stat.S_ISCHR(mode)} == {"dev/console"}


@pytest.mark.parametrize("cut", [1, 50, 120])
def test_an_archive_that_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="cpio"):
        entries(agent_layer(b"agent" * 20)[:-cut])
