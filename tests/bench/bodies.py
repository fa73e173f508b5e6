"""gRPC request bodies for h2load, and the thread that keeps their keys moving.

h2load posts one file, but reads it afresh for every request. So a body file lives in memory
(tmpfs), is mapped, and a `KeyRotator` overwrites the keys inside it in place, every millisecond or
so (every few of them where a body holds many keys, and few such bodies are posted in that time):
the requests of a run spread over the whole key space without a change to the generator.

    body file:  0x00 | length(4, BE) | protobuf message ... key ... key ...
                                                        ^ offsets that the rotator writes

Keys have a fixed width, so the message's lengths never change. A request that reads the file while
a key is being written sees digits of two keys, which together are a third valid key. One that reads
it between the two keys of a range sees a range that is too wide.
"""

from __future__ import annotations

import itertools
import mmap
import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEY_BYTES = 16
KEYS_PER_TICK = 100
"""Moving keys takes the processor from what is measured: about 1 µs each."""
_SPREAD = 600_011  # Prime, and no factor of a key count here: steps visit every key.


def key_of(number: int, prefix: bytes = b"key-") -> bytes:
    """The key with this number: 16 bytes, decimal, so that order is numeric order."""
    return prefix + b"%0*d" % (KEY_BYTES - len(prefix), number)


def frame(message: bytes) -> bytes:
    """A gRPC message as it stands in an HTTP/2 body: not compressed, length, bytes."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def random_value(size: int, seed: int = 1) -> bytes:
    """Bytes that do not compress; the same for the same seed."""
    return random.Random(seed).randbytes(size)


def spread(position: int, keys: int) -> int:
    """A walk over 0..keys-1 that visits each once in `keys` steps and jumps about."""
    return (position * _SPREAD) % keys


@dataclass
class Body:
    """A body in which each run of key digits stands at `offsets`.

    At step s the key number of offset i is `base[i] + spread(s, span)`: with distinct multiples of
    `span` as bases, the keys of one message never collide (etcd refuses a repeated key in a
    transaction).
    """

    data: bytes
    offsets: Sequence[int]
    span: int
    base: Sequence[int] = (0,)
    prefix: bytes = b"key-"
    path: Path | None = field(default=None, compare=False)

    @staticmethod
    def with_keys(message: bytes, placeholders: Sequence[bytes], *, span: int,
                  base: Sequence[int], prefix: bytes = b"key-") -> Body:
        """Frame `message` and find where each placeholder key stands.

        Every occurrence of a placeholder is an offset; occurrences of the same placeholder share
        its base.
        """
        data = frame(message)
        offsets: list[int] = []
        bases: list[int] = []
        for placeholder, number in zip(placeholders, base, strict=True):
            at = data.find(placeholder)
            if at < 0:
                raise ValueError(f"{placeholder!r} does not stand in the message")
            while at >= 0:
                offsets.append(at)
                bases.append(number)
                at = data.find(placeholder, at + len(placeholder))
        return Body(data, offsets, span, bases, prefix)

    def at_step(self, step: int) -> bytes:
        """The body as it is after `step` rotations; what `write_step` leaves in the file."""
        data = bytearray(self.data)
        self.write_step(data, step)
        return bytes(data)

    def write_step(self, target: bytearray | mmap.mmap, step: int) -> None:
        """Overwrite every key in `target`, which the step before has written.

        Between two writes a range is too wide (its limit counts then), never too narrow: its end,
        which comes after its start, moves up first.
        """
        number = spread(step, self.span)
        keys = list(zip(self.offsets, self.base, strict=True))
        for offset, base in reversed(keys) if number > spread(step - 1, self.span) else keys:
            target[offset:offset + KEY_BYTES] = key_of(base + number, self.prefix)


class KeyRotator:
    """Moves the keys of several body files while h2load reads them. Use as a context manager."""

    def __init__(self, bodies: Sequence[Body], directory: Path, *, interval_s: float = 0.001,
                 start: int = 0) -> None:
        self._bodies = bodies
        self._interval_s = interval_s
        # Instances start far apart so that they never post the same key at the same time.
        self._steps = [start + number * 7919 for number in range(len(bodies))]
        self._stop = threading.Event()
        self._maps: list[mmap.mmap] = []
        for number, body in enumerate(bodies):
            body.path = directory / f"body-{number}"
            body.path.write_bytes(body.at_step(self._steps[number]))
            with body.path.open("r+b") as handle:
                self._maps.append(mmap.mmap(handle.fileno(), 0))
        self._thread = threading.Thread(target=self._run, name="key-rotator", daemon=True)

    def __enter__(self) -> KeyRotator:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for mapped in self._maps:
            mapped.close()

    def _run(self) -> None:
        for due in turns([len(body.offsets) for body in self._bodies]):
            if self._stop.wait(self._interval_s):
                return
            for number in due:
                self._steps[number] += 1
                self._bodies[number].write_step(self._maps[number], self._steps[number])


def turns(key_counts: Sequence[int]) -> Iterator[list[int]]:
    """Which bodies move at each tick: as many, in turn, as hold `KEYS_PER_TICK` keys; at least one,
    none twice."""
    following = itertools.cycle(range(len(key_counts)))
    while True:
        due: list[int] = []
        while len(due) < len(key_counts) and sum(key_counts[each] for each in due) < KEYS_PER_TICK:
            due.append(next(following))
        yield due
