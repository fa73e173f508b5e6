"""elastickv.client.pool: who is asked next."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from elastickv import certs
from elastickv.client.pool import MAX_LEARNED_ENDPOINTS, Pool, credentials_of
from elastickv.config import TlsFiles
from elastickv.errors import ConfigError

GIVEN = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool(GIVEN, None)
    yield pool
    await pool.close()


def fail(pool: Pool, *, unreachable: bool = True) -> str:
    """The current endpoint fails; who is asked next."""
    pool.advance(pool.current(), unreachable=unreachable)
    return pool.current().address


async def test_rotation(pool: Pool) -> None:
    assert pool.current().address == GIVEN[0]
    assert [fail(pool) for _ in range(4)] == [GIVEN[1], GIVEN[2], GIVEN[0], GIVEN[1]]


async def test_concurrent_failures_of_one_endpoint_move_on_once(pool: Pool) -> None:
    failed = pool.current()
    for _ in range(3):
        pool.advance(failed, unreachable=True)
    assert pool.current().address == GIVEN[1]


async def test_a_given_leader_is_preferred(pool: Pool) -> None:
    assert pool.prefer(GIVEN[2])
    assert (pool.current().address, len(pool)) == (GIVEN[2], 3)


async def test_a_learned_leader_joins_and_leaves_when_unreachable(pool: Pool) -> None:
    assert pool.prefer("127.0.0.1:9")
    assert (pool.current().address, len(pool)) == ("127.0.0.1:9", 4)
    learned = pool.current()
    assert fail(pool, unreachable=False) == GIVEN[0]
    assert len(pool) == 4
    pool.advance(learned, unreachable=True)
    assert (pool.current().address, len(pool)) == (GIVEN[0], 3)
    assert pool.prefer("127.0.0.1:9")
    assert pool.current() is learned
    assert fail(pool) == GIVEN[0]


async def test_an_earlier_learned_one_leaves_without_moving_the_current(pool: Pool) -> None:
    pool.prefer("127.0.0.1:8")
    earlier = pool.current()
    pool.prefer("127.0.0.1:9")
    pool.advance(earlier, unreachable=True)
    assert pool.current().address == "127.0.0.1:9"
    pool.advance(earlier, unreachable=True)
    assert (pool.current().address, len(pool)) == ("127.0.0.1:9", 4)


async def test_given_endpoints_never_leave(pool: Pool) -> None:
    for _ in range(10):
        fail(pool)
    assert len(pool) == 3


async def test_hints_cannot_grow_the_pool_for_ever(pool: Pool) -> None:
    followed = [pool.prefer(f"127.0.0.1:{port}") for port in range(100, 200)]
    assert sum(followed) == MAX_LEARNED_ENDPOINTS


@pytest.mark.parametrize("address", ["", "nonsense", "127.0.0.1", "127.0.0.1:0", "x:1:2"])
async def test_hints_that_are_no_addresses(pool: Pool, address: str) -> None:
    assert not pool.prefer(address)
    assert pool.current().address == GIVEN[0]


async def test_repeated_addresses_are_one() -> None:
    pool = Pool([GIVEN[0], GIVEN[0]], None)
    assert len(pool) == 1
    await pool.close()


async def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="no endpoint"):
        Pool([], None)


@pytest.mark.parametrize("form", [serialization.PrivateFormat.PKCS8,
                                  serialization.PrivateFormat.TraditionalOpenSSL])
def test_an_encrypted_private_key_is_refused_without_a_question(
        tmp_path: Path, form: serialization.PrivateFormat) -> None:
    certs.create_ca(tmp_path)
    pair = certs.create_client(tmp_path, "alice")
    key = serialization.load_pem_private_key(pair.key.read_bytes(), password=None)
    pair.key.write_bytes(key.private_bytes(
        serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"secret")))
    with pytest.raises(ConfigError, match="is encrypted"):
        credentials_of(TlsFiles(pair.cert, pair.key, tmp_path / "ca.crt"))
