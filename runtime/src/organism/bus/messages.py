# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The payloads of the bus: one typed, versioned schema each, validated where it is received.

All are JSON. Times are UTC, RFC 3339 with milliseconds (``2026-11-22T10:00:00.000Z``); durations are seconds.
Absent values are omitted. Unknown fields are refused in what people write (a misspelt constraint must not be ignored)
and tolerated in what components tell each other (an upgrade goes conductor first, then workers).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from organism.core import _bus

VERSION: Final = 1

Identifier = Annotated[str, msgspec.Meta(pattern=rf"^{_bus.IDENTIFIER.pattern}\Z")]
JobType = Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]{0,31}\Z")]
InputPath = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
MOST_GPUS = 64
SPEC_LEVEL = 3
"""Which fields of a job this version's workers know: 2 adds `gpus`, `gpu_model` and `inputs`, 3 `python` and `argv`. A
worker of an earlier version refuses what it does not know, so the conductor gives it no job that has any of them."""
State = Literal["enqueued", "waiting_gpu", "scheduled", "running", "retry", "done", "failed", "cancelled", "dead"]
FINAL_STATES = ("done", "failed", "cancelled", "dead")

OUTPUT_LIMIT = 64_000
"""Bytes of stdout and of stderr, each, that a result carries (head and tail halves when there was more)."""


class BadMessage(ValueError):
    """A payload that does not fit its schema; the text says where and why."""


STARTS_NOTHING = frozenset({"noop"})
"""Job types that start no process and leave nothing: over in the moment they begin. Several of their orders may be on
their way to a GPU at the same time, and a worker reports one while it takes the next."""


def now() -> str:
    """The present time as the bus writes it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since_epoch(stamp: str) -> float:
    """The reverse of :func:`now`. Raises ValueError."""
    return datetime.fromisoformat(stamp).timestamp()


MOST_NEEDS = 1_000
"""Most jobs that one job may wait for."""


class After(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """A job that has to end first. ``on``: ``ok`` (it must be done), ``failed`` (it must end otherwise) or ``any``."""

    task_id: Identifier
    on: Literal["ok", "failed", "any"] = "ok"

    def met(self, state: str) -> bool:
        """Whether the final state is the one waited for."""
        return self.on == "any" or (state == "done") == (self.on == "ok")


class JobSpec(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a submitter asks for, on ``gpu.task.enqueue.<user>.<shard>``.

    ``cmd`` (type ``cmd``) is an argument list; ``shell`` (type ``shell``, off unless the site's policy allows it) a
    script for ``/bin/sh``; ``python`` (type ``python``) a program's text for the worker's Python, ``argv`` its
    arguments; ``noop`` starts nothing. Other types are handlers a site installs on its workers and take their input
    from ``args``.
    """

    v: Literal[1] = VERSION
    task_id: Identifier | None = None
    type: JobType = "cmd"
    cmd: list[str] | None = None
    shell: str | None = None
    python: str | None = None
    argv: list[str] = []
    args: dict[str, Any] | None = None
    cwd: str | None = None
    """Relative to the job's own directory; it may not leave it."""
    env: dict[str, str] = {}
    timeout: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)] | None = None
    max_retries: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    gpu: Identifier | None = None
    """Only this GPU (waits while it is away)."""
    min_vram_mb: Annotated[int, msgspec.Meta(ge=0)] = 0
    gpus: Annotated[int, msgspec.Meta(ge=1, le=MOST_GPUS)] = 1
    """So many GPUs of one host, all of them or none; each as `min_vram_mb` and `gpu_model` say."""
    gpu_model: Annotated[str, msgspec.Meta(min_length=1, max_length=100)] | None = None
    """Only a GPU whose model's name contains this, in capitals or not."""
    inputs: Annotated[list[InputPath], msgspec.Meta(max_length=64)] = []
    """Paths in the GPUs' caches that the job reads: of the GPUs that are free it gets one that has most of them."""
    priority: Annotated[int, msgspec.Meta(ge=-100, le=100)] = 0
    """Higher goes first; equal ones in order of submission."""
    delay: Annotated[float, msgspec.Meta(ge=0, le=30 * 86_400)] = 0
    after: Annotated[list[After], msgspec.Meta(max_length=MOST_NEEDS)] = []
    """Own jobs, submitted before, that have to end first. If one ends otherwise, this is cancelled (``dependency``)."""
    deadline: Annotated[float, msgspec.Meta(gt=0, le=30 * 86_400)] | None = None
    """Seconds from the submission; a job that has not ended by then, waiting or running, fails (``deadline``)."""
    queue: Identifier = "default"
    """Operators can pause a queue; jobs of all queues compete for the same GPUs."""
    unique: Identifier | None = None
    """While a job of the same user with this key is unfinished, another one is cancelled (``unique``)."""
    labels: dict[str, str] = {}
    replay_of: Identifier | None = None


def level_of(spec: JobSpec) -> int:
    """The ``spec`` level that a worker must have to read this job."""
    if spec.python is not None:
        return 3
    return 2 if spec.gpus > 1 or spec.gpu_model is not None or spec.inputs else 0


class TaskRef(msgspec.Struct, frozen=True):
    """One attempt of one job: the fencing pair."""

    task_id: Identifier
    attempt: int


class RunOrder(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A dispatch, on ``gpu.task.run.<gpu>``: durable, and addressed to one incarnation of one worker."""

    v: Literal[1] = VERSION
    ts: str
    task_id: Identifier
    attempt: int
    """Starts at 1; only the latest attempt's report is accepted."""
    gpu: Identifier
    incarnation: str
    """A worker drops an order that was meant for an earlier start of itself."""
    user: Identifier
    """Of the submission's subject, which the server ties to the key that published it."""
    group: str = ""
    """Of the conductor's limits file; empty for none."""
    timeout: float
    spec: JobSpec
    enq_seq: int
    """Sequence of the submission in ORG_WQ: the conductor's own key."""
    reason: str = ""
    """Why this job went before one that strict order would have put first."""
    also: list[Identifier] = []
    """Further GPUs of the same host that are the job's while it runs (`gpus`)."""
    on_disk: bool = False
    """Its directory belongs on disk: an earlier attempt found the GPU's cache in RAM full."""


class Device(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a worker serves. ``backend`` is ``amdgpu``, ``nvml`` or ``simulated``; a simulated device says so."""

    backend: str
    address: str
    """PCI address ``0000:03:00.0``, or ``sim:0``."""
    uuid: str | None = None
    model: str = ""
    vram_mb: int = 0


PROGRESS_TEXT = 200
"""Most characters of what a job says of its progress."""


class Progress(msgspec.Struct, omit_defaults=True, kw_only=True):
    """How far a running attempt says it is."""

    task_id: Identifier
    attempt: int
    fraction: float | None = None
    """0 to 1."""
    text: str = ""
    ts: str = ""
    """When the worker saw it."""


class Heartbeat(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A worker's sign of life: published once on ``gpu.worker.up.<gpu>``, then requested on the heartbeat subject."""

    v: Literal[1] = VERSION
    ts: str
    gpu_id: Identifier
    incarnation: str
    """Random; new at each start of the worker and after it was declared dead."""
    host: str
    pid: int
    version: str
    device: Device
    workdir: str = ""
    nats_url: str = ""
    types: list[str] = []
    """Job types that this worker can run."""
    running: list[TaskRef] = []
    unreported: list[TaskRef] = []
    """Finished, with an outcome on disk that the conductor has not yet acknowledged."""
    draining: bool = False
    spec: int = 0
    """Which fields of a job this worker knows (:data:`SPEC_LEVEL`)."""
    progress: list[Progress] = []
    """Of the running attempts that say something."""
    shard: Identifier = _bus.DEFAULT_SHARD
    """Whose GPU it is: conductors of other shards leave it alone."""
    coming: list[TaskRef] = []
    """In hand and not begun yet."""
    hears: bool = False
    """It takes orders that are handed over; one of an earlier version reads them from the stream."""


class HeartbeatReply(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The conductor's answer: the lease runs ``lease_s`` from the moment the heartbeat was sent."""

    ok: bool
    lease_s: float = 0
    epoch: int = 0
    revoked: list[TaskRef] = []
    """Stop these: they were cancelled or given to another GPU."""
    reset: bool = False
    """This incarnation was declared dead: take a new one."""
    drain: bool = False
    reason: str = ""
    hands: bool = False
    """This conductor hands orders over; one of an earlier version leaves them in the stream."""


class Metrics(msgspec.Struct, omit_defaults=True, kw_only=True):
    """On ``gpu.worker.metrics.<gpu>``; a value that the hardware does not tell is absent, never zero."""

    v: Literal[1] = VERSION
    ts: str
    gpu_id: Identifier
    incarnation: str = ""
    backend: str
    pci: str | None = None
    card: str | None = None
    gpu_busy_percent: float | None = None
    mem_busy_percent: float | None = None
    temp_c: float | None = None
    fan_rpm: float | None = None
    power_w: float | None = None
    vram_total_mb: float | None = None
    vram_used_mb: float | None = None
    warm: list[str] = []
    """Paths in the GPU's cache: what stands at its top and below, and those inputs of earlier jobs that are there."""


class Report(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The outcome of one attempt: a request on ``gpu.task.done.<gpu>`` (returncode 0) or ``gpu.task.err.<gpu>``.

    The worker keeps it on disk and asks again until the answer says that it is stored or stale.
    """

    v: Literal[1] = VERSION
    ts: str
    task_id: Identifier
    attempt: int
    gpu_id: Identifier
    incarnation: str
    type: str
    returncode: int | None = None
    error: str | None = None
    """``exit`` (returncode not 0), ``timeout``, ``signal``, ``start`` (could not be started), ``refused`` (type or
    argument not allowed on this worker), ``disk`` (it has written more than it may), ``cancelled``, ``shutdown``
    (worker is stopping; costs the job no retry), ``cache_full`` (it outgrew the GPU's cache in RAM; the first time it
    costs no retry, and the next attempt works on disk)."""
    message: str = ""
    stdout: str = ""
    stderr: str = ""
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    cwd: str = ""
    started: str | None = None
    finished: str | None = None
    value: Any = None
    """What a handler other than cmd and shell returned."""


class ReportReply(msgspec.Struct, omit_defaults=True, kw_only=True):
    """``recorded`` and ``duplicate``: stored, forget it. ``stale`` and ``unknown``: not wanted, forget it. ``retry``:
    ask again."""

    verdict: Literal["recorded", "duplicate", "stale", "unknown", "retry"]
    reason: str = ""


class StateEvent(msgspec.Struct, omit_defaults=True, kw_only=True):
    """On ``gpu.task.state.<id>``, with the message id ``<id>:<n>``; also the lines of a result's history."""

    v: Literal[1] = VERSION
    ts: str
    task_id: Identifier
    n: int
    """Position in the job's history, from 0, growing; steps that leave no record may be missing or come late."""
    state: State
    user: str = ""
    gpu: str | None = None
    attempt: int = 0
    tries: int = 0
    err: str | None = None
    reason: str | None = None


class Result(msgspec.Struct, omit_defaults=True, kw_only=True):
    """On ``gpu.task.result.<id>``: exactly one a job, written by the conductor alone."""

    v: Literal[1] = VERSION
    ts: str
    task_id: Identifier
    ok: bool
    state: Literal["done", "failed", "cancelled", "dead"]
    user: str
    group: str = ""
    data: dict[str, Any]
    """Of the last attempt: task_id, gpu_id, returncode, stdout, stderr, cwd, type, started, finished, value."""
    error: str | None = None
    reason: str = ""
    """One sentence for people."""
    attempts: int = 0
    submitted: str = ""
    labels: dict[str, str] = {}
    history: list[StateEvent] = []
    enq_seq: int = 0
    digest: str = ""
    """Fingerprint of the submission: the same id with the same content again is the same job."""
    shard: Identifier = _bus.DEFAULT_SHARD


class Journal(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The conductor's own records in ORG_WQ.

    ``retry``: an attempt ended without a final state; ``not_before`` is a UTC time. ``retire``: the submissions with
    these sequences are final, and the results up to ``results_upto`` have been counted in.
    """

    v: Literal[1] = VERSION
    ts: str
    kind: Literal["retry", "retire"]
    enq_seq: int = 0
    task_id: str = ""
    attempt: int = 0
    lost: bool = False
    """The attempt was lost with its worker: it costs a loss, not a try."""
    gpu: str | None = None
    err: str = ""
    not_before: str = ""
    retired: list[int] = []
    results_upto: int = 0


class DeadLetter(msgspec.Struct, omit_defaults=True, kw_only=True):
    """On ``gpu.task.dead.<id>``: what could not be run, why, and the payload as it came (base64 when not UTF-8)."""

    v: Literal[1] = VERSION
    ts: str
    task_id: str
    user: str
    reason: str
    payload: str
    encoding: Literal["utf-8", "base64"] = "utf-8"
    enq_seq: int = 0
    shard: Identifier = _bus.DEFAULT_SHARD


class Control(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Conductor to worker on ``gpu.worker.ctl.<gpu>``."""

    op: Literal["cancel", "logs", "drain", "ping"]
    task_id: str = ""
    attempt: int = 0
    stream: Literal["stdout", "stderr"] = "stdout"
    offset: int = 0
    on: bool = True


class ControlReply(msgspec.Struct, omit_defaults=True, kw_only=True):
    ok: bool
    reason: str = ""
    text: str = ""
    next_offset: int = 0
    eof: bool = False


class RpcError(msgspec.Struct, omit_defaults=True, kw_only=True):
    """``code``: not_found, forbidden, bad_request, conflict, unavailable."""

    code: str
    message: str


class RpcReply(msgspec.Struct, omit_defaults=True, kw_only=True):
    ok: bool
    data: dict[str, Any] = {}
    error: RpcError | None = None


Message = TypeVar("Message", bound=msgspec.Struct)

_encoder = msgspec.json.Encoder()


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes, kind: type[Message]) -> Message:
    """The typed message in a payload. Raises BadMessage with the place and the reason."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:  # ValidationError is one of them
        raise BadMessage(str(error)) from error
    except UnicodeDecodeError as error:
        raise BadMessage(f"not UTF-8: {error}") from error


def check_spec(spec: JobSpec) -> None:
    """What the schema alone cannot say; used by the client before it sends and by the conductor. Raises BadMessage."""
    if spec.type == "cmd":
        if not spec.cmd:
            raise BadMessage("a cmd job needs `cmd`: a list with at least the program's name")
    elif spec.cmd is not None:
        raise BadMessage(f"`cmd` belongs to type cmd, not {spec.type}")
    if spec.type == "shell":
        if not spec.shell:
            raise BadMessage("a shell job needs `shell`: the script's text")
    elif spec.shell is not None:
        raise BadMessage(f"`shell` belongs to type shell, not {spec.type}")
    if spec.type == "python":
        if not spec.python:
            raise BadMessage("a python job needs `python`: the program's text")
    elif spec.python is not None:
        raise BadMessage(f"`python` belongs to type python, not {spec.type}")
    elif spec.argv:
        raise BadMessage(f"`argv` belongs to type python, not {spec.type}; a command's arguments are part of `cmd`")
    needed = [need.task_id for need in spec.after]
    if spec.task_id in needed:
        raise BadMessage("a job cannot run after itself")
    if len(set(needed)) != len(needed):
        raise BadMessage("`after` names the same job more than once")
    if spec.cwd is not None and (spec.cwd.startswith("/") or ".." in spec.cwd.split("/")):
        raise BadMessage(f"`cwd` must stay inside the job's directory, not {spec.cwd!r}")
    for path in spec.inputs:
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise BadMessage(f"`inputs` are paths within a GPU's cache, not {path!r}")
    for key in spec.env:
        if not key or "=" in key or "\0" in key:
            raise BadMessage(f"`env` has the impossible name {key!r}")
    texts = (spec.shell or "", spec.python or "")
    if any("\0" in word for word in [*(spec.cmd or []), *spec.argv, *spec.env.values(), *texts]):
        raise BadMessage("a NUL byte cannot be passed to a process")


def shown_command(spec: JobSpec) -> str:
    """What a job runs, in one line for people; of a Python program its first line that does something."""
    if spec.cmd:
        return " ".join(spec.cmd)
    if spec.python is None:
        return spec.shell or ""
    lines = (line.strip() for line in spec.python[:4096].splitlines())
    first = next((line for line in lines if line and not line.startswith("#")), "")
    return " ".join(["python:", first, *spec.argv])
