from itertools import islice
from pathlib import Path

import pytest
from bodies import (
    KEY_BYTES,
    KEYS_PER_TICK,
    Body,
    KeyRotator,
    frame,
    key_of,
    random_value,
    spread,
    turns,
)

PLACEHOLDER = key_of(900_000_000_000)


def test_keys_have_one_width_and_the_order_of_their_numbers() -> None:
    keys = [key_of(number) for number in (0, 9, 10, 999_999, 5_000_000)]
    assert keys == sorted(keys)
    assert {len(key) for key in keys} == {KEY_BYTES}
    assert len(key_of(7, b"big-")) == KEY_BYTES


def test_a_frame_is_not_compressed_and_carries_its_length() -> None:
    assert frame(b"abc") == b"\x00\x00\x00\x00\x03abc"


def test_values_repeat_for_a_seed_only() -> None:
    assert random_value(64, seed=1) == random_value(64, seed=1) != random_value(64, seed=2)


@pytest.mark.parametrize("keys", [10_000, 999_000, 1_000_000, 5_000_000, 2000])
def test_the_walk_visits_every_key_once(keys: int) -> None:
    visited = bytearray(keys)
    for position in range(keys):
        visited[spread(position, keys)] = 1
    assert all(visited)


def test_every_occurrence_of_a_key_moves_together() -> None:
    body = Body.with_keys(b"<" + PLACEHOLDER + b"|" + PLACEHOLDER + b">", [PLACEHOLDER], span=1000,
                          base=[0])
    moved = body.at_step(3)
    key = key_of(spread(3, 1000))
    assert moved == frame(b"<" + key + b"|" + key + b">")


def test_keys_of_a_batch_never_collide() -> None:
    placeholders = [key_of(900_000_000_000 + slot) for slot in range(10)]
    body = Body.with_keys(b",".join(placeholders), placeholders, span=100,
                          base=[slot * 100 for slot in range(10)])
    for step in (0, 1, 57):
        keys = body.at_step(step)[5:].split(b",")
        assert len(set(keys)) == 10
        assert all(int(key[4:]) < 1000 for key in keys)


class Watched(bytearray):
    """Keeps what it was after each write."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self.states: list[bytes] = []

    def __setitem__(self, place: object, content: object) -> None:
        super().__setitem__(place, content)  # type: ignore[call-overload]
        self.states.append(bytes(self))


def test_a_range_that_moves_is_never_too_narrow() -> None:
    start, end = key_of(900_000_000_000), key_of(900_000_000_001)
    body = Body.with_keys(start + end, [start, end], span=9_000, base=[0, 1000])
    watched = Watched(body.at_step(0))
    for step in range(1, 9_000):
        body.write_step(watched, step)
    widths = [int(state[25:37]) - int(state[9:21]) for state in watched.states]
    assert set(widths[1::2]) == {1000}
    assert min(widths) == 1000
    assert max(int(state[25:37]) for state in watched.states) == 9_999


def test_a_message_without_its_key_is_refused() -> None:
    with pytest.raises(ValueError, match="does not stand"):
        Body.with_keys(b"nothing", [PLACEHOLDER], span=10, base=[0])


def test_rotator_starts_bodies_apart_and_writes_whole_keys(tmp_path: Path) -> None:
    bodies = [Body.with_keys(PLACEHOLDER, [PLACEHOLDER], span=1_000_000, base=[0])
              for _ in range(2)]
    rotator = KeyRotator(bodies, tmp_path)
    first, second = ((tmp_path / f"body-{number}").read_bytes() for number in range(2))
    assert first != second
    with rotator:
        while (tmp_path / "body-0").read_bytes() == first:
            pass
    key = (tmp_path / "body-0").read_bytes()[5:]
    assert key.startswith(b"key-")
    assert 0 <= int(key[4:]) < 1_000_000


@pytest.mark.parametrize(("key_counts", "expected"), [
    pytest.param([1], [[0], [0], [0]], id="a lone body moves at every tick"),
    pytest.param([1] * 4, [[0, 1, 2, 3]] * 3, id="small ones move together"),
    pytest.param([KEYS_PER_TICK] * 4, [[0], [1], [2], [3], [0]], id="large ones take turns"),
    pytest.param([KEYS_PER_TICK // 2] * 3, [[0, 1], [2, 0], [1, 2]], id="two to a tick"),
    pytest.param([2 * KEYS_PER_TICK, 1], [[0], [1, 0], [1, 0]], id="a huge one moves, too"),
])
def test_bodies_move_in_turns(key_counts: list[int], expected: list[list[int]]) -> None:
    assert list(islice(turns(key_counts), len(expected))) == expected
