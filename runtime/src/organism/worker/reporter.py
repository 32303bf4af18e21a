# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""Reports: asked again and again until the conductor has stored one, or does not want it."""

from __future__ import annotations

import asyncio
import logging

from organism.bus import messages
from organism.bus.errors import BusError
from organism.bus.messages import Report, ReportReply
from organism.core import _bus
from organism.worker.bus import Bus, Complaint

log = logging.getLogger(__name__)

TIMEOUT = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0


class Reporter:
    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._silence = Complaint("no conductor takes reports")

    async def deliver(self, report: Report) -> ReportReply:
        """The conductor's final word on a report; waits for a conductor as long as it takes."""
        subject = _bus.done_subject(report.gpu_id) if succeeded(report) else _bus.err_subject(report.gpu_id)
        payload = messages.encode(report)
        pause = FIRST_PAUSE
        while True:
            try:
                answer = await self._bus.ask(subject, payload, timeout=TIMEOUT)
                reply = messages.decode(answer.data, ReportReply)
            except (BusError, messages.BadMessage) as error:
                self._silence.note(error)
            else:
                self._silence.over()
                if reply.verdict != "retry":
                    return reply
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)


def succeeded(report: Report) -> bool:
    return report.returncode == 0 and report.error is None
