"""The coordinator's memory in a round of 3, 10 and 30 sites: vectors wait on disk and are added as they arrive.

`python benchmarks/coordinator_memory.py`: d = 4M coordinates. The coordinator is a process of its own, asked for its
peak over what it was before the round; sites work in this one.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from foedus_common.protocol import messages as m
from foedus_common.protocol.coordinator_session import Awaiting, CoordinatorSession, Opened
from foedus_common.protocol.effects import Send
from foedus_common.protocol.thresholds import Roster
from report import report
from resident import begin_anew, memory
from rounds import Cohort

DIMENSION = 4_000_000
COHORTS = (3, 10, 30)


class Folder:
    """A VectorStore in a folder."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def store(self, words: np.ndarray) -> m.VectorRef:
        ref = m.VectorRef(hashlib.sha256(words).digest(), words.nbytes)
        words.tofile(self._path / ref.digest.hex())
        return ref

    def load(self, ref: m.VectorRef) -> np.ndarray:
        return np.fromfile(self._path / ref.digest.hex(), dtype=np.uint64)


def coordinator(pipe: Connection, config: m.RoundConfig, roster: Roster, folder: Path) -> None:
    """The child: takes events, gives the next requests; in the end its growth."""
    session = CoordinatorSession(config, roster, Folder(folder))
    before = begin_anew()
    state, effects = session.begin()
    while isinstance(state, Awaiting):
        pipe.send((state.sequence, tuple(effect for effect in effects if isinstance(effect, Send))))
        for event in pipe.recv():
            state, more = session.step(state, event)
            effects = more or effects
    assert isinstance(state, Opened), state
    pipe.send((None, memory("VmHWM") - before))


def growth(sites: int) -> float:
    update = np.random.default_rng(0).uniform(-1, 1, DIMENSION)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = Cohort([update] * sites, vectors_of=lambda _: Folder(folder))
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=coordinator, args=(theirs, cohort.config, cohort.roster, folder))
        child.start()
        while True:
            sequence, answer = ours.recv()
            if sequence is None:
                child.join()
                return float(answer)
            ours.send(cohort.answers(sequence, answer))


def main() -> bool:
    megabytes = {sites: growth(sites) for sites in COHORTS}
    vector = 8 * -(-DIMENSION // 3) / 1e6
    print(
        ", ".join(f"{sites} sites {value:.0f} MB" for sites, value in megabytes.items()), f"(a vector: {vector:.0f} MB)"
    )
    claim = f"peak memory of the coordinator with {COHORTS[-1]} sites over that with {COHORTS[0]}, d = 4M"
    return report("coordinator_memory", claim, megabytes[30] / megabytes[3], 1.1, "ratio", at_least=False)


if __name__ == "__main__":
    raise SystemExit(not main())
