"""The stream channel against a peer in a thread that speaks bytes: order, interrupts, and every way to end."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from kvmbench.core import wire
from kvmbench.errors import ClosedError, HostLost, HostUnavailable, InternalError
from kvmbench.host.stream import StreamChannel, greet

HEADER = struct.Struct("<IIIi")


def message(number: int, payload: bytes = b"", kind: int = wire.KB_READ_REGION) -> bytes:
    return HEADER.pack(HEADER.size + len(payload), number, kind, 0) + payload


def read_whole(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        piece = stream.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def read_message(stream: socket.socket) -> bytes:
    head = read_whole(stream, HEADER.size)
    return head + read_whole(stream, HEADER.unpack(head)[0] - HEADER.size)


class Peer:
    """The other end of a channel; `serve` answers on a thread until the stream ends."""

    def __init__(self, **options: float) -> None:
        ours, self.stream = socket.socketpair()
        self.channel = StreamChannel(ours, peer="the peer", describe_end=lambda: "it went home", **options)
        self._threads: list[threading.Thread] = []

    def serve(self, answer: Callable[[bytes], bytes]) -> None:
        def loop() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    self.stream.sendall(answer(read_message(self.stream)))

        self.run(loop)

    def run(self, target: Callable[[], object]) -> threading.Thread:
        thread = threading.Thread(target=target)
        self._threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.stream.shutdown(socket.SHUT_RDWR)
        self.channel.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()
        self.stream.close()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer()
    yield peer
    peer.end()


def echo(request: bytes) -> bytes:
    return request


def interrupt_main_thread() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def test_a_call_returns_the_reply_with_the_id_its_caller_chose(peer: Peer) -> None:
    peer.serve(echo)
    for number in (0, 7, 0xFFFFFFFF):
        assert peer.channel.call(message(number, b"data")) == message(number, b"data")


def test_two_calls_with_the_same_id_get_each_their_own_reply(peer: Peer) -> None:
    def swap() -> None:
        first, second = read_message(peer.stream), read_message(peer.stream)
        peer.stream.sendall(second + first)

    peer.run(swap)
    replies: dict[bytes, bytes] = {}

    def call(payload: bytes) -> None:
        replies[payload] = peer.channel.call(message(0, payload))

    threads = [peer.run(lambda payload=payload: call(payload)) for payload in (b"first", b"other")]
    for thread in threads:
        thread.join(10)
    assert replies == {payload: message(0, payload) for payload in (b"first", b"other")}


@pytest.mark.parametrize("size", [1 << 16, (1 << 16) + 1, 5_000_000, wire.KB_MAX_MESSAGE_BYTES - HEADER.size])
def test_a_large_message_arrives_whole_in_both_directions(peer: Peer, size: int) -> None:
    peer.serve(echo)
    payload = random.Random(size).randbytes(4096) * (size // 4096) + bytes(size % 4096)
    assert peer.channel.call(message(3, payload)) == message(3, payload)


def test_many_threads_call_at_once_and_each_gets_its_replies(peer: Peer) -> None:
    peer.serve(echo)
    wrong: list[bytes] = []

    def call(name: int) -> None:
        for n in range(300):
            request = message(name, struct.pack("<II", name, n) + bytes(name * 50))
            if peer.channel.call(request) != request:
                wrong.append(request)

    for thread in [peer.run(lambda name=name: call(name)) for name in range(8)]:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


def test_a_reply_in_single_bytes_is_put_together(peer: Peer) -> None:
    def drip() -> None:
        for byte in read_message(peer.stream):
            peer.stream.sendall(bytes([byte]))

    peer.run(drip)
    assert peer.channel.call(message(1, b"slowly")) == message(1, b"slowly")


def test_the_end_of_the_stream_raises_host_lost_with_the_reason_on_every_waiting_thread(peer: Peer) -> None:
    errors: list[str] = []

    def call() -> None:
        try:
            peer.channel.call(message(1))
        except HostLost as error:
            errors.append(str(error))

    threads = [peer.run(call) for _ in range(5)]
    for _ in threads:
        read_message(peer.stream)
    peer.stream.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
    assert len(errors) == 5
    assert all("the peer is gone: it went home" in error for error in errors)
    with pytest.raises(HostLost, match="it went home"):
        peer.channel.call(message(2))


def test_a_stream_that_ends_in_the_middle_of_a_reply_is_lost(peer: Peer) -> None:
    def half() -> None:
        peer.stream.sendall(read_message(peer.stream)[:20])
        peer.stream.shutdown(socket.SHUT_RDWR)

    peer.run(half)
    with pytest.raises(HostLost):
        peer.channel.call(message(1, b"eight by"))


def test_a_peer_that_hangs_is_asked_for_life_and_then_given_up() -> None:
    peer = Peer(quiet_s=0.05)
    try:
        with pytest.raises(HostLost, match=r"has not answered for 0.3 seconds: it hangs"):
            peer.channel.call(message(1))
        asked = [read_message(peer.stream) for _ in range(6)]
        assert [HEADER.unpack_from(one)[2] for one in asked] == [wire.KB_READ_REGION, *[wire.KB_HELLO] * 5]
        assert peer.channel.lost is not None
    finally:
        peer.channel.close()
        peer.stream.close()


def test_a_peer_that_takes_nothing_is_given_up() -> None:
    peer = Peer(quiet_s=0.05)
    try:
        with pytest.raises(HostLost, match=r"0.3 seconds: it hangs"):
            peer.channel.call(message(1, bytes(4 << 20)))
    finally:
        peer.channel.close()
        peer.stream.close()


def test_a_slow_answer_is_awaited_while_the_peer_says_that_it_is_there() -> None:
    peer = Peer(quiet_s=0.05)

    def answer_late() -> None:
        request = read_message(peer.stream)
        for _ in range(12):  # twice as many as it would be given up after
            asked = read_message(peer.stream)
            assert HEADER.unpack_from(asked)[1:3] == (0, wire.KB_HELLO)
            peer.stream.sendall(asked)
        peer.stream.sendall(request)

    thread = threading.Thread(target=answer_late)
    thread.start()
    try:
        assert peer.channel.call(message(7, b"late")) == message(7, b"late")
    finally:
        thread.join()
        peer.channel.close()
        peer.stream.close()


def test_lost_notices_an_end_that_no_call_has_met(peer: Peer) -> None:
    assert peer.channel.lost is None
    peer.stream.shutdown(socket.SHUT_RDWR)
    assert peer.channel.lost == "the peer is gone: it went home"


@pytest.mark.parametrize("size", [0, 15, wire.KB_MAX_MESSAGE_BYTES + 1, 0xFFFFFFFF])
def test_a_reply_of_an_impossible_size_ends_the_channel_and_names_the_size(peer: Peer, size: int) -> None:
    peer.serve(lambda request: struct.pack("<I", size) + request[4:])
    with pytest.raises(HostLost, match=f"a message of {size} bytes"):
        peer.channel.call(message(1))


def test_close_raises_closed_error_on_waiting_threads_and_may_be_repeated(peer: Peer) -> None:
    errors: list[Exception] = []

    def call() -> None:
        try:
            peer.channel.call(message(1))
        except Exception as error:
            errors.append(error)

    threads = [peer.run(call) for _ in range(3)]
    for _ in threads:
        read_message(peer.stream)
    peer.channel.close()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in errors] == [ClosedError] * 3
    peer.channel.close()
    assert peer.channel.lost is None
    with pytest.raises(ClosedError):
        peer.channel.call(message(1))


def test_ctrl_c_calls_on_interrupt_and_the_reply_is_still_returned(peer: Peer) -> None:
    def stopped_by_kick() -> None:
        execute = read_message(peer.stream)
        interrupt_main_thread()
        kick = read_message(peer.stream)
        assert HEADER.unpack_from(kick)[2] == wire.KB_KICK
        peer.stream.sendall(kick + execute)

    thread = peer.run(stopped_by_kick)
    channel = peer.channel
    execute = message(5, b"run", wire.KB_EXECUTE)
    reply = channel.call(execute, on_interrupt=lambda: channel.call(message(6, b"", wire.KB_KICK)) and None)
    assert reply == execute
    assert channel.take_interrupt()
    assert not channel.take_interrupt()
    thread.join(10)
    peer.serve(echo)
    assert channel.call(message(8)) == message(8)


def test_ctrl_c_just_before_a_reader_steps_down_does_not_leave_one_behind(
    peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.serve(lambda request: request)
    channel, stop_reading = peer.channel, peer.channel._stop_reading

    def pressed() -> None:
        monkeypatch.setattr(channel, "_stop_reading", stop_reading)
        raise KeyboardInterrupt

    kicks: list[bytes] = []
    monkeypatch.setattr(channel, "_stop_reading", pressed)
    # The kick is a call of its own, on the same thread: it waited for a reader that was itself.
    reply = channel.call(message(7), on_interrupt=lambda: kicks.append(channel.call(message(8))))
    assert (reply, kicks) == (message(7), [message(8)])
    assert channel.take_interrupt()


def test_take_interrupt_belongs_to_the_thread_whose_call_was_interrupted(peer: Peer) -> None:
    def answer_after_interrupt() -> None:
        request = read_message(peer.stream)
        interrupt_main_thread()
        assert interrupted.wait(10)
        peer.stream.sendall(request)

    interrupted = threading.Event()
    peer.run(answer_after_interrupt)
    peer.channel.call(message(1), on_interrupt=interrupted.set)
    seen: list[bool] = []
    peer.run(lambda: seen.append(peer.channel.take_interrupt())).join(10)
    assert seen == [False]
    assert peer.channel.take_interrupt()


def test_ctrl_c_in_a_plain_call_is_raised_once_the_reply_is_there(peer: Peer) -> None:
    came, answered = threading.Event(), threading.Event()

    def on_interrupt(number: int, frame: object) -> None:
        came.set()
        raise KeyboardInterrupt

    def answer_late() -> None:
        request = read_message(peer.stream)
        interrupt_main_thread()
        assert came.wait(10)
        answered.set()
        peer.stream.sendall(request)

    thread = peer.run(answer_late)
    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            peer.channel.call(message(1))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert answered.is_set()
    thread.join(10)
    peer.serve(echo)
    assert peer.channel.call(message(2)) == message(2)


def test_the_second_ctrl_c_gives_up_the_wait_and_the_late_reply_is_dropped(peer: Peer) -> None:
    kept: list[bytes] = []

    def never_answer() -> None:
        kept.append(read_message(peer.stream))
        interrupt_main_thread()

    thread = peer.run(never_answer)
    with pytest.raises(KeyboardInterrupt):
        peer.channel.call(message(1, b"never"), on_interrupt=interrupt_main_thread)
    thread.join(10)
    peer.stream.sendall(kept[0])
    peer.serve(echo)
    assert peer.channel.call(message(2, b"next")) == message(2, b"next")


def test_a_waiting_thread_takes_over_the_reading_when_the_reader_gives_up(peer: Peer) -> None:
    requests: list[bytes] = []
    replies: list[bytes] = []

    def scene() -> None:
        requests.append(read_message(peer.stream))  # of the main thread, which reads
        other = threading.Thread(target=lambda: replies.append(peer.channel.call(message(9, b"other"))))
        other.start()
        requests.append(read_message(peer.stream))
        interrupt_main_thread()
        assert gave_up.wait(10)
        peer.stream.sendall(requests[1])
        other.join(10)

    gave_up = threading.Event()
    thread = peer.run(scene)
    with pytest.raises(KeyboardInterrupt):
        peer.channel.call(message(1), on_interrupt=interrupt_main_thread)
    gave_up.set()
    thread.join(20)
    assert replies == [message(9, b"other")]


def test_a_storm_of_ctrl_c_never_breaks_the_framing(peer: Peer) -> None:
    peer.serve(echo)
    generator = random.Random(1)
    armed = False
    stop = threading.Event()

    def on_interrupt(number: int, frame: object) -> None:
        if armed:
            raise KeyboardInterrupt

    def storm() -> None:
        pauses = random.Random(2)
        while not stop.is_set():
            interrupt_main_thread()
            stop.wait(pauses.random() * 0.001)

    interrupted = answered = 0
    previous = signal.signal(signal.SIGINT, on_interrupt)
    storming = peer.run(storm)
    try:
        for n in range(1500):
            request = message(n, generator.randbytes(generator.choice((0, 40, 3000, 600_000))))
            try:
                armed = True
                reply = peer.channel.call(request)
                armed = False
                assert reply == request
                answered += 1
            except KeyboardInterrupt:
                armed = False
                interrupted += 1
    finally:
        armed = False
        stop.set()
        storming.join(10)
        signal.signal(signal.SIGINT, previous)
    assert peer.channel.lost is None
    assert peer.channel.call(message(1, b"calm")) == message(1, b"calm")
    assert interrupted > 10
    assert answered > 10


def test_a_large_request_gets_through_while_a_reply_nobody_waits_for_blocks_the_peer(peer: Peer) -> None:
    large = bytes(3_000_000)
    asked = threading.Event()

    def reply_first() -> None:
        request = read_message(peer.stream)
        interrupt_main_thread()
        assert asked.wait(10)
        peer.stream.sendall(request)  # blocks until it is read, and nothing is read here meanwhile
        peer.stream.sendall(read_message(peer.stream))

    peer.run(reply_first)
    with pytest.raises(KeyboardInterrupt):
        peer.channel.call(message(1, large), on_interrupt=interrupt_main_thread)
    asked.set()
    assert peer.channel.call(message(2, large)) == message(2, large)


def hello_reply(version: int = wire.KB_WIRE_VERSION, api: int = 12, size: int = 40) -> bytes:
    return HEADER.pack(size, 0, wire.KB_HELLO, 0) + struct.pack("<IIiIII", version, 4096, api, 152, 1, 0)


@pytest.mark.parametrize("api", [12, -2])
def test_greet_returns_the_api_version_or_the_error_of_opening_kvm(api: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(hello_reply(api=api))
        assert greet(ours, timeout_s=10) == api
        assert HEADER.unpack(read_whole(theirs, HEADER.size)) == (16, 0, wire.KB_HELLO, 0)


def test_greet_gives_up_on_silence() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(TimeoutError):
        greet(ours, timeout_s=0.01)


def test_greet_tells_a_stream_that_ends_from_one_that_is_silent() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(EOFError):
        greet(ours, timeout_s=10)


def test_greet_refuses_an_agent_of_another_version() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(hello_reply(version=99))
    with ours, theirs, pytest.raises(HostUnavailable, match="kvmbench appliance build"):
        greet(ours, timeout_s=10)


def test_greet_refuses_an_answer_that_is_no_message() -> None:
    ours, theirs = socket.socketpair()
    theirs.sendall(b"Welcome to the machine! It prints things." + bytes(20))
    with ours, theirs, pytest.raises(InternalError):
        greet(ours, timeout_s=10)
