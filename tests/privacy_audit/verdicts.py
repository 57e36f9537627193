"""What a check says, as a line of the table that ends the audit, and how p-values become verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALARM_RATE = 1e-6
"""Probability that one audited run of correct noise raises any alarm, divided evenly among its tests."""


@dataclass(frozen=True)
class Verdict:
    """One line: what was measured, within what it has to lie, and whether it does."""

    check: str
    statistic: str
    bound: str
    holds: bool


@dataclass(frozen=True)
class Finding:
    """A test's p-value if the noise is what is stated: uniform on (0, 1), or larger. 0 where no chance is involved."""

    check: str
    statistic: str
    p: float


def worst_of(check: str, p_values: Sequence[float], statistic: str) -> Finding:
    """Several tests as one: the smallest p-value times their number (Bonferroni)."""
    return Finding(check, statistic, min(1.0, min(p_values, default=1.0) * len(p_values)))


def level(findings: Sequence[Finding]) -> float:
    """The p-value below which one of these tests is an alarm."""
    return ALARM_RATE / len(findings)


def alarms(findings: Sequence[Finding]) -> list[str]:
    """The checks that found something."""
    return [finding.check for finding in findings if finding.p < level(findings)]


def verdicts(findings: Sequence[Finding]) -> list[Verdict]:
    limit = level(findings)
    return [
        Verdict(each.check, f"{each.statistic}, p = {each.p:.2g}", f"p >= {limit:.0e}", each.p >= limit)
        for each in findings
    ]


def summary(check: str, findings: Sequence[Finding]) -> Verdict:
    """All tests of a run as one line."""
    smallest = min(findings, key=lambda each: each.p)
    said = f"{len(findings)} tests, smallest p = {smallest.p:.2g}"
    return Verdict(check, said, f"p >= {level(findings):.0e}", not alarms(findings))


def fault_found(name: str, found: Sequence[str]) -> Verdict:
    """found: what noticed the fault."""
    return Verdict(f"fault: {name}", f"found by {len(found)}" + (f": {found[0]}" if found else ""), ">= 1", bool(found))
