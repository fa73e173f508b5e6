"""A deterministic asyncio event loop: virtual time, no thread, no selector, no socket.

Every callback belongs to a *life*: one run of one simulated process, carried in a context variable,
so that tasks, futures and timers inherit it. A life that has ended never runs again; a paused one
keeps its callbacks for later. Each life sees its own clock, which runs at its own rate.

Ready callbacks run first in, first out; timers by virtual time, then by order of creation. Nothing
else decides what runs next, so a run is a function of its seeds.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

STEPS_WITHOUT_TIME = 20_000
"""More callbacks than this within a microsecond are a livelock."""
RESOLUTION_S = 1e-9
"""A timer fires this much late: converted back, its time must not lie before what was asked for."""


class Crashed(BaseException):
    """Unwinds the code of a life that has just ended. No handler may treat it as an error."""


class Stalled(Exception):
    """The simulation cannot go on: a livelock, or nothing left to run."""


class Life:
    """One run of a simulated process, from start to crash or exit.

    `local = offset_s + rate * global` is its monotonic clock.
    """

    def __init__(self, name: str, *, rate: float = 1.0, offset_s: float = 0.0) -> None:
        self.name = name
        self.rate = rate
        self.offset_s = offset_s
        self.alive = True
        self.paused = False
        self.deferred: list[Handle] = []
        self.on_death: list[Callable[[], None]] = []
        self.context = contextvars.copy_context()
        self.context.run(_LIFE.set, self)

    def local(self, now: float) -> float:
        """This life's monotonic time at a global time, in seconds."""
        return self.offset_s + self.rate * now

    def end(self) -> None:
        """The process is gone, at once. Idempotent."""
        if not self.alive:
            return
        self.alive = False
        self.deferred.clear()
        for callback in self.on_death:
            callback()

    def require_alive(self) -> None:
        """Raise `Crashed` in code that goes on after its process has ended."""
        if not self.alive:
            raise Crashed(self.name)


_LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("life", default=None)


class Handle:
    """A scheduled callback. `when` is local time for timers, as `asyncio.TimerHandle` has it."""

    __slots__ = ("_when", "args", "callback", "context", "life")

    def __init__(self, callback: Callable[..., object] | None, args: tuple[Any, ...],
                 context: contextvars.Context | None, when: float) -> None:
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.life: Life | None = self.context.get(_LIFE)
        self._when = when

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None

    def when(self) -> float:
        return self._when


class SimLoop(asyncio.AbstractEventLoop):
    """See the module. `connector` supplies `create_connection`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.life: Life | None = None
        self.connector: Any = None
        self.after_step: Callable[[Life], None] = lambda life: None
        self.failure: BaseException | None = None
        self.unretrieved: list[BaseException] = []
        self._ready: deque[Handle] = deque()
        self._timers: list[tuple[float, int, Handle]] = []
        self._sequence = 0
        self._closed = False
        self._tasks: list[asyncio.Task[Any]] = []

    # --- what asyncio asks of a loop ------------------------------------------------------------

    def time(self) -> float:
        life = self.life
        return self.now if life is None else life.offset_s + life.rate * self.now

    def call_soon(self, callback: Callable[..., object], *args: Any,  # type: ignore[override]
                  context: contextvars.Context | None = None) -> Handle:
        handle = Handle(callback, args, context, 0.0)
        self._ready.append(handle)
        return handle

    def call_later(self, delay: float, callback: Callable[..., object],  # type: ignore[override]
                   *args: Any, context: contextvars.Context | None = None) -> Handle:
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(self, when: float, callback: Callable[..., object],  # type: ignore[override]
                *args: Any, context: contextvars.Context | None = None) -> Handle:
        life = self.life
        at = when if life is None else (when - life.offset_s) / life.rate + RESOLUTION_S
        return self._add_timer(at, Handle(callback, args, context, when))

    def _add_timer(self, at: float, handle: Handle) -> Handle:
        self._sequence += 1
        heapq.heappush(self._timers, (max(at, self.now), self._sequence, handle))
        return handle

    def schedule(self, life: Life | None, at: float, callback: Callable[..., object],
                 *args: Any) -> Handle:
        """Run `callback` as `life` (None = the simulator itself) at the global time `at`."""
        context = life.context if life is not None else _NOBODY
        return self._add_timer(at, Handle(callback, args, context, at))

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Coroutine[Any, Any, T], *,  # type: ignore[override]
                    name: str | None = None,
                    context: contextvars.Context | None = None) -> asyncio.Task[T]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        self._tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return not self._closed

    def is_closed(self) -> bool:
        return self._closed

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is not None and not isinstance(error, Crashed):
            self.unretrieved.append(error)

    async def connect_accepted_socket(self, factory: Callable[[], Any],  # type: ignore[override]
                                      accepted: Any, **options: Any) -> Any:
        accepted.attach(factory())
        return accepted, accepted.protocol

    async def create_connection(self, factory: Callable[[], Any],  # type: ignore[override]
                                host: str, port: int, **options: Any) -> Any:
        return await self.connector.connect(self.life, factory, host, port)

    def run_in_executor(self, *arguments: Any) -> NoReturn:  # type: ignore[override]
        raise NotImplementedError("no threads in simulation")

    def call_soon_threadsafe(self, *arguments: Any,  # type: ignore[override]
                             **options: Any) -> NoReturn:
        raise NotImplementedError("no threads in simulation")

    # --- driving --------------------------------------------------------------------------------

    def pause(self, life: Life) -> None:
        """Keep the life's callbacks back, as SIGSTOP does."""
        life.paused = True

    def resume(self, life: Life) -> None:
        """Run what was kept back, in order."""
        life.paused = False
        self._ready.extend(life.deferred)
        life.deferred.clear()

    def run(self, main: Awaitable[T]) -> T:
        """Run until `main` is done. Raises `Stalled`, and at once what `failure` is set to or what
        a callback raised."""
        asyncio._set_running_loop(self)
        try:
            task = asyncio.ensure_future(main, loop=self)
            instant, steps = self.now, self.steps
            while not task.done():
                if self.failure is not None:
                    raise self.failure
                if self._ready:
                    if self.steps > steps + STEPS_WITHOUT_TIME:
                        raise Stalled(f"no progress at {self.now:.6f} s")
                    self._step(self._ready.popleft())
                elif self._timers:
                    self._advance()
                    if self.now > instant + 1e-6:
                        instant, steps = self.now, self.steps
                else:
                    raise Stalled("nothing is left to run")
            return task.result()
        finally:
            asyncio._set_running_loop(None)

    def failures(self) -> list[BaseException]:
        """Errors that nobody asked for: of tasks, and of futures that are gone."""
        # The loop keeps its tasks, so that none of them is ever collected and tells by itself.
        forgotten = [error for task in self._tasks
                     if task._log_traceback  # type: ignore[attr-defined]
                     and (error := task.exception()) is not None]
        return [error for error in (*self.unretrieved, *forgotten)
                if not isinstance(error, Crashed)]

    def dispose(self) -> None:
        """Drop everything that never ended. Every life must have ended before."""
        self._closed = True
        for task in self._tasks:
            if not task.done():
                # What a coroutine does on its way out concerns nobody any more.
                with contextlib.suppress(BaseException):
                    task.get_coro().close()  # type: ignore[union-attr]
        self._tasks.clear()
        self._ready.clear()
        self._timers.clear()

    def _advance(self) -> None:
        """Move time to the next timer; everything due then becomes ready."""
        timers = self._timers
        self.now = timers[0][0]
        while timers and timers[0][0] <= self.now:
            handle = heapq.heappop(timers)[2]
            if handle.callback is not None:
                self._ready.append(handle)

    def _step(self, handle: Handle) -> None:
        life = handle.life
        if handle.callback is None:
            return
        if life is not None:
            if not life.alive:
                return
            if life.paused:
                life.deferred.append(handle)
                return
        self.steps += 1
        self.life = life
        try:
            handle.context.run(handle.callback, *handle.args)
        except Crashed:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            self.life = None
        if life is not None and life.alive:
            self.after_step(life)


_NOBODY = contextvars.copy_context()
