"""Whether the other end of a connection is there, from what the kernel tells of it."""

from __future__ import annotations

import errno

from healfs.backends.nbd_peer import GONE_SECONDS, Peer, Tcp

IDLE = Tcp(asked=0, silent=100)


def looks(*found: tuple[int, Tcp]) -> list[int]:
    """The times at which the peer is found to be gone."""
    peer = Peer()
    gone = []
    for now, tcp in found:
        if (error := peer.look(tcp, now)) is not None:
            assert error.errno == errno.ETIMEDOUT
            gone.append(now)
    return gone


def test_a_peer_that_does_not_acknowledge_is_gone() -> None:
    """In time, however long nobody had asked it for anything."""
    for before in (0, 100):
        assert looks(*((t, Tcp(1 + t // 3, before + t)) for t in range(1, 12)))[0] == GONE_SECONDS


def test_a_peer_that_has_no_room_is_there() -> None:
    """Between the kernel's probes there is long silence, and none is unanswered for long."""
    silence = [(t, Tcp(0, t % 60)) for t in range(600)]
    assert not looks(*silence)
    probed = [(t, Tcp(1 if t % 60 == 59 else 0, t % 60)) for t in range(600)]
    assert not looks(*probed)


def test_a_peer_that_is_gone_while_it_has_no_room_is_found_out_by_the_next_probe() -> None:
    before = [(t, Tcp(0, t)) for t in range(60)]
    after = [(t, Tcp(1 + (t - 60) // 8, t)) for t in range(60, 90)]
    assert looks(*before, *after)[0] == 60 + GONE_SECONDS - 1


def test_each_acknowledgement_counts() -> None:
    """A link that loses most of what is sent: something is always sent again."""
    assert not looks(*((t, Tcp(2, t % 8)) for t in range(100)))


def test_what_was_not_asked_for_is_no_silence() -> None:
    assert not looks(*((t, IDLE) for t in range(100)), (100, Tcp(1, 100)), (101, IDLE))
