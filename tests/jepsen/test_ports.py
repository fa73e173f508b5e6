"""Ports for servers about to start."""

from __future__ import annotations

import socket

import pytest

from jepsen.network import ports


def test_no_port_is_given_twice() -> None:
    given = ports.free_ports(200) + ports.free_ports(200)
    assert len(set(given)) == 400
    assert max(given) < 32_768


def test_a_port_in_use_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server((ports.HOST, 0)) as server:
        busy = server.getsockname()[1]
        free = ports.free_ports(1)[0]
        monkeypatch.setattr(ports, "own_candidates", lambda environment: (busy, free))
        assert list(ports._unused()) == [free]


def test_workers_of_one_test_run_have_different_ports() -> None:
    whole = set(ports.own_candidates({}))
    parts = [set(ports.own_candidates({"PYTEST_XDIST_WORKER": f"gw{number}",
                                 "PYTEST_XDIST_WORKER_COUNT": "3"})) for number in range(3)]
    assert set.union(*parts) == whole
    assert sum(map(len, parts)) == len(whole)
