"""What the demonstrations are about: who takes part, on which rows, by which plan. `demo` plays one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from foedus_common.errors import LocalError
from foedus_simulations import corpora
from foedus_simulations.corpora import Corpus
from foedus_simulations.reports import Noun

PLANS = Path(__file__).with_name("plans")
SEED = 0
"""Of the rows' draw and of their partition."""


@dataclass(frozen=True)
class Edition:
    """One demonstration. The rows' text and label are in `columns` of every file; `partition` deals them out."""

    title: str
    data: str
    federation: str
    noun: Noun
    sites: tuple[str, str, str]
    dataset: str
    columns: tuple[str, str]
    corpus: Callable[[Path], Corpus]
    partition: str
    plan: Path
    private: bool = True


def edition(data: str, private: bool, small: bool) -> Edition:
    """The demonstration that was asked for. Raises LocalError when there is none such."""
    match data, private, small:
        case "icd", True, False:
            return _hospitals("icd-chapters.toml", train_rows=6_000, held_out_rows=2_000)
        case "icd", True, True:
            return _hospitals("icd-chapters-small.toml", train_rows=1_500, held_out_rows=1_000)
        case "icd", False, False:
            return _hospitals("icd-chapters-without-privacy.toml", train_rows=6_000, held_out_rows=2_000, private=False)
        case "credit", True, False:
            return _branches()
    raise LocalError(
        "There is no such demonstration; there are the plain one, SMALL=1, PRIVACY=off and DATA=credit, one at a time."
    )


def _hospitals(plan: str, train_rows: int, held_out_rows: int, private: bool = True) -> Edition:
    def corpus(cache: Path) -> Corpus:
        return corpora.icd10(cache, SEED, train_rows=train_rows, held_out_rows=held_out_rows)

    return Edition(
        title="Three hospitals fine-tune one adapter: the ICD-10 chapter of a coding term",
        data="Public ICD-10-CM code descriptions (CDC), not patient notes; no 3-character category is in two parts.",
        federation="Three hospitals",
        noun=Noun("hospital", "hospitals"),
        sites=("north", "lakeside", "st-mary"),
        dataset="coding-terms",
        columns=("note", "chapter"),
        corpus=corpus,
        partition="dirichlet:0.5",
        plan=PLANS / plan,
        private=private,
    )


def _branches() -> Edition:
    return Edition(
        title="Three bank branches fine-tune one classifier: good and bad credit risks",
        data="German credit (Statlog, 1994): 600 of its 1,000 loans, as many bad as good ones, written out as text "
        "without sex and origin.",
        federation="Three bank branches",
        noun=Noun("branch", "branches"),
        sites=("harbour", "market", "station"),
        dataset="credit-applications",
        columns=("application", "risk"),
        corpus=lambda cache: corpora.german_credit(cache, SEED),
        partition="iid",
        plan=PLANS / "german-credit.toml",
    )
