# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Long outputs on their way to the bus and back: whole characters, nothing of others, nothing forgotten, paced."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from organism.bus import messages, outputs
from organism.bus.errors import ApiError, BusError, Unavailable
from organism.bus.jetstream import PubAck, Stored
from organism.bus.messages import JobSpec, Report, RunOrder, TaskRef
from organism.core import _bus
from organism.worker import uploader
from organism.worker.cache_use import CacheUse
from organism.worker.store import Owner, Taken, TaskStore
from organism.worker.uploader import Uploader, left_out

NAME = outputs.OutputName("gpu0", "job1", 1, "stdout")


class Bucket:
    """The store of the bus; ``trouble`` is raised instead of taking a message."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.order: list[str] = []
        self.trouble: BusError | None = None
        self.refused = asyncio.Event()

    async def publish(self, subject: str, data: bytes) -> PubAck:
        if self.trouble is not None:
            self.refused.set()
            raise self.trouble
        self.kept[subject] = data
        self.order.append(subject)
        return PubAck(_bus.STREAM_LOGS, len(self.order))

    async def last(self, stream: str, subject: str) -> Stored | None:
        assert stream == _bus.STREAM_LOGS
        return Stored(1, subject, self.kept[subject], {}, 0.0) if subject in self.kept else None


async def put(bucket: Any, data: bytes, finished: str = "then") -> list[int]:
    lengths: list[int] = []

    async def read(offset: int, length: int) -> bytes:
        return data[offset : offset + length]

    async def pace(length: int) -> None:
        lengths.append(length)

    await outputs.store(bucket, NAME, read, size=len(data), finished=finished, pace=pace)
    return lengths


async def get(bucket: Any, finished: str = "then") -> str | None:
    text, offset = "", 0
    while True:
        found = await outputs.load(bucket, NAME, offset, finished=finished)
        if found is None:
            return None
        assert found.following > offset or found.eof, "it goes on"
        text, offset = text + found.text, found.following
        if found.eof:
            return text


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1), st.integers(1, 200_000))
def test_every_character_comes_back_once(motif: str, size: int) -> None:
    whole = (motif * (size // len(motif) + 1))[:size]
    data = whole.encode()
    bucket = Bucket()
    lengths = asyncio.run(put(bucket, data))
    assert sum(lengths) == len(data) and max(lengths) <= outputs.PIECE
    assert bucket.order[-1] == _bus.output_record_subject("gpu0", "job1", 1, "stdout"), "the record comes last"
    assert asyncio.run(get(bucket)) == whole


def test_what_is_no_text_comes_back_as_far_as_it_is() -> None:
    bucket = Bucket()
    data = b"a" * (outputs.PIECE - 1) + b"\xf0\xf0\xf0\xf0b"
    asyncio.run(put(bucket, data))
    assert asyncio.run(get(bucket)) == data.decode("utf-8", "replace")


def test_nothing_is_had_of_an_output_that_is_not_whole_or_of_another_job_with_the_id() -> None:
    async def test() -> None:
        bucket = Bucket()
        assert await get(bucket) is None
        await put(bucket, b"x" * 100_000)
        assert await get(bucket, "another time") is None
        del bucket.kept[_bus.output_subject("gpu0", "job1", 1, "stdout", 0)]  # the oldest goes first
        assert await get(bucket) is None
        with pytest.raises(EOFError, match="before byte 10"):
            await outputs.store(
                bucket,  # type: ignore[arg-type]  # the two calls that are used
                NAME,
                lambda *_: asyncio.sleep(0, b"short"),
                size=10,
                finished="then",
                pace=lambda _: asyncio.sleep(0),
            )

    asyncio.run(test())


def report_of(task_id: str, stdout_bytes: int = 100_000, stderr_bytes: int = 0) -> Report:
    return Report(
        ts="t", task_id=task_id, attempt=1, gpu_id="gpu0", incarnation="i", type="cmd", returncode=0,
        stdout="head and tail", stdout_bytes=stdout_bytes, stderr_bytes=stderr_bytes, finished="then",
    )  # fmt: skip


def ended(store: TaskStore, task_id: str, content: bytes = b"y" * 100_000) -> Report:
    """An attempt whose report the conductor has."""
    attempt = store.attempt(TaskRef(task_id, 1))
    order = RunOrder(
        ts="t", task_id=task_id, attempt=1, gpu="gpu0", incarnation="i", user="u", timeout=1,
        spec=JobSpec(cmd=["x"]), enq_seq=1,
    )  # fmt: skip
    attempt.create(Taken(order=order, incarnation="i", started="s"), Owner())
    attempt.log("stdout").write_bytes(content)
    report = report_of(task_id)
    attempt.finish(report)
    attempt.acknowledge()
    return report


def uploader_for(bucket: Any, store: TaskStore, rate: float = 1e12) -> Uploader:
    return Uploader(bucket, "gpu0", store, CacheUse(None, "gpu0"), rate)


async def until_quiet(store: TaskStore, made: Uploader) -> None:
    running = asyncio.create_task(made.run())
    async with asyncio.timeout(30):
        while list(store.owing()):  # noqa: ASYNC110 - nobody waits for an upload but a test
            await asyncio.sleep(0.005)
    running.cancel()


def test_only_long_outputs_are_owed() -> None:
    assert left_out(report_of("a")) == ["stdout"]
    assert left_out(report_of("a", stdout_bytes=13)) == []
    noise = b"\xff" * 100  # three bytes of text for each
    head = noise[:20].decode("utf-8", "replace")
    assert left_out(replace(report_of("a", 100), stdout=head + outputs.notice(60) + head)) == ["stdout"]
    assert left_out(replace(report_of("a", 100), stdout=noise.decode("utf-8", "replace"))) == []
    assert left_out(report_of("a", stdout_bytes=13, stderr_bytes=1)) == ["stderr"]


def test_a_restarted_worker_sends_what_was_owed_and_cleans_up_after_it(tmp_path: Path) -> None:
    store, bucket = TaskStore(tmp_path), Bucket()

    async def test() -> None:
        report = ended(store, "job1", "ä".encode() * 50_000)
        ended(store, "small")
        uploader_for(bucket, store).owe(store.attempt(TaskRef("job1", 1)), report)  # and then it was killed
        assert [attempt.ref.task_id for attempt in store.owing()] == ["job1"]
        await until_quiet(store, uploader_for(bucket, store))
        assert await get(bucket) == "ä" * 50_000

    asyncio.run(test())
    assert not any("small" in subject for subject in bucket.kept)


def test_a_bus_that_does_not_take_it_is_asked_again_and_a_lost_log_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(uploader, "FIRST_PAUSE", 0.01)
    store, bucket = TaskStore(tmp_path), Bucket()

    async def test() -> None:
        made = uploader_for(bucket, store)
        for task_id in ("job1", "job2", "job3"):
            report = ended(store, task_id)
            made.owe(store.attempt(TaskRef(task_id, 1)), report)
        store.attempt(TaskRef("job2", 1)).log("stdout").write_bytes(b"cut short")
        (store.attempt(TaskRef("job2", 1)).log("stdout")).unlink()
        (store.attempt(TaskRef("job2", 1)).log("stdout")).symlink_to("/etc/passwd")
        for trouble in (Unavailable("nobody listens"), ApiError(503, 10077, "no")):
            bucket.trouble = trouble
            running = asyncio.create_task(uploader_for(bucket, store).run())
            async with asyncio.timeout(30):
                for _ in range(2):
                    bucket.refused.clear()
                    await bucket.refused.wait()
            assert {"job1", "job3"} <= {attempt.ref.task_id for attempt in store.owing()}
            running.cancel()
        bucket.trouble = None
        await until_quiet(store, uploader_for(bucket, store))
        assert await get(bucket) == "y" * 100_000

    asyncio.run(test())
    assert "long outputs of ended jobs cannot be sent to the bus" in caplog.text
    assert "job2 stays on this machine alone" in caplog.text
    assert not any("job2" in subject for subject in bucket.kept)


def test_the_pace_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, bucket = TaskStore(tmp_path), Bucket()
    slept: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float, result: Any = None) -> Any:
        slept.append(seconds)
        return await real(0, result)

    async def test() -> None:
        made = uploader_for(bucket, store, rate=1000.0)
        made.owe(store.attempt(TaskRef("job1", 1)), ended(store, "job1"))
        monkeypatch.setattr(uploader.asyncio, "sleep", sleep)
        assert await made._send_all()

    asyncio.run(test())
    assert sum(slept) == pytest.approx(100.0)  # 100,000 bytes at 1,000 a second
    record = messages.decode(bucket.kept[_bus.output_record_subject("gpu0", "job1", 1, "stdout")], outputs.StoredOutput)
    assert (record.size, record.finished) == (100_000, "then")
