"""`foedus-site`, rigged (see `rigged`). With FOEDUS_KNOWN=1 its trainer is `known_sites.KnownTrainer`: no torch."""

from __future__ import annotations

import os
from typing import Any

from foedus_client import cli
from foedus_client.daemon import Daemon
from foedus_client.round import SiteRounds
from foedus_common.plan import AgreedPlan
from foedus_common.randomness import system_random
from known_sites import KnownTrainer
from rigged import pass_through


def rig(name: str) -> None:
    original = getattr(SiteRounds, name)

    def rigged(self: SiteRounds, request: bytes) -> Any:
        pass_through(request)
        return original(self, request)

    setattr(SiteRounds, name, rigged)


def known_trainer(self: Daemon, agreed: AgreedPlan) -> KnownTrainer:
    return KnownTrainer(self._home.path, agreed, system_random)


if __name__ == "__main__":
    rig("invite")
    rig("step")
    if os.environ.get("FOEDUS_KNOWN"):
        Daemon._open_trainer = known_trainer  # type: ignore[assignment,method-assign]
    cli.main()
