# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""The operations of ``maestroctl`` on jobs."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from organism.bus import messages, rpc_types
from organism.cli._output import EXIT_FAILED, EXIT_OK, Output, clean, exit_code, plain, shorten, stamp
from organism.client import AsyncMaestro, InvalidJobError, MaestroError, Result, WaitTimeoutError
from organism.client._aio import Stream
from organism.client._ids import new_task_id
from organism.client._jobfile import load
from organism.client._scripts import read_script
from organism.client._submitting import array, build

# ---- submit ----------------------------------------------------------------------------------------------------------


def job_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """A job's fields from the command line; what was not given is absent. Raises InvalidJobError."""
    fields: dict[str, Any] = {
        "type": arguments.job_type,
        "cmd": arguments.command,
        "shell": arguments.shell_text,
        "python": None if arguments.script is None else read_program(arguments.script),
        "argv": arguments.argv,
        "args": None if arguments.job_args is None else _object(arguments.job_args, "--args"),
        "task_id": arguments.task_id,
        "gpu": arguments.gpu_id,
        "min_vram_mb": arguments.min_vram_mb,
        "gpus": arguments.gpus,
        "gpu_model": arguments.gpu_model,
        "inputs": arguments.inputs,
        "cwd": arguments.cwd,
        "timeout": arguments.job_timeout,
        "max_retries": arguments.max_retries,
        "priority": arguments.priority,
        "delay": arguments.delay,
        "after": arguments.after,
        "deadline": arguments.deadline,
        "unique": arguments.unique,
        "queue": arguments.queue,
        "env": None if arguments.environment is None else dict(arguments.environment),
        "labels": None if arguments.labels is None else dict(arguments.labels),
    }
    return {key: value for key, value in fields.items() if value is not None}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidJobError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidJobError(f"{where} must be a JSON object, not {text[:80]!r}")
    return value


def read_jsonl(name: str) -> list[dict[str, Any]]:
    """One job a line, blank lines left out; ``-`` is stdin. Raises InvalidJobError with the line's number."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidJobError(f"cannot read {name}: {error}") from error
    where = "stdin" if name == "-" else name
    return [
        _object(line, f"{where}:{number}") for number, line in enumerate(text.splitlines(), start=1) if line.strip()
    ]


def read_program(name: str) -> str:
    """The text of a Python program; ``-`` is stdin. Raises InvalidJobError."""
    if name != "-":
        return read_script(name)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidJobError(f"stdin: {error}") from error


def read_file(name: str) -> list[messages.JobSpec]:
    """The jobs of a YAML file; ``-`` is stdin. Raises JobFileError."""
    if name != "-":
        return load(name)
    try:
        return load("stdin", sys.stdin.read())
    except UnicodeDecodeError as error:
        raise InvalidJobError(f"stdin: {error}") from error


def planned(arguments: argparse.Namespace) -> list[messages.JobSpec]:
    """The jobs that a command line would submit, checked. Raises InvalidJobError."""
    if arguments.job_file is not None:
        return read_file(arguments.job_file)
    if arguments.jsonl is not None:
        return [build(fields) for fields in read_jsonl(arguments.jsonl)]
    if arguments.array is not None:
        return [build(fields) for fields in array(arguments.array, job_fields(arguments))]
    return [build(job_fields(arguments))]


def dry_run(arguments: argparse.Namespace, output: Output) -> int:
    """Show what would be submitted; needs no bus. Raises InvalidJobError."""
    specs = planned(arguments)
    rows = [
        (
            spec.task_id,
            spec.queue,
            spec.priority,
            " ".join(f"{need.task_id}:{need.on}" for need in spec.after),
            shorten(messages.shown_command(spec) or spec.type, 60),
        )
        for spec in specs
    ]
    lines = output.table(("ID", "QUEUE", "PRIORITY", "AFTER", "COMMAND"), rows)
    output.answer(lines=lines, jobs=[json.loads(messages.encode(spec)) for spec in specs])
    output.hint(f"{len(specs)} jobs are well-formed; nothing was submitted")
    return EXIT_OK


async def submit(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    if arguments.jsonl is not None or arguments.array is not None or arguments.job_file is not None:
        if arguments.job_file is not None:
            handles = await maestro.submit_many(read_file(arguments.job_file))
        elif arguments.jsonl is not None:
            handles = await maestro.submit_many(read_jsonl(arguments.jsonl))
        else:
            handles = await maestro.submit_array(arguments.array, **job_fields(arguments))
        arguments.task_ids = [handle.task_id for handle in handles]  # Ctrl-C names them
        if not arguments.wait:
            output.answer(lines=arguments.task_ids, task_ids=arguments.task_ids)
            return EXIT_OK
        return await _collect(maestro, handles, arguments.wait_timeout, output)
    arguments.task_id = arguments.task_id or new_task_id()  # before it is sent: Ctrl-C can name it at any moment
    handle = await maestro.submit(**job_fields(arguments))
    if handle.duplicate and not output.as_json:
        output.note(f"{handle.task_id} had been accepted before; it is not run twice")
    if not arguments.wait:
        output.answer(lines=[handle.task_id], task_id=handle.task_id, duplicate=handle.duplicate)
        output.hint(f"on the bus; `maestroctl watch {handle.task_id}` follows it")
        return EXIT_OK
    async with output.progress(lambda: f"{handle.task_id}: {maestro.trouble or 'waiting for the result'}"):
        result = await handle.result(arguments.wait_timeout)
    output.answer(lines=result_lines(output, result), task_id=handle.task_id, result=record(result))
    return EXIT_OK if result.ok else EXIT_FAILED


# ---- results ---------------------------------------------------------------------------------------------------------


def record(result: Result) -> dict[str, Any]:
    """A result as programs get it."""
    return {
        "task_id": result.task_id,
        "ok": result.ok,
        "state": result.state,
        "error": result.error,
        "reason": result.reason,
        "user": result.user,
        "group": result.group,
        "gpu": result.gpu,
        "attempts": result.attempts,
        "submitted": result.submitted,
        "labels": result.labels,
        "data": result.data,
        "history": [plain(event) for event in result.history],
    }


def summary(output: Output, result: Result) -> str:
    """One line for people."""
    parts = [f"{result.task_id}  {output.paint(result.state)}"]
    if result.error:
        parts.append(f"({result.error})")
    if result.gpu:
        parts.append(f"on {result.gpu}")
    parts.append("after 1 attempt" if result.attempts == 1 else f"after {result.attempts} attempts")
    if result.returncode not in (0, None):
        parts.append(f"returncode {result.returncode}")
    if result.reason and not result.ok:
        parts.append(f"- {result.reason}")
    return " ".join(parts)


def result_lines(output: Output, result: Result) -> list[str]:
    lines = [summary(output, result)]
    if result.stdout:
        lines.append(result.stdout.rstrip("\n"))
    if result.stderr:
        lines += ["-- stderr:", result.stderr.rstrip("\n")]
    if result.value is not None:
        lines.append(json.dumps(result.value, ensure_ascii=False))
    return lines


async def result(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    found = await maestro.result(arguments.task_id)
    output.answer(lines=result_lines(output, found), result=record(found))
    return EXIT_OK if found.ok else EXIT_FAILED


async def wait(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    handles = [maestro.job(task_id) for task_id in dict.fromkeys(arguments.task_ids)]
    return await _collect(maestro, handles, arguments.wait_timeout, output)


async def _collect(maestro: AsyncMaestro, handles: list[Any], limit: float | None, output: Output) -> int:
    """Wait for each on its own, so that one unknown id does not hide the others' results."""
    finished = 0

    async def one(handle: Any) -> Result:
        nonlocal finished
        result: Result = await handle.result(limit)
        finished += 1
        output.say(summary(output, result))
        return result

    async with output.progress(lambda: maestro.trouble or f"{finished} of {len(handles)} jobs are final"):
        ends = await asyncio.gather(*(one(handle) for handle in handles), return_exceptions=True)
    results: list[Result] = []
    pending: list[str] = []
    errors: list[tuple[str, MaestroError]] = []
    for handle, end in zip(handles, ends, strict=True):
        if isinstance(end, Result):
            results.append(end)
        elif isinstance(end, WaitTimeoutError):
            pending.append(handle.task_id)
        elif isinstance(end, MaestroError):
            errors.append((handle.task_id, end))
        else:
            raise end
    for task_id, error in errors:
        if not output.as_json:
            output.note(f"{task_id}: {error}")
    if pending and not output.as_json:
        output.note(f"not final after {limit:g} s, they go on: {' '.join(pending)}")
    if output.as_json:
        fields: dict[str, Any] = {"results": [record(end) for end in results], "pending": pending}
        if errors:
            fields["error"] = {"code": errors[0][1].code, "message": str(errors[0][1])}
            fields["errors"] = [
                {"task_id": task_id, "code": error.code, "message": str(error)} for task_id, error in errors
            ]
        output.json(ok=not pending and not errors, **fields)
    if errors:
        return max(exit_code(error) for _, error in errors)
    return EXIT_OK if not pending and all(end.ok for end in results) else EXIT_FAILED


async def watch(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    """States as they come, then the results."""
    task_ids = list(dict.fromkeys(arguments.task_ids))
    name_wanted = len(task_ids) > 1

    async def follow(task_id: str) -> None:
        async for event in maestro.states(task_id):
            output.say(event_line(output, event, name_wanted))

    async def advance(task_id: str) -> None:
        async for job in maestro.progress(task_id):
            output.say("  ".join(part for part in (task_id if name_wanted else "", progress_of(job)) if part))

    async def both(task_id: str) -> None:
        beside = asyncio.create_task(advance(task_id))
        try:
            await follow(task_id)
        finally:
            beside.cancel()
            await asyncio.wait({beside})

    try:
        async with asyncio.timeout(arguments.wait_timeout):
            await asyncio.gather(*(both(task_id) for task_id in task_ids))
    except TimeoutError:
        raise WaitTimeoutError(f"not final after {arguments.wait_timeout:g} s; it goes on", task_ids) from None
    results = await maestro.wait(task_ids)
    lines = [line for found in results.values() for line in result_lines(output, found)]
    output.answer(lines=lines, results=[record(found) for found in results.values()])
    return EXIT_OK if all(found.ok for found in results.values()) else EXIT_FAILED


async def tail_state(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    try:
        async with asyncio.timeout(arguments.wait_timeout):
            async for event in maestro.states(arguments.task_id):
                if output.as_json:
                    output.json(ok=True, event=event)
                else:
                    output.say(event_line(output, event, False))
    except TimeoutError:
        raise WaitTimeoutError(
            f"{arguments.task_id} is not final after {arguments.wait_timeout:g} s; it goes on", [arguments.task_id]
        ) from None
    return EXIT_OK


def event_line(output: Output, event: messages.StateEvent, with_name: bool) -> str:
    parts = [stamp(event.ts), event.task_id if with_name else "", output.paint(event.state)]
    if event.gpu:
        parts.append(f"on {event.gpu}")
    if event.attempt:
        parts.append(f"attempt {event.attempt}")
    if event.err:
        parts.append(f"({event.err})")
    if event.reason:
        parts.append(f"- {event.reason}")
    return "  ".join(part for part in parts if part)


# ---- look and steer --------------------------------------------------------------------------------------------------


async def status(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    job = await maestro.status(arguments.task_id)
    output.answer(lines=_job_lines(output, job), job=job)
    return EXIT_OK


def progress_of(job: rpc_types.JobInfo) -> str:
    """What a job says of how far it is, for people."""
    share = "" if job.progress is None else f"{100 * job.progress:.0f} %"
    return f"{share}  {clean(job.progress_text)}".strip()


def _job_lines(output: Output, job: rpc_types.JobInfo) -> list[str]:
    labels = " ".join(f"{key}={value}" for key, value in job.labels.items())
    rows = [
        ("job", job.task_id),
        ("state", job.state),
        ("progress", progress_of(job)),
        ("why", job.reason),
        (
            "gpu",
            ", ".join([job.gpu, *job.also])
            if job.gpu
            else (f"waits for {job.requested_gpu}" if job.requested_gpu else ""),
        ),
        ("attempt", f"{job.attempt} (failed {job.tries}, lost {job.lost}, retries allowed {job.max_retries})"),
        ("last error", job.err),
        ("user", job.user),
        ("type", job.type),
        ("command", job.command),
        ("priority", str(job.priority)),
        ("timeout", f"{job.timeout:g} s" if job.timeout else ""),
        ("submitted", stamp(job.submitted)),
        ("since", stamp(job.since)),
        ("labels", labels),
    ]
    return [f"{name + ':':<12}{output.paint(text)}" for name, text in rows if text]


async def listing(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    final = arguments.state in messages.FINAL_STATES
    reply = await maestro.list(
        state=arguments.state, user=arguments.list_user, limit=arguments.limit, all=arguments.list_all or final
    )
    rows = [
        (
            job.task_id,
            job.state,
            job.gpu or "",
            job.attempt,
            job.priority,
            job.user,
            stamp(job.submitted),
            shorten(job.command or job.type, 40),
            shorten(job.reason, 60),
        )
        for job in reply.jobs
    ]
    heads = ("ID", "STATE", "GPU", "ATTEMPT", "PRIORITY", "USER", "SUBMITTED", "COMMAND", "WHY")
    output.answer(lines=output.table(heads, rows) if rows else [], jobs=reply.jobs, more=reply.more)
    if not rows:
        output.hint("no such jobs" if arguments.list_all else "no unfinished jobs; --all shows the finished ones too")
    if reply.more and not output.as_json:
        output.note(f"there are more than {arguments.limit}: --limit, --state and --user choose")
    return EXIT_OK


async def logs(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    stream: Stream = "stderr" if arguments.stderr else "stdout"
    attempt, state, pieces = 0, "", []
    async for chunk in maestro.logs(arguments.task_id, stream=stream, follow=arguments.follow):
        if attempt and chunk.attempt != attempt and not output.as_json:
            output.note(f"-- attempt {chunk.attempt}")
        attempt, state = chunk.attempt, chunk.state
        output.write(chunk.text)
        pieces.append(chunk.text)
    if output.as_json:
        output.json(
            ok=True, task_id=arguments.task_id, stream=stream, attempt=attempt, state=state, text="".join(pieces)
        )
    return EXIT_OK


async def cancel(maestro: AsyncMaestro, arguments: argparse.Namespace, output: Output) -> int:
    jobs: list[rpc_types.JobInfo] = []
    errors: list[tuple[str, MaestroError]] = []
    for task_id in dict.fromkeys(arguments.task_ids):
        try:
            jobs.append(await maestro.cancel(task_id))
            output.say(f"{task_id}  {output.paint('cancelled')}")
        except MaestroError as error:
            errors.append((task_id, error))
            if not output.as_json:
                output.note(f"{task_id}: {error}")
    if output.as_json:
        fields: dict[str, Any] = {"jobs": jobs}
        if errors:
            fields["error"] = {"code": errors[0][1].code, "message": str(errors[0][1])}
            fields["errors"] = [
                {"task_id": task_id, "code": error.code, "message": str(error)} for task_id, error in errors
            ]
        output.json(ok=not errors, **fields)
    return max((exit_code(error) for _, error in errors), default=EXIT_OK)
