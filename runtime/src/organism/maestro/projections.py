# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""State events (ORG_EVENTS) and the latest state of each job (bucket organism_jobs): what others look at.

Nothing is decided on them, so they are written behind the truth: in groups whose last message is answered for all
(one connection, one stream, one order). Where a stream has replicas each has its own answer: a leader may die with the
first half of a group, and its successor store the second. What a crash or a power cut of the server may have cost is
found and sent again, with the same message ids and in the order of its own time, after a reconnection and after a
takeover, before anything new is written (:mod:`organism.maestro.survivors`); and once more somewhat later, since
nothing fences off what a predecessor still had on its way.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from organism.bus import messages
from organism.bus.errors import BusError, StreamFull, Unavailable
from organism.bus.jetstream import JetStream, Outgoing
from organism.bus.messages import StateEvent
from organism.core import _bus
from organism.maestro.lookup import last_many, other_shards
from organism.maestro.survivors import histories_since, lost_since
from organism.maestro.takeover import readable

log = logging.getLogger(__name__)

GROUP = 256
REMEMBERED = 4096
"""Events that are sent again after a reconnection: more than the server holds unwritten."""
HEALED = 500
"""Jobs that are looked up at a time after a takeover."""
RETRY = 0.5
LATE = 30.0
"""Seconds after a takeover in which something of the predecessor may still come: these streams have no fence. Less than
the server's duplicate window."""
Histories = Sequence[Sequence[StateEvent]]
"""An item may be made when it is asked for (:class:`organism.maestro.ledger.Lasting`)."""
_KV = f"KV_{_bus.BUCKET_JOBS}"


def _kv_subject(task_id: str) -> str:
    return f"$KV.{_bus.BUCKET_JOBS}.{task_id}"


class Projections:
    """A queue of events and the newest state of each job that is not written yet."""

    def __init__(
        self,
        js: JetStream,
        complain: Callable[[str, str], None],
        unfinished: Callable[[], Histories] = tuple,
    ) -> None:
        self.js = js
        self.shard = _bus.DEFAULT_SHARD
        self._complain = complain
        self._unfinished = unfinished
        """Lasting events of the jobs that have no result yet."""
        self._events: deque[tuple[StateEvent, bytes]] = deque()
        self._latest: dict[str, bytes] = {}
        self._sent: deque[tuple[StateEvent, bytes]] = deque(maxlen=REMEMBERED)
        self.may_write: Callable[[], bool] = lambda: True
        """Whether the lease is ours at this moment."""
        self._interrupted = False
        self._replicas: dict[str, int] = {}
        self._late = False
        self._later: asyncio.TimerHandle | None = None
        self._inherited: list[str] = []
        self._again = 0
        """Events of the queue that were sent before."""
        self._last_group = 0
        self._wake = asyncio.Event()
        self._written = asyncio.Event()
        self._written.set()
        self._task: asyncio.Task[None] | None = None

    def start(self, histories: Histories = ()) -> asyncio.Task[None]:
        """Write; first what is missing of ``histories``, the lasting events of jobs that a former conductor left."""
        self._written.clear()
        self._task = asyncio.create_task(self._run(histories), name="projections")
        self._later = asyncio.get_running_loop().call_later(LATE, self._look_later)
        return self._task

    def _look_later(self) -> None:
        """What a predecessor that was frozen or cut off had on its way may have come behind ours."""
        self._late = True
        self._touch()

    async def stop(self) -> None:
        if self._later is not None:
            self._later.cancel()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def event(self, event: StateEvent) -> None:
        """Something became of a job."""
        data = messages.encode(event)
        self._events.append((event, data))
        self._latest[event.task_id] = data
        self._touch()

    def _touch(self) -> None:
        self._written.clear()
        self._wake.set()

    async def drain(self) -> None:
        """Wait until everything is written."""
        await self._written.wait()

    def again(self) -> None:
        """The connection was lost and is back: the server may have been killed with unwritten events."""
        self._interrupted = True
        self._touch()

    def _put_back(self) -> None:
        """Send again what was sent last, in front of what waits."""
        self._again = max(0, self._again) + len(self._sent)
        self._events.extendleft(reversed(self._sent))
        self._sent.clear()
        self._latest |= {task_id: data for task_id, (_, data) in _newest(self._events).items()}

    # ---- writing -----------------------------------------------------------------------------------------------------

    async def _run(self, histories: Histories) -> None:
        self._events.extendleft(reversed(await self._missing(histories, inherit=True)))
        del histories  # this frame lives as long as the term
        rounds = 0
        while True:
            if self._interrupted or self._late:
                late, self._late = self._late, False
                interrupted, self._interrupted = self._interrupted, False
                missing = await self._missing(self._unfinished()) if interrupted else []
                missing += await self._missing_late() if late else []
                self._put_back()
                self._events.extendleft(reversed(missing))
                self._again += len(missing)
                continue  # the connection may have gone again
            if not self._events and not self._latest:
                self._written.set()
                self._wake.clear()
                await self._wake.wait()
                continue
            if not await self._write_events():
                continue
            rounds += 1
            # a long queue of events means that states change faster than they can be written: then write them seldom
            if len(self._events) < GROUP or rounds % 8 == 0:
                await self._write_states()
            if self._again <= 0:
                continue
            self._again -= self._last_group
            if self._again <= 0:
                await self._mend_order()

    async def _ready(self) -> None:
        """Wait for the connection, and for the right to write.

        What is said without a connection would be the first thing over the next: it would be there before what was lost
        is sent again, and a job's later event hides that an earlier one is not there. And who was frozen has to find
        out first whether another one leads by now.
        """
        while True:
            try:
                await self.js.nc.wait_connected(10.0)
            except Unavailable:
                if self.js.nc.is_closed:
                    raise
                continue
            if self.may_write():
                return
            await asyncio.sleep(RETRY)  # the lease is renewed, or the term ends

    async def _write_events(self) -> bool:
        events = [self._events.popleft() for _ in range(min(GROUP, len(self._events)))]
        group = [
            Outgoing(_bus.state_subject(event.task_id), data, f"{event.task_id}:{event.n}") for event, data in events
        ]
        if not await self._group(_bus.STREAM_EVENTS, group):
            self._events.extendleft(reversed(events))
            if self._interrupted:
                self._again += len(events)  # a part of them may be there, behind which the others come
            return False
        self._sent.extend(events)
        self._last_group = len(events)
        return True

    async def _write_states(self) -> None:
        states = {key: self._latest.pop(key) for key in list(islice(self._latest, GROUP))}
        if not await self._group(_KV, [Outgoing(_kv_subject(key), data) for key, data in states.items()]):
            for key, data in states.items():
                self._latest.setdefault(key, data)

    async def _mend_order(self) -> None:
        """What the server had lost was stored behind younger events: let each job's newest be its last again."""
        newest = _newest(self._sent)
        subjects = {_bus.state_subject(task_id): task_id for task_id in newest}
        try:
            stored = await self._stored(_bus.STREAM_EVENTS, subjects)
        except BusError as problem:
            log.info("%s: %s; the order of events is looked at again", _bus.STREAM_EVENTS, problem)
            self._interrupted = True
            await asyncio.sleep(RETRY)  # see _group
            return
        wrong = [(event, data) for task_id, (event, data) in newest.items() if stored.get(task_id, -1) < event.n]
        for at in range(0, len(wrong), GROUP):
            group = [
                Outgoing(_bus.state_subject(event.task_id), data, f"{event.task_id}:{event.n}:again")
                for event, data in wrong[at : at + GROUP]
            ]
            if not await self._group(_bus.STREAM_EVENTS, group):
                self._interrupted = True
                return

    async def _group(self, stream: str, group: Sequence[Outgoing]) -> bool:
        """Write a group in order; one answer, the last one's, stands for all of them. False: it is to be sent again."""
        if not group:
            return True
        await self._ready()
        if self._interrupted:
            return False
        try:
            if await self._replicated(stream):
                await self._each(group)
            else:
                for message in group[:-1]:
                    await self.js.nc.say(message.subject, message.data, headers=_identity(message))
                last = group[-1]
                await self.js.publish(last.subject, last.data, msg_id=last.msg_id)
        except Unavailable as problem:
            if self.js.nc.is_closed:
                raise
            log.info("%s: %s; trying again", stream, problem)
            if self._replicas.get(stream, 1) > 1:
                self._interrupted = True
            await asyncio.sleep(RETRY)  # the server is there, its streams are not yet: there is no event for it
            return False
        except StreamFull:
            self._complain("events_full", f"stream {stream} is full: state events are being lost; raise its size")
        except BusError as problem:
            self._complain("events_refused", f"{stream}: {problem}")
        return True

    async def _replicated(self, stream: str) -> bool:
        if stream not in self._replicas:
            self._replicas[stream] = int((await self.js.info(stream)).get("config", {}).get("num_replicas", 1))
        return self._replicas[stream] > 1

    async def _each(self, group: Sequence[Outgoing]) -> None:
        """Send all at once and wait for all. None is sent again by itself: it would come behind those after it."""
        said = (self.js.publish(one.subject, one.data, headers=_identity(one)) for one in group)
        problems = [
            one for one in await asyncio.gather(*said, return_exceptions=True) if isinstance(one, BaseException)
        ]
        for problem in sorted(problems, key=lambda one: not isinstance(one, Unavailable)):
            raise problem

    # ---- after a crash -----------------------------------------------------------------------------------------------

    async def _missing_late(self) -> list[tuple[StateEvent, bytes]]:
        """Of the jobs that were inherited and have ended since: nothing that is still to come would correct them."""
        missing: list[tuple[StateEvent, bytes]] = []
        ids, self._inherited = self._inherited, []
        for at in range(0, len(ids), HEALED):
            missing += await self._missing(await self._ended(ids[at : at + HEALED]), elsewhere=False)
        return missing

    async def _ended(self, ids: Sequence[str]) -> Histories:
        """The histories of those that have a result."""
        while True:
            try:
                found = await last_many(self.js, _bus.STREAM_RESULTS, [_bus.result_subject(task_id) for task_id in ids])
            except Unavailable as problem:
                if self.js.nc.is_closed:
                    raise
                log.info("results: %s; looking again", problem)
                await asyncio.sleep(RETRY)  # see _group
                continue
            results = (readable(stored) for stored in found.values())
            return [result.history for result in results if result is not None and result.history]

    async def _missing(
        self, histories: Histories, *, elsewhere: bool = True, inherit: bool = False
    ) -> list[tuple[StateEvent, bytes]]:
        """Find what is missing before anything new is written, since the last event of a job tells what was.

        ``elsewhere``: also of jobs that have ended before. ``inherit``: look once more later whether they have.
        """
        while True:
            try:
                missing: list[tuple[StateEvent, bytes]] = []
                since = await self._elsewhere() if elsewhere else []
                others = {history[0].task_id: history for history in since}
                seen: list[str] = []
                for at in range(0, len(histories), HEALED):
                    some = [history for history in histories[at : at + HEALED] if history]
                    seen += [history[0].task_id for history in some]
                    missing += await self._heal(some)
                for task_id in seen if others else ():
                    others.pop(task_id, None)
                looked = list(others.values())
                for at in range(0, len(looked), HEALED):
                    missing += await self._heal(looked[at : at + HEALED])
                if inherit:
                    self._inherited = seen
                break
            except Unavailable as problem:
                if self.js.nc.is_closed:
                    raise
                log.info("state events: %s; looking again", problem)
                await asyncio.sleep(RETRY)  # see _group
        if missing:
            log.info("%d state events of earlier were missing and are sent", len(missing))
        return _in_order(missing)

    async def _elsewhere(self) -> Histories:
        """Of jobs of this shard that have ended and of which events may have been lost.

        Where there are other shards the last event may be a later one of theirs, which tells nothing of ours.
        """
        when = 0.0 if await other_shards(self.js, self.shard) else await lost_since(self.js)
        return await histories_since(self.js, when, self.shard)

    async def _heal(self, histories: Histories) -> list[tuple[StateEvent, bytes]]:
        ids = [history[0].task_id for history in histories]
        events = await self._stored(_bus.STREAM_EVENTS, {_bus.state_subject(task_id): task_id for task_id in ids})
        states = await self._stored(_KV, {_kv_subject(task_id): task_id for task_id in ids})
        missing: list[tuple[StateEvent, bytes]] = []
        for history in histories:
            task_id, last = history[0].task_id, history[-1]
            missing += [(event, messages.encode(event)) for event in history if event.n > events.get(task_id, -1)]
            if last.n > states.get(task_id, -1):
                self._latest.setdefault(task_id, messages.encode(last))
        return missing

    async def _stored(self, stream: str, subjects: dict[str, str]) -> dict[str, int]:
        """Task id -> number of its last event there."""
        numbers: dict[str, int] = {}
        for subject, stored in (await last_many(self.js, stream, subjects)).items():
            try:
                numbers[subjects[subject]] = messages.decode(stored.data, StateEvent).n
            except messages.BadMessage as problem:
                log.warning("%s: %s is not readable: %s", stream, subject, problem)
        return numbers


def _identity(message: Outgoing) -> dict[str, str] | None:
    return {"Nats-Msg-Id": message.msg_id} if message.msg_id else None


def _newest(events: Iterable[tuple[StateEvent, bytes]]) -> dict[str, tuple[StateEvent, bytes]]:
    """Of each job; an older event may have been sent again behind it."""
    newest: dict[str, tuple[StateEvent, bytes]] = {}
    for event, data in events:
        if event.task_id not in newest or event.n > newest[event.task_id][0].n:
            newest[event.task_id] = (event, data)
    return newest


def _in_order(missing: Iterable[tuple[StateEvent, bytes]]) -> list[tuple[StateEvent, bytes]]:
    """By their own time: a conductor that comes next and finds a part of them knows from where to look.

    A job's own stay in the order in which they are given, which is theirs: when it was submitted is the server's time,
    and all that follows has the conductor's, which may be a little behind.
    """
    latest: dict[str, str] = {}
    keyed = []
    for event, data in missing:
        at = latest[event.task_id] = max(event.ts, latest.get(event.task_id, ""))
        keyed.append(((at, event.task_id, event.n), (event, data)))
    return [entry for _, entry in sorted(keyed, key=lambda one: one[0])]
