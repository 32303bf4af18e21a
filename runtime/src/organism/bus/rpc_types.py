# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What clients ask of the conductor, and what it answers: one pair of types an operation.

A question is a request on ``maestro.rpc.<shard>.<user>.<operation>`` whose payload is the operation's ``...Request``
(an empty payload counts as ``{}``). The answer is a :class:`organism.bus.messages.RpcReply`; when ``ok``, its ``data``
is the operation's ``...Reply`` as plain JSON (:func:`to_data` and :func:`from_data` convert).

============  ==================  ==================  ================================================================
operation     request             reply               who, and which errors beside ``bad_request``, ``unavailable``
============  ==================  ==================  ================================================================
status        TaskRequest         JobReply            owner or operator; not_found
list          ListRequest         ListReply           own jobs; with ``all`` or another's ``user`` operators: forbidden
result        TaskRequest         ResultReply         owner or operator; not_found; conflict while it is not final
wait          WaitRequest         WaitReply           owner or operator (another's job is ``unknown``)
cancel        TaskRequest         JobReply            owner or operator; not_found; conflict when it is already final
logs          LogsRequest         LogsReply           owner or operator; not_found; unavailable (its worker is away)
explain       TaskRequest         ExplainReply        owner or operator; not_found
history       HistoryRequest      HistoryReply        own jobs; another's ``user`` or ``all`` operators: forbidden
top           TopRequest          TopReply            everyone; ``job`` of others' jobs is shown, their output never is
drain         DrainRequest        DrainReply          operators: forbidden; not_found
pause         PauseRequest        PauseReply          operators: forbidden
dead_list     DeadListRequest     DeadListReply       own ones; operators all
dead_replay   DeadReplayRequest   DeadReplayReply     owner or operator; not_found; conflict (payload is unusable)
info          InfoRequest         InfoReply           everyone
============  ==================  ==================  ================================================================

A job of another user is ``not_found`` for a submitter: ids are not to be probed. Requests refuse unknown fields (a
misspelt one must not be ignored); replies tolerate them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from organism.bus.messages import BadMessage, DeadLetter, Identifier, Result, RpcError, State, StateEvent

OPERATIONS = (
    "status",
    "list",
    "result",
    "wait",
    "cancel",
    "logs",
    "explain",
    "history",
    "top",
    "drain",
    "pause",
    "dead_list",
    "dead_replay",
    "info",
)

WAIT_LIMIT = 25.0
"""Longest time in seconds that the conductor holds a ``wait`` before it answers with what is pending."""
WAIT_IDS = 1_000
"""Most ids in one ``wait``."""
LIST_LIMIT = 1_000
"""Most jobs in one ``list`` and most letters in one ``dead_list``."""
LOG_CHUNK = 64_000
"""Most bytes of text in one ``logs`` answer."""

GpuState = Literal["idle", "busy", "hot", "stale", "dead", "drained"]
"""``hot``: above the temperature or load limit; ``stale``: heartbeat is fresh, metrics are not; ``dead``: no heartbeat
for HEARTBEAT_TTL_SEC, or never seen; ``drained``: gets no new job on an operator's wish. The first that holds wins, in
the order dead, drained, busy, hot, stale, idle."""


class _Request(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class _Reply(msgspec.Struct, omit_defaults=True, kw_only=True):
    pass


class TaskRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Of ``status``, ``result`` and ``cancel``."""

    task_id: Identifier


class JobInfo(_Reply, omit_defaults=True, kw_only=True):
    """A job as it is now. Optional fields are absent when there is nothing to say."""

    task_id: str
    state: State
    user: str
    type: str = ""
    gpu: str | None = None
    """Where the present (or last) attempt runs."""
    also: list[str] = []
    """Its further GPUs, on the same host."""
    gpus: int = 1
    """How many it wants."""
    requested_gpu: str | None = None
    """The pin from the submission."""
    attempt: int = 0
    """Number of the present attempt, from 1; 0 before the first dispatch."""
    tries: int = 0
    """Attempts that ended by the job's own fault."""
    max_retries: int = 0
    lost: int = 0
    """Attempts lost with their worker; these cost no try."""
    priority: int = 0
    timeout: float = 0
    submitted: str = ""
    """UTC time of the stream's own clock."""
    since: str = ""
    """UTC time of the latest change of state."""
    reason: str = ""
    """One sentence for people: why it waits, or how it ended."""
    err: str = ""
    """Error word of the last attempt that failed (``exit``, ``timeout``, ``signal``, ``start``, ``lost``, ...)."""
    labels: dict[str, str] = {}
    command: str = ""
    """At most 200 characters for display, owner and operators only."""
    progress: float | None = None
    """0 to 1, as the running attempt says."""
    progress_text: str = ""


class JobReply(_Reply, omit_defaults=True, kw_only=True):
    job: JobInfo


class ListRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    state: State | None = None
    user: Identifier | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_LIMIT)] = 100
    all: bool = False
    """Also the finished ones (by default only the unfinished); every user's for an operator, one's own else."""


class ListReply(_Reply, omit_defaults=True, kw_only=True):
    jobs: list[JobInfo] = []
    """Newest submission first."""
    more: bool = False
    """There were more than ``limit``."""


class ResultReply(_Reply, omit_defaults=True, kw_only=True):
    result: Result


class WaitRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    task_ids: Annotated[list[Identifier], msgspec.Meta(min_length=1, max_length=WAIT_IDS)]
    timeout: Annotated[float, msgspec.Meta(ge=0, le=WAIT_LIMIT)] = 0
    """Seconds to hold the question while none of the ids has a result. 0: answer at once."""
    brief: bool = False
    """Leave stdout, stderr, value and history out of the results (so that 1,000 of them fit one message)."""


class WaitReply(_Reply, omit_defaults=True, kw_only=True):
    """Answered as soon as at least one id is final (or unknown), with everything known at that moment.

    An answer that would exceed 1 MiB is cut: the results left out stay in ``pending``, and the client asks again.
    """

    results: dict[str, Result] = {}
    pending: list[str] = []
    unknown: list[str] = []
    cut: bool = False
    """Some of ``pending`` may be final."""


class LogsRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    task_id: Identifier
    stream: Literal["stdout", "stderr"] = "stdout"
    offset: Annotated[int, msgspec.Meta(ge=0)] = 0
    """In bytes of the stream as the job wrote it. For a finished job the text is the result's (head and tail)."""
    attempt: Annotated[int, msgspec.Meta(ge=0)] = 0
    """The attempt that ``offset`` belongs to; 0: the present one. When another runs by now the answer starts over."""


class LogsReply(_Reply, omit_defaults=True, kw_only=True):
    text: str = ""
    next_offset: int = 0
    eof: bool = False
    """The attempt is over and this was the rest of its output."""
    state: State
    attempt: int = 0


class Candidate(_Reply, omit_defaults=True, kw_only=True):
    """One GPU, from the point of view of one job."""

    gpu: str
    suits: bool
    """It is of the kind wanted, whatever its state."""
    free: bool = False
    """It could take this job now."""
    why: str = ""
    """Why not, or what speaks for it."""
    score: float | None = None
    """What the scheduler compares, lower is better; absent when it cannot get a job."""


class ExplainReply(_Reply, omit_defaults=True, kw_only=True):
    """Why a job is where it is, at this moment."""

    task_id: str
    state: State
    summary: str
    """One sentence: what it waits for, where it runs and why there, or how it ended."""
    queue: str = "default"
    paused: bool = False
    """An operator has paused its queue."""
    limit: str = ""
    """The user's limit that holds it back."""
    waits_for: dict[str, str] = {}
    """Jobs that have to end first (at most 100), with their states as far as the asker may know."""
    ready_in: float = 0
    """Seconds until its delay or back-off is over."""
    deadline_in: float | None = None
    """Seconds until it fails unless it has ended."""
    ahead: int = 0
    """Waiting jobs that go first by the queue's order, among those that could use a GPU that this one could use."""
    ahead_by_user: dict[str, int] = {}
    order: str = ""
    """The rule of that order, in words."""
    gpus: list[Candidate] = []
    next: str = ""
    """What somebody can do about it, if anything."""
    steps: list[StateEvent] = []
    """What has happened so far, of an unfinished job."""


class HistoryRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Finished jobs from ORG_RESULTS, newest first."""

    user: Identifier | None = None
    all: bool = False
    """Every user's (operators)."""
    state: Literal["done", "failed", "cancelled", "dead"] | None = None
    label: str | None = None
    """``KEY=VALUE`` that the job must have."""
    since: str | None = None
    """UTC time; nothing that ended before."""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_LIMIT)] = 100
    before: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Go on with results older than this sequence (``next`` of the last answer); 0: from the newest."""


class HistoryEntry(_Reply, omit_defaults=True, kw_only=True):
    """A finished job in one line."""

    task_id: str
    state: State
    user: str
    type: str = ""
    gpu: str | None = None
    attempts: int = 0
    error: str | None = None
    reason: str = ""
    returncode: int | None = None
    submitted: str = ""
    started: str | None = None
    """Of the last attempt; absent when it never ran."""
    ended: str = ""
    wait: float | None = None
    """Seconds from submission to the first dispatch."""
    run: float | None = None
    """Seconds of the last attempt."""
    labels: dict[str, str] = {}


class HistoryReply(_Reply, omit_defaults=True, kw_only=True):
    jobs: list[HistoryEntry] = []
    next: int = 0
    """Not 0: there may be more; ask again with ``before`` at this."""


class TopRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class GpuInfo(_Reply, omit_defaults=True, kw_only=True):
    """A GPU as the conductor sees it; a value that the hardware does not tell is absent, never zero."""

    id: str
    state: GpuState
    host: str = ""
    job: str | None = None
    attempt: int = 0
    user: str | None = None
    """Whose job it is."""
    progress: float | None = None
    """0 to 1, as the job says."""
    model: str = ""
    backend: str = ""
    address: str = ""
    version: str = ""
    temp_c: float | None = None
    gpu_busy_percent: float | None = None
    power_w: float | None = None
    fan_rpm: float | None = None
    vram_used_mb: float | None = None
    vram_total_mb: float | None = None
    heartbeat_age: float | None = None
    """Seconds since the last one; absent when there was none since the conductor took over."""
    metrics_age: float | None = None
    score: float | None = None
    """What the scheduler compares, lower is better; absent when the GPU cannot get a job."""
    types: list[str] = []
    """Job types that its worker runs."""


class ConductorInfo(_Reply, omit_defaults=True, kw_only=True):
    name: str
    epoch: int
    since: str
    """UTC time of taking over."""
    version: str


class TopReply(_Reply, omit_defaults=True, kw_only=True):
    gpus: list[GpuInfo] = []
    queue: dict[str, int] = {}
    """Number of jobs by state: the unfinished states (0 included), and the final ones counted since taking over."""
    paused: list[str] = []
    """Queues that give out no jobs."""
    conductor: ConductorInfo


class DrainRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    gpu: Identifier
    on: bool = True
    """False: gets jobs again."""


class DrainReply(_Reply, omit_defaults=True, kw_only=True):
    gpu: GpuInfo


class PauseRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    queue: Identifier = "default"
    on: bool = True
    """False: gives out jobs again."""


class PauseReply(_Reply, omit_defaults=True, kw_only=True):
    paused: list[str] = []
    """All queues that are paused now."""


class DeadListRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=LIST_LIMIT)] = 100


class DeadEntry(DeadLetter, omit_defaults=True, kw_only=True):
    """A dead letter and where it lies."""

    seq: int
    """Its sequence in ORG_DLQ."""


class DeadListReply(_Reply, omit_defaults=True, kw_only=True):
    dead: list[DeadEntry] = []
    """Newest first; a payload above 4,000 characters is cut for display."""
    more: bool = False


class DeadReplayRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One of the two: a letter's sequence, or the id of a dead job (its newest letter)."""

    seq: Annotated[int, msgspec.Meta(ge=1)] | None = None
    task_id: Identifier | None = None


class DeadReplayReply(_Reply, omit_defaults=True, kw_only=True):
    task_id: str
    """Of the new job (``replay_of`` names the old one); the letter stays."""


class InfoRequest(_Request, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    pass


class InfoReply(_Reply, omit_defaults=True, kw_only=True):
    """What this site allows and promises."""

    version: str
    types: list[str] = []
    """Job types allowed by policy."""
    max_payload: int = 0
    """Bytes of a message, as the server said."""
    max_queue: int = 0
    """Unfinished jobs."""
    default_timeout: float = 0
    max_retries: int = 0
    operators: list[str] = []
    """Users who may see and steer everyone's jobs."""
    server_version: str = ""
    streams: dict[str, StreamInfo] = {}
    """What the conductor sees of the streams it works with."""


class StreamInfo(_Reply, omit_defaults=True, kw_only=True):
    messages: int = 0
    bytes: int = 0
    max_bytes: int = 0
    problem: str = ""
    """How it differs from its declaration, in one sentence."""


Reply = TypeVar("Reply", bound=msgspec.Struct)


def to_data(reply: msgspec.Struct) -> dict[str, Any]:
    """A reply as the ``data`` of an RpcReply."""
    data: dict[str, Any] = msgspec.to_builtins(reply)
    return data


def from_data(data: dict[str, Any], kind: type[Reply]) -> Reply:
    """The reverse. Raises BadMessage (a conductor of another version)."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise BadMessage(f"the conductor's answer does not fit: {error}") from error


class CallError(Exception):
    """A question that was answered with an error; raised by handlers and by clients alike.

    ``code``: not_found, forbidden, bad_request, conflict or unavailable.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def as_error(self) -> RpcError:
        return RpcError(code=self.code, message=str(self))
