"""What fills a cluster before it is measured."""

from __future__ import annotations

import contextlib
from pathlib import Path

import grpc
import pytest
from systems import WRITE_ATTEMPTS, ElasticKVCluster


class Failed(grpc.RpcError):
    def details(self) -> str:
        return "another member leads"


class Electing(ElasticKVCluster):
    """A cluster that is not there: so many calls fail, and each time another member leads."""

    def __init__(self, directory: Path, failures: int) -> None:
        super().__init__(directory, encrypted=False)
        self.failures = [Failed()] * failures
        self.now_leads = 0
        self.written: list[tuple[int, int]] = []

    def leader(self) -> int:
        return self.now_leads

    def call(self, node: int, path: str, message: bytes, *, timeout_s: float = 1.0) -> bytes:
        with contextlib.suppress(IndexError):
            failure = self.failures.pop()  # of one of many threads
            self.now_leads = (self.now_leads + 1) % 3
            raise failure
        ops = self._pb.RawBatchRequest.FromString(message).ops
        self.written += [(node, int(op.key.decode().removeprefix("key-"))) for op in ops]
        return self._pb.RawBatchResponse(commit_index=1).SerializeToString()


def test_keys_are_written_although_the_leader_changes(tmp_path: Path,
                                                        capsys: pytest.CaptureFixture[str],
                                                        ) -> None:
    cluster = Electing(tmp_path, failures=4)
    cluster.preload(1_000, b"v")
    assert sorted(key for _, key in cluster.written) == list(range(1_000))
    assert capsys.readouterr().err.count("written again: another member leads") == 4


def test_a_batch_goes_to_who_leads_by_then(tmp_path: Path) -> None:
    cluster = Electing(tmp_path, failures=1)
    cluster.write([(b"key-1", b"v")], leader=0)
    assert cluster.written == [(1, 1)]


def test_who_never_succeeds_is_told_why(tmp_path: Path) -> None:
    cluster = Electing(tmp_path, failures=WRITE_ATTEMPTS)
    with pytest.raises(Failed):
        cluster.write([(b"key-1", b"v")])
    assert not cluster.written
