# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""When a server that stopped at a full disk is restarted, and what is said."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from organism.bus import watch
from organism.bus.watch import LOW_BYTES, REMIND, SPACING, Judge, Look
from organism.cli import bus as command

ROOM = 10 * LOW_BYTES
STOPPED = "JetStream stream '$G > ORG_WQ' write error: write /var/lib/nats/1.blk: no space left on device"


def test_a_healthy_server_is_left_alone() -> None:
    assert Judge("/store").judge(Look("", ROOM), 0) == ("nothing", "")


def test_little_room_is_told_before_it_is_too_late_and_not_at_each_look() -> None:
    judge = Judge("/store")
    act, text = judge.judge(Look("", LOW_BYTES // 2), 0)
    assert act == "say"
    assert "only 32 MiB are free where /store lies" in text
    assert judge.judge(Look("", LOW_BYTES // 2), 5) == ("nothing", "")
    assert judge.judge(Look("", LOW_BYTES // 2), REMIND)[0] == "say"


def test_a_stopped_server_is_restarted_only_when_the_disk_takes_a_write() -> None:
    judge = Judge("/store")
    act, text = judge.judge(Look(STOPPED, 0, "No space left on device"), 0)
    assert act == "say"
    assert "takes no write yet: No space left on device; 0 MiB are free" in text
    assert judge.judge(Look(STOPPED, 0, "No space left on device"), 5) == ("nothing", "")
    act, text = judge.judge(Look(STOPPED, ROOM, ""), 10)
    assert act == "restart"
    assert "has room again (640 MiB free): it is restarted" in text


def test_a_restart_gets_its_time_and_is_repeated_if_it_did_not_help() -> None:
    judge = Judge("/store")
    assert judge.judge(Look(STOPPED, ROOM, ""), 0)[0] == "restart"
    assert judge.judge(Look(STOPPED, ROOM, ""), SPACING - 1) == ("nothing", "")
    assert judge.judge(Look(STOPPED, ROOM, ""), SPACING)[0] == "restart"


def test_it_says_when_all_is_well_again() -> None:
    judge = Judge("/store")
    judge.judge(Look(STOPPED, ROOM, ""), 0)
    assert judge.judge(Look(None, ROOM), 1) == ("nothing", ""), "a server that does not answer is systemd's affair"
    assert judge.judge(Look("", ROOM), 2) == ("say", "nats-server stores again")
    assert judge.judge(Look("", ROOM), 3) == ("nothing", "")


def test_what_passes_by_itself_is_left_alone() -> None:
    assert Judge("/store").judge(Look("JetStream is not current with the meta leader", ROOM), 0) == ("nothing", "")


@pytest.fixture
def server() -> Iterator[tuple[str, list[tuple[int, bytes]]]]:
    answers: list[tuple[int, bytes]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Not into the test's output."""

    made = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}/healthz", answers
    made.shutdown()
    thread.join()
    made.server_close()


def test_the_server_tells_its_health(server: tuple[str, list[tuple[int, bytes]]]) -> None:
    url, answers = server
    for status, body, told in (
        (200, b'{"status":"ok"}', ""),
        (503, b'{"status":"unavailable","error":"out of breath"}', "out of breath"),
        (503, b"no JSON", "503 Service Unavailable"),
        (500, b"[]", "500 Internal Server Error"),
    ):
        answers[:] = [(status, body)]
        assert watch.health(url) == told
    assert watch.health("http://127.0.0.1:1/healthz") is None


def test_a_test_write_leaves_nothing_and_says_why_it_failed(tmp_path: Path) -> None:
    assert watch.test_write(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    assert watch.test_write(tmp_path / "gone") == "No such file or directory"


def test_what_a_killed_server_left_is_removed_and_hides_no_write_error(
    server: tuple[str, list[tuple[int, bytes]]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, answers = server
    left = tmp_path / "jetstream" / "_test_1979766191"
    left.mkdir(parents=True)
    account = b'{"error": "JetStream account \'_test_1979766191\' could not be resolved"}'
    answers[:] = [(503, account), (503, b'{"error": "stream write error: no space left on device"}')]
    found = watch.look(tmp_path, url)
    assert found.stopped
    assert found.disk == ""
    assert not left.exists()
    assert str(left) in caplog.text

    (left / "a").mkdir(parents=True)
    answers[:] = [(503, account)]
    with pytest.raises(OSError, match="not empty"):
        watch.look(tmp_path, url)

    answers[:] = [(503, account)] * 3  # its store lies elsewhere: asked once, and not for ever
    watch.look(tmp_path / "jetstream", url)
    assert len(answers) == 2


def test_free_space_is_measured_after_the_test_write(
    server: tuple[str, list[tuple[int, bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or `has room again (0 MiB free)` is said."""
    url, answers = server
    answers[:] = [(503, b'{"error": "write error"}')]
    free = 0

    def write(_store: Path) -> str:
        nonlocal free
        free = 7
        return ""

    monkeypatch.setattr(watch, "test_write", write)
    monkeypatch.setattr(watch.os, "statvfs", lambda _store: SimpleNamespace(f_bavail=free, f_frsize=10))
    assert watch.look(tmp_path, url) == Look("write error", 70, "")


def test_the_watch_restarts_and_tells(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    looks = iter([Look(STOPPED, 0, "No space left on device"), Look(STOPPED, ROOM, ""), Look("", ROOM)])
    stop = threading.Event()

    def look(store: Path, url: str) -> Look:
        assert (store, url) == (tmp_path, "http://here/healthz")
        found = next(looks)
        if found.health == "":
            stop.set()
        return found

    words = ["touch", str(tmp_path / "restarted")]
    watch.watch(tmp_path, "http://here/healthz", words, every=0, stop=stop, look=look)
    assert (tmp_path / "restarted").exists()
    assert [text.split(" (")[0] for text in caplog.messages] == [
        "nats-server has stopped storing",
        "nats-server has stopped storing",
        "nats-server stores again",
    ]


@pytest.mark.parametrize("words", [["false"], ["/no/such/program"]])
def test_a_restart_that_fails_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, words: list[str]) -> None:
    stop = threading.Event()

    def look(_store: Path, _url: str) -> Look:
        stop.set()
        return Look(STOPPED, ROOM, "")

    watch.watch(tmp_path, "", words, every=0, stop=stop, look=look)
    assert "nats-server could not be restarted" in caplog.messages[-1]


def test_the_command_line_has_the_role_s_defaults() -> None:
    options = command.parser().parse_args(["watch"])
    assert (options.store, options.health) == ("/var/lib/nats", "http://127.0.0.1:8222/healthz")
    assert " ".join(options.restart) == "systemctl kill --signal=KILL nats-server.service"
    given = command.parser().parse_args(["watch", "--every", "1", "--restart", "sh", "-c", "kill -TERM 1"])
    assert given.restart == ["sh", "-c", "kill -TERM 1"]
