"""Rounds of 1,000 simulated sites on two cores: cohorts drawn, real cryptography, 30 % of the sites lost in each round.

`python benchmarks/simulated_sites.py [ROUNDS]`: d = 20,000 coordinates. The sites are sessions in two processes, the
coordinator's sessions are in this one. Lost sites are lost where it costs most: they dealt their shares and send no
vector, so that the masks of each with all survivors of its cohort have to be taken off. A round begins with encoding.
Memory is the peak of each round by itself, so that what a round leaves behind would show in the next.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from coordinator_memory import Folder
from foedus_common.protocol import messages as m
from foedus_common.protocol.coordinator_draw import Drawn, DrawSession, DrawState
from foedus_common.protocol.coordinator_session import CoordinatorSession, CoordinatorState, Opened, OpenStage
from foedus_common.protocol.draw import RoundSize
from foedus_common.protocol.effects import Arrived, Deadline, Effects, Erase, Send
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_session import SiteSession
from foedus_common.protocol.site_stages import Outbox
from foedus_common.protocol.thresholds import Member, PeerRule, Roster, thresholds
from report import report
from resident import begin_anew, memory

SITES, LOST, COLLUDING, PROCESSES = 1000, 300, 1, 2
SIZE = RoundSize(SITES, SITES)
LAYOUT = FieldLayout(21, SIZE.largest_sum, ((20_000, 1.0),))
SECONDS = 15 * 60 / 20
"""20 rounds in a quarter of an hour."""
PEAK = "peak"

Session = DrawSession | CoordinatorSession
State = DrawState | CoordinatorState


def terms_of(number: int) -> m.RoundTerms:
    hashes = [bytes(32)] * 3
    return m.RoundTerms(1, number, 0, *hashes, "benchmark", LAYOUT, m.Noise(), SIZE.smallest_sum, COLLUDING)


def update_of(site: str) -> np.ndarray:
    return np.full(LAYOUT.dimension, int(site[-3:]) / SITES)


def simulate(pipe: Connection, roster: Roster, keys: Mapping[str, bytes], folder: Path) -> None:
    """A process of sites: a round's number makes them encode, requests by site are answered, PEAK is answered with that
    of memory since it was last asked for, in MB, and None ends it."""
    signers = {site: Ed25519PrivateKey.from_private_bytes(key).sign for site, key in keys.items()}
    vectors = Folder(folder)
    while (asked := pipe.recv()) is not None:
        if asked == PEAK:
            pipe.send(memory("VmHWM"))
            begin_anew()
            continue
        if isinstance(asked, int):
            terms = terms_of(asked)
            sessions = {}
            for site, sign in signers.items():
                outbox = Outbox(terms, vectors.store(LAYOUT.encode(update_of(site), os.urandom)), charged=True)
                sessions[site] = SiteSession(site, sign, roster, PeerRule(), SIZE, outbox, vectors, os.urandom)
            states = {site: session.begin() for site, session in sessions.items()}
            pipe.send({})
            continue
        answers = {}
        for site, request in asked.items():
            states[site], effects = sessions[site].step(states[site], request)
            (answers[site],) = [effect.envelope for effect in effects if isinstance(effect, Send)]
            for gone in [ref for effect in effects if isinstance(effect, Erase) for ref in effect.objects]:
                (folder / gone.digest.hex()).unlink()
        pipe.send(answers)


class Consortium:
    """The sites, behind their pipes, and what a coordinator knows of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = tuple(f"site-{number:03}" for number in range(SITES))
        keys = {site: os.urandom(32) for site in self.names}
        public = {
            s: Ed25519PrivateKey.from_private_bytes(key).public_key().public_bytes_raw() for s, key in keys.items()
        }
        self.roster = Roster(1, bytes(32), {site: Member(key, f"org of {site}") for site, key in public.items()})
        spawn = multiprocessing.get_context("spawn")
        self.pipes: dict[Connection, frozenset[str]] = {}
        self._processes = []
        for number in range(PROCESSES):
            here, there = spawn.Pipe()
            own = {site: keys[site] for site in self.names[number::PROCESSES]}
            self._processes.append(spawn.Process(target=simulate, args=(there, self.roster, own, folder), daemon=True))
            self._processes[-1].start()
            self.pipes[here] = frozenset(own)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self._processes:
            process.join()

    def begin(self, number: int) -> None:
        for left in self.folder.iterdir():  # vectors of sites that were lost in the round before
            left.unlink()
        for pipe in self.pipes:
            pipe.send(number)
        for pipe in self.pipes:
            pipe.recv()

    def peak(self) -> float:
        """Of the sites' memory since this was last asked, in MB, over their processes."""
        for pipe in self.pipes:
            pipe.send(PEAK)
        return float(sum(pipe.recv() for pipe in self.pipes))

    def ask(self, requests: Mapping[str, bytes]) -> Iterator[Arrived]:
        for pipe, own in self.pipes.items():
            pipe.send({site: request for site, request in requests.items() if site in own})
        for pipe in self.pipes:
            yield from (Arrived(site, answer) for site, answer in pipe.recv().items())

    def play(self, sessions: Sequence[Session], stages: int, lost: frozenset[str] = frozenset()) -> list[State]:
        """The sessions side by side to their ends; `lost` answer nothing from the third stage on."""
        begun = [session.begin() for session in sessions]
        states: list[State] = [state for state, _ in begun]
        requests = [_requests(effects) for _, effects in begun]
        for stage in range(stages):
            whose = {site: number for number, each in enumerate(requests) for site in each}
            asked = {site: envelope for each in requests for site, envelope in each.items()}
            requests = [{} for _ in sessions]
            answers = self.ask({s: envelope for s, envelope in asked.items() if stage < 2 or s not in lost})
            deadlines = ((number, Deadline(stage)) for number in range(len(sessions)))
            for number, event in (*((whose[answer.site], answer) for answer in answers), *deadlines):
                if isinstance(states[number], OpenStage):
                    states[number], effects = sessions[number].step(states[number], event)  # type: ignore[arg-type]
                    requests[number] |= _requests(effects)
        return states

    def round(self, number: int) -> None:
        """One round; each sum that opens is compared with that of its survivors."""
        self.begin(number)
        (drawn,) = self.play([DrawSession(terms_of(number), 0, self.names, SIZE, self.roster)], 2)
        assert isinstance(drawn, Drawn), drawn
        lost = frozenset(Random(number).sample(self.names, LOST))
        opened = self.play([self._session(number, cohort, drawn) for cohort in drawn.cohorts], 5, lost)
        survivors = 0
        for state in opened:
            assert isinstance(state, Opened), state
            expected = sum(update_of(site)[0] for site in state.survivors)
            np.testing.assert_allclose(state.total, expected, atol=len(state.survivors) / LAYOUT.half_range)
            survivors += len(state.survivors)
        assert survivors == SITES - LOST

    def _session(self, number: int, cohort: tuple[str, ...], drawn: Drawn) -> CoordinatorSession:
        limits = thresholds(len(cohort), COLLUDING)
        config = m.RoundConfig(
            m.PROTOCOL_VERSION, terms_of(number), 0, 1, bytes(32), cohort, limits.threshold, limits.minimum
        )
        return CoordinatorSession(config, self.roster, Folder(self.folder), drawn.seeds)


def _requests(effects: Effects) -> dict[str, bytes]:
    return {effect.destination: effect.envelope for effect in effects if isinstance(effect, Send)}


def main(rounds: int) -> None:
    shared = Path("/dev/shm")  # files in memory, where there is such a folder
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        consortium = Consortium(Path(folder))
        start = time.perf_counter()
        for number in range(1, rounds + 1):
            begin_anew()
            consortium.round(number)
            print(
                f"round {number}: {time.perf_counter() - start:.1f} s since the first began, at most "
                f"{memory('VmHWM'):.0f} MB at the coordinator and {consortium.peak():.0f} MB in the sites' processes",
                flush=True,
            )
        seconds = (time.perf_counter() - start) / rounds
        consortium.close()
    sites, own = (resource.getrusage(whose) for whose in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    cpu = [(each.ru_utime + each.ru_stime) / rounds for each in (sites, own)]
    print(f"CPU seconds of a round: {cpu[0]:.1f} of all sites, {cpu[1]:.1f} of the coordinator")
    claim = f"a round of {SITES:,} simulated sites, 30 % lost, d = 20,000, on two cores"
    report("simulated_sites", claim, seconds, SECONDS, "s", at_least=False)


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 1)
