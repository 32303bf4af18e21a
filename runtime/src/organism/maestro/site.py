# SPDX-FileCopyrightText: 2026 The organism.proxmox authors
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a conductor was told: its settings, the site's policy, and who it is."""

from __future__ import annotations

from dataclasses import dataclass

from organism.core._keyvalue import Settings
from organism.core._limits import Limits as UserLimits
from organism.core._maestro_settings import worker_lease
from organism.core._policy import Policy
from organism.maestro.outcome import Rules
from organism.maestro.shares import Order
from organism.maestro.workers import Limits


@dataclass(frozen=True)
class Site:
    """What this conductor was told."""

    settings: Settings
    policy: Policy
    user_limits: UserLimits
    name: str
    shard: str
    version: str

    def group_of(self, user: str) -> str:
        """The group that the limits file has a user in; empty for none. Nothing that a user says counts."""
        return self.user_limits.members.get(user, "")

    @property
    def limits(self) -> Limits:
        settings = self.settings
        return Limits(
            heartbeat_ttl=settings.number("HEARTBEAT_TTL_SEC"),
            metrics_ttl=settings.number("METRICS_TTL_SEC"),
            lease=worker_lease(settings),
            max_temp=settings.number("MAX_TEMP_C"),
            max_busy=settings.number("MAX_BUSY_PERCENT"),
        )

    @property
    def order(self) -> Order:
        return Order(self.settings.number("AGING_PER_HOUR"), self.settings.number("FAIR_SHARE_HALF_LIFE_SEC"))

    @property
    def rules(self) -> Rules:
        settings = self.settings
        return Rules(
            settings.number("RETRY_BACKOFF_SEC"), settings.number("RETRY_BACKOFF_MAX_SEC"), settings.integer("MAX_LOST")
        )
