"""What a run reached, as one record of figures: a demonstration's or a simulation's. Written as `report.json`.

Knows figures only. Where they came from (ledgers, stores, simulations) is the business of who fills the record;
`report_screen` shows it on a terminal, `report_page` in a browser.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foedus_server.release.evaluation import Example

FEW = 12
"""Up to so many sites are shown one by one."""


@dataclass(frozen=True)
class Noun:
    """What the sites are called."""

    one: str
    many: str


@dataclass(frozen=True)
class Site:
    """One site: what it holds, what its own ledger says of the run, and what it reached without the others."""

    name: str
    rows: int  # for training
    epsilon: float | None  # epsilon_local spent over the run; None without differential privacy
    epsilon_central: float | None
    releases_without_privacy: int = 0
    accuracy_alone: float | None = None  # its own rows only; simulated, charged to nobody; None if it was not asked for


@dataclass(frozen=True)
class Round:
    """One round of the run, numbered from 1."""

    number: int
    phase: str  # "head" or "adapter"
    accuracy: float  # of the adapter that the round made, on the held-out rows
    epsilon: float | None  # epsilon_local of everything released up to and with this round, at any one site
    bytes_up: int  # per site
    bytes_down: int  # per site
    epsilon_central: float | None


@dataclass(frozen=True)
class Report:
    """Everything that is shown. Accuracies are shares of the held-out rows, all of the same rows."""

    kind: str  # "demonstration" or "simulation"
    title: str
    data: str  # one sentence: what the rows are, and what they are not
    model: str
    labels: int
    noun: Noun
    rows_held_out: int
    commonest: float  # what always saying the held-out rows' commonest label would reach
    sites: tuple[Site, ...]
    rounds: tuple[Round, ...]
    epsilon_budget: float | None  # None without differential privacy
    delta: float | None
    seconds_total: float
    seconds_by_stage: Mapping[str, float]
    parameters: int  # numbers trained
    secure_aggregation: bool
    accuracy_central: float | None = None  # all rows in one place; None if it was not asked for
    compared: str = ""  # how "alone" and "central" were trained, in sentences
    examples: tuple[Example, ...] = ()
    adapter: Path | None = None
    notes: tuple[str, ...] = ()  # sentences that a reader must know before believing the figures
    unit: str = "record"  # whose privacy the epsilons bound: "record" or "site"
    about_epsilons: str = ""  # why the two of them differ, or do not

    @property
    def private(self) -> bool:
        return self.epsilon_budget is not None

    @property
    def bound_by_central(self) -> bool:
        """Whether the budget is that of epsilon_central: a record's does not rest on secure sums, a site's has to."""
        return self.unit == "site"

    @property
    def central_is_smaller(self) -> bool:
        return any((site.epsilon_central or 0.0) < (site.epsilon or 0.0) for site in self.sites)

    @property
    def accuracy_together(self) -> float:
        """Of the adapter that the run ended with."""
        return self.rounds[-1].accuracy

    @property
    def alone(self) -> tuple[float, ...]:
        """What each site reached alone, as far as it was asked for."""
        return tuple(site.accuracy_alone for site in self.sites if site.accuracy_alone is not None)

    @property
    def mean_alone(self) -> float | None:
        return sum(self.alone) / len(self.alone) if self.alone else None

    @property
    def shown_alone(self) -> tuple[tuple[str, str, float], ...]:
        """(name, detail, accuracy) of the sites alone: each one, or of many the best, the mean and the worst."""
        if len(self.alone) <= FEW:
            with_alone = [(site, site.accuracy_alone) for site in self.sites if site.accuracy_alone is not None]
            return tuple((f"{site.name} alone", f"{site.rows:,} rows", accuracy) for site, accuracy in with_alone)
        mean = sum(self.alone) / len(self.alone)
        of = f"of {len(self.alone)} {self.noun.many}"
        return (("best alone", of, max(self.alone)), ("mean alone", of, mean), ("worst alone", of, min(self.alone)))

    @property
    def spent_locally(self) -> str:
        """epsilon_local spent, by site; of many sites the least and the most."""
        return self._by_site([site.epsilon for site in self.sites])

    @property
    def spent_centrally(self) -> str:
        """The same of epsilon_central."""
        return self._by_site([site.epsilon_central for site in self.sites])

    def _by_site(self, epsilons: Sequence[float | None]) -> str:
        if len(self.sites) <= FEW:
            return ", ".join(f"{site.name} {spent(each)}" for site, each in zip(self.sites, epsilons, strict=True))
        known = [each or 0.0 for each in epsilons]
        return f"{spent(min(known))} to {spent(max(known))} at {len(self.sites)} {self.noun.many}"

    @property
    def mean_bytes_up(self) -> float:
        """Per site and round."""
        return sum(played.bytes_up for played in self.rounds) / len(self.rounds)

    def standard_error(self, accuracy: float) -> float:
        """Of an accuracy measured on the held-out rows, were they independent (binomial)."""
        return math.sqrt(accuracy * (1 - accuracy) / self.rows_held_out)

    @property
    def phases(self) -> tuple[tuple[str, int, int], ...]:
        """(name, first round, last round) of every stretch of rounds that train the same part."""
        found: list[tuple[str, int, int]] = []
        for played in self.rounds:
            if found and found[-1][0] == played.phase:
                found[-1] = (played.phase, found[-1][1], played.number)
            else:
                found.append((played.phase, played.number, played.number))
        return tuple(found)


def figures(report: Report) -> dict[str, Any]:
    """The figures that other programs compare. Without differential privacy every epsilon, and delta, is null."""
    return {
        "accuracy_together": report.accuracy_together,
        "accuracy_alone": list(report.alone),
        "accuracy_central": report.accuracy_central,
        "accuracy_of_commonest_label": report.commonest,
        "accuracy_by_round": [played.accuracy for played in report.rounds],
        "rows": {site.name: site.rows for site in report.sites},
        "rows_held_out": report.rows_held_out,
        "privacy": report.unit if report.private else "none",
        "epsilon_local": [site.epsilon for site in report.sites],
        "epsilon_central": [site.epsilon_central for site in report.sites],
        "epsilon_budget": report.epsilon_budget,
        "about_epsilons": report.about_epsilons,
        "delta": report.delta,
        "releases_without_privacy": [site.releases_without_privacy for site in report.sites],
        "rounds": len(report.rounds),
        "seconds_total": report.seconds_total,
        "seconds_by_stage": dict(report.seconds_by_stage),
        "bytes_up_per_site_per_round": round(report.mean_bytes_up),
        "parameters": report.parameters,
        "secure_aggregation": report.secure_aggregation,
        "adapter": None if report.adapter is None else str(report.adapter),
    }


def write_json(report: Report, path: Path) -> None:
    """`report.json`."""
    path.write_text(json.dumps(figures(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_rounds(report: Report, path: Path) -> None:
    """`rounds.csv`: one line a round."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        heads = ("round", "phase", "accuracy", "epsilon_local", "epsilon_central", "bytes_up", "bytes_down")
        writer.writerow(heads)
        for played in report.rounds:
            epsilons = ("" if each is None else each for each in (played.epsilon, played.epsilon_central))
            traffic = (played.bytes_up, played.bytes_down)
            writer.writerow((played.number, played.phase, played.accuracy, *epsilons, *traffic))


# Figures as words


def size(count: float) -> str:
    """Bytes for a person, to three digits: 20.6 kB."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """Seconds for a person: 0.42 s, 41 s, 3 min 05 s."""
    if seconds < 59.5:
        return f"{seconds:.2g} s"
    return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"


def tiny(probability: float) -> str:
    """A probability such as delta: 1e-5."""
    return f"{probability:.0e}".replace("e-0", "e-")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def spent(epsilon: float | None) -> str:
    """An epsilon to two digits; "none" without differential privacy."""
    return "none" if epsilon is None else f"{epsilon:.2f}"


def listed(names: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
