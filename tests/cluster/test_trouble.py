"""What befalls a site's daemon while it works: each is one sentence in its log and in `foedus-site status`, without a
traceback, and nothing is lost."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from foedus_client.config import SiteSettings
from foedus_client.policy import SitePolicy
from foedus_common.clock import SystemClock
from foedus_server.config import Patience
from foedus_simulations.parties import SITE, Party, until
from known_sites import plan_of
from loopback import Federation
from processes import Cluster

NAMES = ("east", "north", "south")
SITE_OF_INTEREST = "south"
POLICY = SitePolicy(require_approval=False, max_epsilon_lifetime=200.0, max_epsilon_per_day=200.0)
DAY_AND_AN_HOUR = 90_000.0

Make = Callable[..., Cluster]


class Elsewhen(SystemClock):
    """This machine's clock, so many seconds ahead."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def now(self) -> float:
        return super().now() + self._seconds


def status(cluster: Cluster, name: str = SITE_OF_INTEREST) -> dict[str, str]:
    return json.loads(cluster.command("status", "--json", of=name).stdout)


def assert_told(cluster: Cluster, fact: str, sentence: str, seconds: float = 60) -> None:
    """The status says so, and the daemon's log does, in one line and without a traceback."""
    until(lambda: bool(re.fullmatch(sentence, status(cluster)[fact])), seconds, f"{fact} being {sentence!r}")
    log = cluster.log(SITE_OF_INTEREST)
    assert re.search(sentence.rpartition("T[0-9:+-]+ ")[2], log)
    assert "Traceback" not in log


# --- A disk that is full ---


@contextmanager
def full(pid: int) -> Iterator[None]:
    """No file of the process may grow beyond a size that its database's log has long passed, and its own log has not:
    as on a disk that is full, writing fails."""
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (16 * 1024, before[1]))
    yield
    resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_the_outbox_is_written_costs_a_retry_and_no_more(
    make_cluster: Make, tmp_path: Path
) -> None:
    three, gate = (
        make_cluster(dict.fromkeys(NAMES, POLICY), patience=Patience(60, 60, retry_seconds=2)),
        tmp_path / "gate",
    )
    with three.running("coordinator", "east", "north"):
        daemon = three.start(SITE_OF_INTEREST, FOEDUS_HOLD=f"0:noised:{gate}")
        agreed = three.submit(plan_of(rounds=2), run_id=1)
        until(gate.with_name("gate.reached").exists, 60, "the vector's being made")
        with full(daemon.pid):
            gate.touch()
            assert_told(
                three,
                "last trouble",
                r"\S+T[0-9:+-]+ .*site\.db could not be written \(\w+\): disk I/O error; make room on its disk\.",
            )
            assert "round 1: declined: " in three.log(SITE_OF_INTEREST)
            assert daemon.poll() is None
        three.await_state(1, "finished")
        until(lambda: three.plan_state(SITE_OF_INTEREST, 1) == "finished", 60, "the site's hearing of the end")
    three.assert_sums_are_exact(agreed)
    assert three.charges(SITE_OF_INTEREST, 1) == [(0, "reserved"), (0, "committed"), (1, "committed")]
    assert three.command("ledger", "--verify", of=SITE_OF_INTEREST).returncode == 0


# --- Clocks ---


def test_a_clock_a_day_behind_is_named_where_certificates_seem_to_be_of_the_future(
    make_cluster: Make, tmp_path: Path
) -> None:
    federation = make_cluster({SITE_OF_INTEREST: POLICY}, clock=Elsewhen(DAY_AND_AN_HOUR))
    federation.start("coordinator", FOEDUS_SKEW=str(DAY_AND_AN_HOUR))
    federation.start(SITE_OF_INTEREST)
    behind = (
        r"The coordinator's certificate is valid from \S+, and this clock says \S+: "
        r"it is at least 24\.0 hours behind the coordinator's; set both by a time server\."
    )
    assert_told(federation, "link", f"refused: {behind}")
    token = federation.operator.registry.invite("west", "West").encode()
    joined = Party(SITE, tmp_path / "west").attempt("join", token)
    assert (joined.returncode, joined.stdout) == (2, "")
    assert re.fullmatch(f"foedus-site: {behind}\n", joined.stderr), joined.stderr


def test_a_clock_a_day_ahead_is_named_where_tokens_seem_to_be_of_the_past(make_cluster: Make, tmp_path: Path) -> None:
    federation = make_cluster({SITE_OF_INTEREST: POLICY}, clock=Elsewhen(-DAY_AND_AN_HOUR))
    federation.start("coordinator", FOEDUS_SKEW=str(-DAY_AND_AN_HOUR))
    federation.start(SITE_OF_INTEREST)
    ahead = r"This clock is 25\.0 hours ahead of the coordinator's; set both by a time server\."
    assert_told(federation, "link", rf"connected: Connected to the coordinator at \S+\. {ahead}")
    token = federation.operator.registry.invite("west", "West").encode()
    joined = Party(SITE, tmp_path / "west").attempt("join", token)
    assert (joined.returncode, joined.stdout) == (2, "")
    assert re.fullmatch(
        r"foedus-site: The token expired at \S+, and this clock says \S+; ask the operator for a new one or, if the "
        r"clock is wrong, set it\.\n",
        joined.stderr,
    )


# --- Another coordinator ---


def test_a_coordinator_of_another_authority_is_refused_by_name(make_cluster: Make, tmp_path: Path) -> None:
    cluster, stranger = make_cluster({SITE_OF_INTEREST: POLICY}), Federation(tmp_path / "stranger")
    stranger.coordinator()
    settings = SiteSettings(coordinator=stranger.address, threads=1, policy=POLICY)
    (cluster.homes[SITE_OF_INTEREST] / "site.toml").write_text(settings.to_toml())
    cluster.start(SITE_OF_INTEREST)
    sentence = r"The coordinator at \S+ shows a certificate that this site's authority did not sign\."
    assert_told(cluster, "link", f"refused: {sentence}")
    stranger.close()
