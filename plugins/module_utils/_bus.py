# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The bus: every subject, stream, bucket, consumer and permission of the product, declared in this one place.

PRIVATE to the organism.proxmox collection.

What must commit together lies in one stream, and a step of a job commits with one message (docs/architecture.md):

=============  =============================================  =====================================================
stream         holds                                          why it is so
=============  =============================================  =====================================================
ORG_WQ         submissions, dispatches, the conductor's       the truth about unfinished jobs: replayed by a conductor
               journal                                        that takes over; synced at each write; finished
                                                              prefixes are purged in batches (a WorkQueue stream
                                                              would cost one fsync an ack)
ORG_RESULTS    one message a job, its final result            the server itself refuses a second one
                                                              (discard_new_per_subject)
ORG_EVENTS     every state change                             a feed, written asynchronously; a conductor sends again
                                                              what a crash may have cost, and the result's own
                                                              history is the durable record
ORG_DLQ        messages and jobs that could not be run        never deleted by a client
ORG_TELEM      start-ups, metrics, cache events               short-lived; can never crowd out a result
OBJ_organism_  long outputs of ended jobs, whole              an object store that outlives workers; the oldest goes
logs                                                          when room is needed; users ask the conductor for it
=============  =============================================  =====================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

# ---- names -----------------------------------------------------------------------------------------------------------

IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")
"""Job ids, GPU ids and user names: one subject token, one path component, nothing else."""

STREAM_WQ = "ORG_WQ"
STREAM_RESULTS = "ORG_RESULTS"
STREAM_EVENTS = "ORG_EVENTS"
STREAM_DLQ = "ORG_DLQ"
STREAM_TELEMETRY = "ORG_TELEM"
BUCKET_JOBS = "organism_jobs"
"""Latest state of each job (a projection that can be rebuilt from the streams)."""
BUCKET_CONTROL = "organism_ctl"
"""Leases (``shard.<n>``) and operators' wishes (``gpu.<id>``: drained, ``queue.<name>``: paused)."""
BUCKET_LOGS = "organism_logs"
"""Outputs that are longer than what a result holds: an object store (ADR-20) of :mod:`organism.bus.outputs`."""
STREAM_LOGS = f"OBJ_{BUCKET_LOGS}"

DEFAULT_SHARD = "0"

MIN_SERVER = (2, 15, 1)
"""Older servers lose acknowledged messages or lack fields that the streams need."""


def is_identifier(text: str) -> bool:
    return IDENTIFIER.fullmatch(text) is not None


def enqueue_subject(user: str, shard: str = DEFAULT_SHARD) -> str:
    """Where ``user`` submits; the server's permissions make the user's token trustworthy."""
    return f"gpu.task.enqueue.{user}.{shard}"


def run_subject(gpu: str) -> str:
    """In ORG_WQ: which attempts a GPU was given."""
    return f"gpu.task.run.{gpu}"


def order_subject(gpu: str, epoch: int | str = "*") -> str:
    """Conductor to worker, in no stream: a message of :func:`run_subject`, once it is stored.

    ``epoch`` is the conductor's: what one says who leads no more is not heard.
    """
    return f"gpu.task.order.{gpu}.{epoch}"


def journal_subject(shard: str = DEFAULT_SHARD) -> str:
    """The conductor's own records in ORG_WQ: retries and retired submissions."""
    return f"gpu.task.journal.{shard}"


def epoch_subject(shard: str = DEFAULT_SHARD) -> str:
    """In ORG_WQ; its last sequence is the fence of every write of the shard's present conductor."""
    return f"gpu.task.epoch.{shard}"


def result_epoch_subject(epoch: int | str, shard: str = DEFAULT_SHARD) -> str:
    """In ORG_RESULTS, one message an epoch (that stream keeps one message a subject and refuses a second)."""
    return f"gpu.task.fence.{shard}.{epoch}"


def done_subject(gpu: str) -> str:
    """A request: answered when the outcome is stored."""
    return f"gpu.task.done.{gpu}"


def err_subject(gpu: str) -> str:
    return f"gpu.task.err.{gpu}"


def state_subject(task_id: str) -> str:
    return f"gpu.task.state.{task_id}"


def result_subject(task_id: str) -> str:
    return f"gpu.task.result.{task_id}"


def dead_subject(task_id: str) -> str:
    return f"gpu.task.dead.{task_id}"


def heartbeat_subject(gpu: str) -> str:
    """A request: the answer renews the worker's lease and names revoked attempts."""
    return f"gpu.worker.heartbeat.{gpu}"


def up_subject(gpu: str) -> str:
    return f"gpu.worker.up.{gpu}"


def metrics_subject(gpu: str) -> str:
    return f"gpu.worker.metrics.{gpu}"


def log_subject(gpu: str) -> str:
    return f"gpu.worker.log.{gpu}"


def output_subject(gpu: str, task_id: str, attempt: int, stream: str, number: int) -> str:
    """A piece of an attempt's whole ``stdout`` or ``stderr``."""
    return f"$O.{BUCKET_LOGS}.C.{gpu}.{task_id}.{attempt}.{stream}.{number}"


def output_record_subject(gpu: str, task_id: str, attempt: int, stream: str) -> str:
    """What is known of a whole output, once all its pieces are there."""
    return f"$O.{BUCKET_LOGS}.M.{gpu}.{task_id}.{attempt}.{stream}"


def control_subject(gpu: str) -> str:
    """Conductor to worker, a request: cancel, logs, drain, ping."""
    return f"gpu.worker.ctl.{gpu}"


def rpc_subject(user: str, operation: str, shard: str = DEFAULT_SHARD) -> str:
    """Client to conductor, a request."""
    return f"maestro.rpc.{shard}.{user}.{operation}"


def notify_subject(user: str, task_id: str) -> str:
    """Conductor to client: the final result of one of the user's jobs, right after it is stored."""
    return f"maestro.notify.{user}.{task_id}"


def earlier_consumer(gpu: str) -> str:
    """What a worker of an earlier version reads its orders by."""
    return f"GPU_RUN_{gpu}"


def inbox_prefix(component: str) -> str:
    """Each component's own reply space (``component`` is its label), so that nobody can listen to another's answers."""
    return f"_INBOX.{component}"


def is_own_inbox(reply: str, name: str, kinds: tuple[str, ...]) -> bool:
    """Whether an answer to a component of this name and one of these kinds goes to nobody else.

    nats-server lets a request name any subject for its answer, and whoever answers has rights that the asker has not.
    """
    return any(reply.startswith(f"{inbox_prefix(f'{kind}.{name}')}.") for kind in kinds)


MAESTRO_UP = "maestro.up"
MAESTRO_HEARTBEAT = "maestro.heartbeat"
MAESTRO_STATE = "maestro.state"

# ---- streams, buckets, consumers -------------------------------------------------------------------------------------

MIB = 1024 * 1024
DAY = 86_400


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, ages in seconds; the sum of the sizes must stay below the server's ``max_file_store``."""

    queue_bytes: int = 4096 * MIB
    results_bytes: int = 8192 * MIB
    events_bytes: int = 4096 * MIB
    dead_bytes: int = 1024 * MIB
    telemetry_bytes: int = 256 * MIB
    jobs_bytes: int = 1024 * MIB
    control_bytes: int = 16 * MIB
    logs_bytes: int = 2048 * MIB
    results_age: int = 30 * DAY
    events_age: int = 30 * DAY
    telemetry_age: int = DAY
    logs_age: int = 7 * DAY
    duplicate_window: int = 600

    @property
    def total(self) -> int:
        return (
            self.queue_bytes
            + self.results_bytes
            + self.events_bytes
            + self.dead_bytes
            + self.telemetry_bytes
            + self.jobs_bytes
            + self.control_bytes
            + self.logs_bytes
        )


@dataclass(frozen=True)
class Topology:
    """What must exist on the bus, as JetStream API configurations (durations in nanoseconds).

    Consumers do not: whoever reads makes one for as long as it reads, in the server's memory.
    """

    streams: dict[str, dict[str, Any]] = field(default_factory=dict)


def _seconds(value: float) -> int:
    return int(value * 1_000_000_000)


def _stream(name: str, subjects: list[str], size: int, replicas: int, **extra: Any) -> dict[str, Any]:
    return {
        "name": name,
        "subjects": subjects,
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "max_bytes": size,
        "max_age": 0,
        "max_msgs_per_subject": -1,
        "num_replicas": replicas,
        "allow_direct": True,
        **extra,
    }


def topology(*, replicas: int = 1, limits: Limits | None = None) -> Topology:
    """The whole bus of a pool."""
    limits = limits or Limits()
    window = _seconds(limits.duplicate_window)
    # the server refuses it on replicated streams (10052), which need it less: a copy stands in for the disk's sync
    projection = "async" if replicas == 1 else "default"
    streams = [
        _stream(
            STREAM_WQ,
            ["gpu.task.enqueue.*.*", "gpu.task.run.*", "gpu.task.journal.*", "gpu.task.epoch.*"],
            limits.queue_bytes,
            replicas,
            allow_atomic=True,
            duplicate_window=window,
        ),
        _stream(
            STREAM_RESULTS,
            ["gpu.task.result.*", "gpu.task.fence.*.*"],
            limits.results_bytes,
            replicas,
            allow_atomic=True,
            duplicate_window=window,
            max_age=_seconds(limits.results_age),
            max_msgs_per_subject=1,
            discard_new_per_subject=True,
        ),
        _stream(
            STREAM_EVENTS,
            ["gpu.task.state.*"],
            limits.events_bytes,
            replicas,
            duplicate_window=window,
            max_age=_seconds(limits.events_age),
            persist_mode=projection,
        ),
        _stream(
            STREAM_DLQ, ["gpu.task.dead.*"], limits.dead_bytes, replicas, duplicate_window=window, deny_delete=True
        ),
        _stream(
            STREAM_TELEMETRY,
            [
                "gpu.worker.up.*",
                "gpu.worker.metrics.*",
                "gpu.worker.log.*",
                MAESTRO_UP,
                MAESTRO_HEARTBEAT,
                MAESTRO_STATE,
                "gpu.cache.agent.up",
                "gpu.cache.heartbeat",
                "gpu.cache.event",
                "gpu.cache.sync.*",
                "gpu.cache.prewarm.*",
            ],
            limits.telemetry_bytes,
            replicas,
            # the one stream where the oldest may go: nobody waits for a metric
            discard="old",
            duplicate_window=window,
            max_age=_seconds(limits.telemetry_age),
            persist_mode=projection,
        ),
        _bucket(BUCKET_JOBS, limits.jobs_bytes, replicas, max_age=_seconds(limits.events_age), persist_mode=projection),
        _bucket(BUCKET_CONTROL, limits.control_bytes, replicas),
        _stream(
            STREAM_LOGS,
            [f"$O.{BUCKET_LOGS}.C.>", f"$O.{BUCKET_LOGS}.M.>"],
            limits.logs_bytes,
            replicas,
            # what is lost with the oldest, or by a power cut, costs a user the middle of an output, and no job
            discard="old",
            max_age=_seconds(limits.logs_age),
            max_msgs_per_subject=1,
            persist_mode=projection,
        ),
    ]
    return Topology({stream["name"]: stream for stream in streams})


def _bucket(name: str, size: int, replicas: int, **extra: Any) -> dict[str, Any]:
    """A key-value bucket is a stream of this shape (NATS ADR-8)."""
    return _stream(
        f"KV_{name}",
        [f"$KV.{name}.>"],
        size,
        replicas,
        allow_rollup_hdrs=True,
        deny_delete=True,
        **{"max_msgs_per_subject": 1, **extra},
    )


# ---- who may say what ------------------------------------------------------------------------------------------------

KINDS = ("admin", "conductor", "worker", "cache", "submitter", "operator", "observer")
ANSWERING = ("worker", "cache")
"""Kinds that may answer the requests they receive, once each, and publish to no other inbox."""


@dataclass(frozen=True)
class Component:
    """One holder of credentials. ``name`` is a GPU id (worker), host (cache), user (submitter, operator) or a label."""

    kind: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.kind}.{self.name}"


def permissions(component: Component) -> dict[str, Any]:
    """The ``permissions`` block of a component's NATS user, by allow-lists only (deny lists have been bypassed before).

    Raises ValueError for a kind or a name that is unknown or unfit.
    """
    kind, name = component.kind, component.name
    if kind not in KINDS:
        raise ValueError(f"unknown kind of component {kind!r}; one of {', '.join(KINDS)}")
    if not is_identifier(name):
        raise ValueError(f"name of a {kind} must match {IDENTIFIER.pattern}, not {name!r}")
    inbox = inbox_prefix(component.label) + ".>"
    publish, subscribe = _allowed(kind, name)
    # nats-server takes an empty allow-list for "everything": who may say nothing gets his own inbox instead
    block: dict[str, Any] = {"publish": {"allow": publish or [inbox]}, "subscribe": {"allow": [inbox, *subscribe]}}
    if kind in ANSWERING:
        block["allow_responses"] = {"max": 1, "expires": "1m"}
    return block


def _allowed(kind: str, name: str) -> tuple[list[str], list[str]]:
    wq, api = STREAM_WQ, "$JS.API"
    if kind == "admin":
        return [f"{api}.>"], []
    if kind == "conductor":
        streams = (STREAM_WQ, STREAM_RESULTS, STREAM_EVENTS, STREAM_DLQ, f"KV_{BUCKET_JOBS}", f"KV_{BUCKET_CONTROL}")
        return [
            f"{api}.INFO",
            *(f"{api}.STREAM.INFO.{stream}" for stream in streams),
            *(f"{api}.STREAM.MSG.GET.{stream}" for stream in streams),
            *(f"{api}.DIRECT.GET.{stream}" for stream in streams),
            *(f"{api}.DIRECT.GET.{stream}.>" for stream in streams),
            f"{api}.STREAM.PURGE.{wq}",
            f"{api}.STREAM.MSG.DELETE.{wq}",
            f"{api}.STREAM.PURGE.{STREAM_RESULTS}",
            *(f"{api}.CONSUMER.CREATE.{stream}.>" for stream in streams),
            *(f"{api}.CONSUMER.DELETE.{stream}.*" for stream in streams),
            *(f"{api}.CONSUMER.INFO.{stream}.*" for stream in streams),
            *(f"{api}.CONSUMER.MSG.NEXT.{stream}.*" for stream in streams),
            f"{api}.STREAM.INFO.{STREAM_LOGS}",
            f"{api}.STREAM.MSG.GET.{STREAM_LOGS}",
            "gpu.task.>",
            "gpu.worker.ctl.*",
            "maestro.>",
            f"$KV.{BUCKET_JOBS}.>",
            f"$KV.{BUCKET_CONTROL}.>",
            # answers to workers and clients, some of them long after the question
            "_INBOX.worker.*.>",
            "_INBOX.submitter.*.>",
            "_INBOX.operator.*.>",
        ], [
            "gpu.task.done.*",
            "gpu.task.err.*",
            "gpu.worker.heartbeat.*",
            "gpu.worker.up.*",
            "gpu.worker.metrics.*",
            "maestro.rpc.>",
            f"$KV.{BUCKET_CONTROL}.>",
        ]
    if kind == "worker":
        consumer = earlier_consumer(name)
        return [
            # a worker of an earlier version asks for its orders and acknowledges them, until it is upgraded
            f"{api}.CONSUMER.MSG.NEXT.{wq}.{consumer}",
            f"$JS.ACK.{wq}.{consumer}.>",
            done_subject(name),
            err_subject(name),
            heartbeat_subject(name),
            up_subject(name),
            metrics_subject(name),
            log_subject(name),
            f"$O.{BUCKET_LOGS}.C.{name}.>",
            f"$O.{BUCKET_LOGS}.M.{name}.>",
        ], [control_subject(name), order_subject(name)]
    if kind == "cache":
        return [
            "gpu.cache.agent.up",
            "gpu.cache.heartbeat",
            "gpu.cache.event",
            "gpu.cache.sync.done",
            "gpu.cache.sync.err",
            "gpu.cache.prewarm.done",
            "gpu.cache.prewarm.err",
        ], ["gpu.cache.sync", "gpu.cache.prewarm"]
    submit = [f"gpu.task.enqueue.{name}.*", f"maestro.rpc.*.{name}.*"]
    watch = ["gpu.worker.>", "gpu.task.state.*", "gpu.cache.>", MAESTRO_UP, MAESTRO_HEARTBEAT, MAESTRO_STATE]
    if kind == "submitter":
        return submit, [f"maestro.notify.{name}.*"]
    if kind == "operator":
        return [*submit, "gpu.cache.sync", "gpu.cache.prewarm"], [f"maestro.notify.{name}.*", *watch]
    # observer: dashboards
    return [], watch
