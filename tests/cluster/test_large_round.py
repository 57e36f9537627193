"""An honest round of more sites than share a sum, over the real link, with the sizes of a release.

137 sites and their coordinator, composed as in production but for the trainers: each site has its home, its database,
its keys and its certificate. They are in one process, for so many would need the memory of a larger machine.
A site is lost when its program fails, of which the coordinator hears at once: nothing here waits for a deadline.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from foedus_client.config import SiteHome, SiteSettings
from foedus_client.policy import SitePolicy
from foedus_common.clock import SystemClock
from foedus_common.errors import LocalError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.draw import cohort_sizes
from foedus_server.config import Link, Patience, Settings
from foedus_server.service import Service
from foedus_simulations.parties import free_ports, until
from known_sites import KnownDaemon, assert_sums_are_exact, join_site, plan_of, submit
from operators import Operator
from processes import charges_of
from tiny_model import rows

CLOCK, RUN = SystemClock(), 7
SITES = tuple(f"site-{number:03}" for number in range(137))
SPOILERS = SITES[:7]
"""Each keeps back what it committed to in one attempt, the first in the first and so on; six attempts may fail."""
LOST: Mapping[str, type[m.ToSite]] = dict(
    zip(SITES[7:], (m.Draw, m.DrawnConfig, m.PeerKeys, m.PeerShares, m.Survivors, m.Agreement), strict=False)
)
"""One at each other stage, by the request that its program fails at: D1, and A1 to A5."""
DRAWN = tuple(sorted({*SITES[7:]} - {SITES[7]}))
SUMMED = tuple(site for site in DRAWN if LOST.get(site) not in (m.DrawnConfig, m.PeerKeys, m.PeerShares))
POLICY = SitePolicy(require_approval=False, max_epsilon_lifetime=200.0, max_epsilon_per_day=200.0)


class FrailDaemon(KnownDaemon):
    """A site whose program may fail at a request of D1 to A5. `cohorts`: those that any site was told, by attempt."""

    cohorts: ClassVar[defaultdict[int, set[tuple[str, ...]]]] = defaultdict(set)

    def start(self) -> None:
        self._sound_step = self._rounds.step
        self._rounds.step = self._step  # type: ignore[method-assign]
        super().start()

    def _step(self, request: bytes) -> bytes:
        envelope = wire.parse_envelope(request)
        attempt, message = envelope.header.attempt, envelope.message
        if isinstance(message, m.DrawnConfig):
            self.cohorts[attempt].add(message.config.cohort)
        spoils = isinstance(message, m.Commitments) and SPOILERS[attempt : attempt + 1] == (self.name,)
        if spoils or isinstance(message, LOST.get(self.name, ())):
            raise LocalError("The disk is full.")
        return self._sound_step(request)


@pytest.mark.timeout(900)  # half a minute of CPU time, which a busy machine spreads
def test_a_round_above_128_sites_opens_the_exact_sum_of_whoever_is_left(tmp_path: Path) -> None:
    """Seven draws are spoilt by one site each, and repeated without it; then one site is lost at every stage."""
    port, enrolment = free_ports(2)
    settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment), patience=Patience(stage_seconds=120.0))
    operator = Operator(tmp_path / "operator", CLOCK, settings)
    for name in SITES:
        SiteHome.create(tmp_path / name, SiteSettings(threads=1, policy=POLICY))
        join_site(operator, tmp_path / name, name, CLOCK, rows(20))
    service, stopping = Service(operator.home, CLOCK, os.urandom), threading.Event()
    service.start()
    serving = threading.Thread(target=service.serve, args=(stopping,))
    serving.start()
    daemons = [FrailDaemon(SiteHome.open(tmp_path / name), tmp_path / "state", CLOCK, os.urandom) for name in SITES]
    try:
        for daemon in daemons:
            daemon.start()
        until(lambda: len(service.link.connected()) == len(SITES), 300, "every site's connecting")
        sizes = {"secure_aggregation__min_sites": 100, "secure_aggregation__max_sites": 300}
        _, agreed = submit(
            operator.home, operator.store, plan_of(1, **sizes, run__deadline_minutes=5, run__approval_hours=1), RUN
        )
        until(lambda: operator.store.runs.run(RUN).state in ("finished", "failed"), 500, "the end of the run")
        assert operator.store.runs.run(RUN).reason is None
    finally:
        for daemon in daemons:
            daemon.stop()
        stopping.set()
        serving.join()
        service.stop(1.0)

    attempts = [(each.attempt, each.state) for each in operator.store.runs.attempts(RUN)]
    assert attempts == [*((number, "aborted") for number in range(len(SPOILERS))), (len(SPOILERS), "committed")]
    assert _is_a_split_of(DRAWN, list(FrailDaemon.cohorts.pop(len(SPOILERS))))
    assert not FrailDaemon.cohorts  # no cohort is named before a draw has ended
    [committed] = operator.store.runs.committed(RUN)
    assert committed.survivors == SUMMED
    assert_sums_are_exact(operator, {name: tmp_path / name for name in SITES}, agreed)
    assert charges_of(tmp_path / SITES[-1], RUN) == [(0, "committed")]  # nobody had to train again
    operator.close()


def _is_a_split_of(sites: Sequence[str], cohorts: Sequence[tuple[str, ...]]) -> bool:
    sizes = sorted(map(len, cohorts), reverse=True)
    return tuple(sizes) == cohort_sizes(len(sites)) and sorted(sum(cohorts, ())) == sorted(sites)
