"""A bank: transfers are batches on condition that neither account changed; reads are one scan."""

from __future__ import annotations

from collections.abc import Sequence

from elastickv.client import Condition, Put, WriteResult
from elastickv.errors import ConditionFailed, CorruptionError
from jepsen.bank import check_bank
from jepsen.history import Record
from jepsen.verdict import Verdict
from jepsen.workloads.api import Session, Workload, by_key

ACCOUNTS = tuple(f"account-{number}" for number in range(8))
OPENING_BALANCE = 100


class BankWorkload(Workload):
    name = "bank"

    async def prepare(self, session: Session) -> None:
        await session.client.batch([
            Put(account.encode(), session.codec.encode([OPENING_BALANCE, 0]))
            for account in ACCOUNTS])

    async def step(self, session: Session) -> None:
        if session.only_reads or session.random.random() < 0.2:
            await self._read(session)
            return
        source, target = session.random.sample(ACCOUNTS, 2)
        amount = session.random.randint(1, 10)
        await session.write("transfer", None, [source, target, amount],
                            lambda: self._transfer(session, source, target, amount))

    async def _transfer(self, session: Session, source: str, target: str,
                        amount: int) -> WriteResult:
        """Raises `ConditionFailed` also when the source has too little: nothing was written.
        Raises `CorruptionError` for accounts that nobody wrote like that."""
        source_found = await session.client.get(source.encode())
        target_found = await session.client.get(target.encode())
        try:
            source_balance, source_count = session.codec.decode(source_found.value)
            target_balance, target_count = session.codec.decode(target_found.value)
        except (TypeError, ValueError):
            raise CorruptionError("an account is not what was written") from None
        if source_balance < amount:
            raise ConditionFailed(f"{source} has too little")
        return await session.client.batch(
            [Put(source.encode(), session.codec.encode([source_balance - amount,
                                                        source_count + 1])),
             Put(target.encode(), session.codec.encode([target_balance + amount,
                                                        target_count + 1]))],
            conditions=[Condition(source.encode(), source_found.commit_ts),
                        Condition(target.encode(), target_found.commit_ts)])

    async def _read(self, session: Session) -> None:
        await session.read("read", None, None,
                           lambda: session.client.scan(b"account-", b"account."),
                           lambda pairs: by_key(pairs, session.codec))

    async def finish(self, sessions: Sequence[Session]) -> None:
        for session in sessions:
            await self._read(session)

    def check(self, history: Sequence[Record]) -> Verdict:
        return check_bank(history, accounts=ACCOUNTS, opening=OPENING_BALANCE)
