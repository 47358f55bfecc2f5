"""The host's kernel: its memory, types and symbols, where it lets itself be read."""

from __future__ import annotations

import numpy as np
import pytest

import kvmbench as kb
from kvmbench.errors import ClosedError, KvmIoctlError, MisuseError, UnsupportedError
from kvmbench.host.kernel.reader import KernelReader

NOWHERE = 0x0000_7000_0000_0000


@pytest.fixture
def kernel(host: kb.Host):
    """What is known of it."""
    try:
        return host.host_kernel
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_where_there_is_none_it_says_why(host):
    if host.info.kcore:
        pytest.skip("this host has it")
    with pytest.raises(UnsupportedError, match="/proc/kcore"):
        assert host.kernel


def test_it_is_a_drgn_program(kernel, host):
    program = host.kernel
    assert program["init_task"].comm.string_() == b"swapper/0"
    assert program.type("struct kvm_mmu_page").has_member("role")
    assert program.symbol(int(program.symbol("init_task").address) + 5).name == "init_task"
    assert int(program["PIDTYPE_TGID"]) == 1


def test_drgn_s_helpers_work(kernel, host):
    from drgn.helpers.linux.pid import find_task, for_each_task

    program = host.kernel
    pid = host.core.hello()["agent_pid"]
    assert pid in {int(task.pid) for task in for_each_task(program)}
    assert int(find_task(program, pid).tgid) == pid


def test_what_is_not_there_is_told(kernel, host):
    import drgn

    with pytest.raises(drgn.FaultError):
        host.kernel.read(NOWHERE, 8)
    with pytest.raises(LookupError):
        host.kernel.type("struct no_such_struct")
    with pytest.raises(UnsupportedError, match="no member nothing"):
        kernel.offset("struct kvm", "nothing")
    with pytest.raises(UnsupportedError, match="no symbol no_such_symbol"):
        kernel.symbol("no_such_symbol")


def test_many_places_are_read_at_once_and_some_are_nowhere(kernel):
    reader, task = kernel.reader, kernel.symbol("init_task")
    comm = task + kernel.offset("struct task_struct", "comm")
    assert reader.read(comm, 10) == b"swapper/0\0"
    assert reader.read_many([comm, NOWHERE, comm + 8, (1 << 64) - 4], 9) == [
        b"swapper/0", None, reader.read(comm + 8, 9), None,
    ]  # fmt: skip


def test_words_that_are_0_are_left_out_on_the_way_only(kernel):
    # Constants, as tasks change.
    reader, page = kernel.reader, kernel.symbol("linux_banner") & -4096
    words, there = reader.read_words(np.array([page, NOWHERE, page + 4096], np.uint64), 512)
    assert there.tolist() == [True, False, True]
    assert words[0].tobytes() == reader.read(page, 4096)
    assert words[0].any()
    assert not words[1].any()
    assert words[2].tobytes() == reader.read(page + 4096, 4096)


def test_a_list_is_followed_to_its_end_or_as_far_as_asked(kernel):
    reader = kernel.reader
    node = kernel.offset("struct task_struct", "tasks")
    size = max(node, kernel.offset("struct task_struct", "tgid")) + 16
    head = kernel.symbol("init_task") + node
    whole = reader.list_objects(head, size, node, 10_000)
    assert (whole.whole, whole.broken) == (True, False)
    assert len(whole.addresses) > 10
    pids = kernel.column(whole.data, "struct task_struct", "tgid", "<i4")
    assert pids[0] == 1
    assert len(set(pids.tolist())) == len(pids)
    some = reader.list_objects(head, size, node, 5)
    assert (some.whole, some.broken) == (False, False)
    assert some.addresses.tolist() == whole.addresses[:5].tolist()
    assert reader.list_objects(NOWHERE, 16, 0, 5).broken
    # Zeros end it as they do a hlist; what is no list leads nowhere, and not for ever.
    comm = kernel.symbol("init_task") + kernel.offset("struct task_struct", "comm")
    assert reader.list_objects(comm, 16, 0, 5).broken


@pytest.mark.parametrize("size", [1 << 26, 1 << 32])
def test_more_than_a_message_holds_is_refused(kernel, size):
    with pytest.raises((MisuseError, OverflowError)):
        kernel.reader.read(kernel.symbol("init_task"), size)


def test_of_a_list_node_outside_its_object_nothing_is_read(kernel):
    with pytest.raises(MisuseError):
        kernel.reader.list_objects(kernel.symbol("init_task"), 16, 12, 5)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "", "no_such_module", "kvm/../kvm", "K" * 200])
def test_only_btf_is_read_as_btf(kernel, name):
    with pytest.raises((MisuseError, KvmIoctlError)):
        kernel.reader.btf(name)


def test_it_can_be_closed(kernel, host):
    mine = KernelReader(host.core)
    mine.close()
    with pytest.raises(ClosedError):
        mine.read(kernel.symbol("init_task"), 8)
    assert kernel.reader.read(kernel.symbol("init_task"), 8)
