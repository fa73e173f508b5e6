"""What runs when: whole rounds of the core, and the shorter ways of most events.

Whatever happens (a message, a proposal, a finished fsync, the engine's tick) asks the pump for what
it needs, and one pass of the event loop does it once for all that happened since. Each shorter way
ends in the state that a whole round would have ended in, except that what may come with the next
tick comes with the next tick.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from elastickv.errors import DiskFull
from elastickv.logs import get_logger
from elastickv.raft import rules
from elastickv.raft.applying import Applying
from elastickv.raft.core import Context
from elastickv.raft.elections import Elections
from elastickv.raft.follower import Follower
from elastickv.raft.journal import Ticket
from elastickv.raft.offload import InlineOffload, Offload
from elastickv.raft.proposals import AppliedWaiters
from elastickv.raft.reads import Reads
from elastickv.raft.replication import Replication
from elastickv.raft.roles import Roles
from elastickv.raft.transfer import Transfer

log = get_logger("elastickv.raft")


class Pump:
    """The only place from which the core ticks, the log is synced and the links are flushed."""

    def __init__(self, context: Context, roles: Roles, elections: Elections, follower: Follower,
                 replication: Replication, reads: Reads, transfer: Transfer,
                 applying: Applying, waiters: AppliedWaiters, *, offload: Offload,
                 flush_links: Callable[[], None], is_active: Callable[[], bool],
                 note_full_disk: Callable[[DiskFull], None], fail: Callable[[BaseException], None],
                 on_sync: Callable[[float], None] | None) -> None:
        """`fail` stops the node. `on_sync` is told the seconds that each fsync took, from its order
        to the moment when the loop learned of its end."""
        self._loop = asyncio.get_running_loop()
        self._context = context
        self._settings = context.settings
        self._core = context.core
        self._journal = context.journal
        self._roles = roles
        self._elections = elections
        self._follower = follower
        self._replication = replication
        self._reads = reads
        self._transfer = transfer
        self._applying = applying
        self._waiters = waiters
        self._offload = offload
        self._flush_links = flush_links
        self._is_active = is_active
        self._note_full_disk = note_full_disk
        self._fail = fail
        self._on_sync = on_sync
        self._is_scheduled = False
        self._round_due = False
        self._commit_timer: asyncio.TimerHandle | None = None
        self._commit_due = False
        self._sync_running = False
        self._sync_began = 0.0

    def close(self) -> None:
        """Nothing runs by itself any more."""
        if self._commit_timer is not None:
            self._commit_timer.cancel()

    # --- asking -------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Ask for a whole round: whatever is due."""
        self._round_due = True
        self.schedule_entries()

    def schedule_entries(self) -> None:
        """Ask for what new entries need and no more: to be sent, made durable, acknowledged."""
        if not self._is_scheduled and self._is_active():
            self._is_scheduled = True
            self._loop.call_soon(self.run)

    def handle_ack_now(self, peer_id: str) -> bool:
        """Do what follows from an acknowledgement, if it is little; False when it takes a round."""
        if self._transfer.active:
            return False
        return self._replication.owes_nothing_to(peer_id) or self._commit_at_once(peer_id)

    def handle_append_now(self) -> bool:
        """Do what follows from a leader's entries, if it is little; False when it takes a round."""
        core = self._core
        if self._roles.is_due(core) or (
                core.commit_index() > core.applied_index() and not self._may_apply_later()):
            return False
        self._move_entries()
        return True

    # --- running ------------------------------------------------------------------------------

    def run(self) -> None:
        """Do what was asked for."""
        self._is_scheduled = False
        if not self._is_active():
            return
        try:
            # What the others wait for goes before the tick, which may apply entries.
            self._move_entries()
            if self._round_due:
                self._round_due = False
                self._run_round()
        except DiskFull as error:
            self._note_full_disk(error)
        except Exception as error:
            self._fail(error)

    def _move_entries(self) -> None:
        """Send and sync what is new. In a whole round a leader's own fsync comes at its end: in the
        loop, it would keep clients from the answers that the tick has for them."""
        leads = self._core.is_leading()
        if leads and self._journal.needs_sync:
            self._replicate()
            self._flush_links()
        if not (leads and self._round_due):
            self._start_sync()
            self._flush_links()

    def _run_round(self) -> None:
        self._elections.before_tick()
        self._core.tick()
        self._elections.after_tick()
        if self._core.is_leading():
            self._give_way_if_stalled()
        if self._core.is_leading():
            self._replicate()
            self._transfer.advance()
        self._reads.advance()
        self._flush_links()
        self._start_sync()
        self._flush_links()
        if self._is_active():  # unless this very round has stopped the node
            self._roles.announce(self._core)

    def _commit_at_once(self, peer_id: str) -> bool:
        """Commit and apply what an acknowledgement completes, sparing its clients a whole round;
        True when nothing is left for one. Until this node is announced as leader it is a round that
        looks whether it may be."""
        core = self._core
        if not self._roles.is_announced_leader() or not core.is_leading() \
                or self._journal.needs_sync:
            return False
        committed = core.commit_index()
        core.commit()
        if core.commit_index() > committed:
            self._announce_commit_later()
        return core.next_index(peer_id) > self._journal.last_index \
            and core.applied_index() == core.commit_index()

    def _may_apply_later(self) -> bool:
        core = self._core
        return rules.may_apply_later(
            core.commit_index() - core.applied_index(), leads=core.is_leading(),
            awaited=bool(self._waiters), most_entries=self._settings.apply_lag_entries)

    # --- sending ------------------------------------------------------------------------------

    def _replicate(self) -> None:
        announce, self._commit_due = self._commit_due, False
        if self._replication.replicate(announce=announce):
            self._announce_commit_later()

    def _announce_commit_later(self) -> None:
        if self._commit_timer is None:
            self._commit_timer = self._loop.call_later(self._settings.commit_delay_s,
                                                       self._on_commit_timer)

    def _on_commit_timer(self) -> None:
        self._commit_timer = None
        self._commit_due = True
        self.schedule()

    # --- durability ---------------------------------------------------------------------------

    def _give_way_if_stalled(self) -> None:
        """While an fsync or a flush in a thread hangs, heartbeats go on and nobody would stand for
        election: no write would end until the disk answers. Elected all the same, as the one with
        the longest log, a member gives way again as soon as another has it."""
        core, settings, now = self._core, self._settings, self._loop.time()
        stalled_s = now - self._sync_began
        if self._sync_running and stalled_s >= settings.stalled_sync_s \
                and rules.is_held_up(self._journal.durable_index, self._matches(core.voters())):
            log.warning("giving way: the disk does not answer", node=settings.node_id,
                        fsync_s=round(stalled_s, 1))
            core.follow_nobody()
            return
        stalled_s = now - self._applying.waits_since
        if stalled_s >= settings.stalled_state_s and rules.has_successor(
                self._journal.last_index,
                self._matches(filter(self._context.answers, core.voters()))):
            log.warning("giving way: the store does not answer", node=settings.node_id,
                        waits_s=round(stalled_s, 1))
            core.follow_nobody()

    def _matches(self, voters: Iterable[str]) -> list[int]:
        return [self._core.match_index(voter) for voter in voters
                if voter != self._settings.node_id]

    def _start_sync(self) -> None:
        if self._sync_running or not self._journal.needs_sync:
            return
        self._sync_running = True
        self._sync_began = self._loop.time()
        job, ticket = self._journal.begin_sync()
        little = self._journal.unsynced_bytes <= self._settings.inline_sync_bytes
        offload = InlineOffload() if little else self._offload
        offload.submit(job, partial(self._synced, ticket))

    def _synced(self, ticket: Ticket, error: BaseException | None) -> None:
        self._sync_running = False
        if not self._is_active():
            return
        try:
            self._journal.finish_sync(ticket, error)
            if self._on_sync is not None:
                self._on_sync(self._loop.time() - self._sync_began)
            self._elections.release_votes()
            self._follower.acknowledge()
        except DiskFull as full:
            self._note_full_disk(full)
        except Exception as failure:
            # After a failed fsync the kernel may have dropped the pages: never retried.
            self._fail(failure)
            return
        if self._has_work_after_sync():
            self.schedule()
        elif self._journal.needs_sync:
            self.schedule_entries()

    def _has_work_after_sync(self) -> bool:
        """Whether what is durable now is to be committed or applied at once."""
        core, journal = self._core, self._journal
        if min(core.commit_index(), journal.durable_index) > core.applied_index() \
                and not self._may_apply_later():
            return True
        return (core.is_leading() and journal.durable_index > core.commit_index()
                and core.may_commit())
