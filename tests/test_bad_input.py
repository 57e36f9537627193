"""What cannot be is refused in one clear sentence on standard error, with exit code 2, and nothing is lost by trying.

One table for both programs. Every case is typed as a person would type it, in a federation of three sites that have
joined; afterwards both databases say exactly what they said before. What only a run can bring about is in
`tests/server/test_runs.py`, what only real processes can in `tests/cluster`.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from foedus_client.cli import site as site_cli
from foedus_client.config import SiteHome, SiteSettings
from foedus_client.link import site_link as link
from foedus_client.store import SiteStore
from foedus_common.clock import SystemClock
from foedus_common.model_folder import manifest_sha256
from foedus_server.cli import operator as operator_cli
from foedus_server.config import Link, Settings
from foedus_simulations.parties import OPERATOR, SITE, Party, free_ports
from known_sites import join_site, write_rows
from operators import Applicant, Operator
from plans import agreed_plan, plan_toml
from programs import Program
from tiny_model import model_folder, rows, write_tiny_model

CLOCK = SystemClock()
NAMES = ("north", "east", "south")


@dataclass
class World:
    """An operator's home, three sites that have joined, and a folder with what people hand to the programs."""

    folder: Path
    operator: Operator
    token: str = ""

    @property
    def site(self) -> Path:
        return self.folder / NAMES[0]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    def file(self, name: str, text: str) -> str:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    def plan(self, **changes: Any) -> str:
        """A plan's file, right but for `changes` (as in `plans.plan_table`)."""
        return self.file("plan.toml", plan_toml(**{"model__sha256": manifest_sha256(self.model), **changes}))

    def proposed(self, run_id: int, noise: tuple[float, ...] = (13.1, 1.0), **changes: Any) -> str:
        """A plan that arrived at the site, with these noise multipliers; the run's number."""
        agreed = replace(agreed_plan(**changes), run_id=run_id)
        if agreed.plan.privacy.on:
            agreed = replace(agreed, noise_multipliers=noise)
        with closing(SiteStore(self.site / "site.db", CLOCK)) as store:
            store.put_plan(agreed.digest(), run_id, agreed.canonical(), b"s" * 64)
        return str(run_id)

    def says(self) -> tuple[Any, ...]:
        """Everything that must not change by being refused."""
        with closing(SiteStore(self.site / "site.db", CLOCK)) as store:
            plans = [(plan.run_id, plan.state) for plan in store.plans()]
            ours = (store.ledger_end(), store.models(), store.datasets(), plans)
        return *ours, [entry.head for entry in self.operator.store.database.entries()]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    port, enrolment = free_ports(2)
    settings = Settings("Test", link=Link(port=port, enrolment_port=enrolment))
    world = World(folder, Operator(folder / "operator", CLOCK, settings))
    for number, name in enumerate(NAMES):
        SiteHome.create(folder / name)
        join_site(world.operator, folder / name, name, CLOCK, rows(12 + number))
    model_folder(world.model)
    yield world
    world.operator.close()


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


# --- The operator's program ---

Words = Callable[[World], list[str]]

FOR_THE_OPERATOR: dict[str, tuple[Words, str]] = {
    "unknown plan key": (
        lambda w: ["plan", "check", w.plan(privacy__epsilom=1.0)],
        r"'privacy' in the plan plan\.toml has an unknown key 'epsilom'; did you mean 'epsilon'\?",
    ),
    "unknown task": (
        lambda w: ["run", "submit", w.plan(task__kind="text-classifikation")],
        r"'kind' in .* is 'text-classifikation', but must be one of 'text-classification'; did you mean .*\?",
    ),
    "wrong type": (
        lambda w: ["run", "submit", w.plan(task__labels="Eye")],
        r"'labels' in .* must be a list, not 'Eye'\.",
    ),
    "text for a number": (
        lambda w: ["run", "submit", w.plan(adapter__rank="four")],
        r"'rank' in .* must be a whole number, not 'four'\.",
    ),
    "one label": (
        lambda w: ["run", "submit", w.plan(task__labels=["Eye"])],
        r"The plan 'icd-chapters' needs at least two different labels in \[task\] labels\.",
    ),
    "a purpose that paints the terminal": (
        lambda w: ["run", "submit", w.plan(run__purpose="\x1b[2J")],
        r"The plan 'icd-chapters' must have 1 to 1000 printable characters in \[run\] purpose\.",
    ),
    "epochs under DP": (
        lambda w: ["run", "submit", w.plan(phase__0__epochs=1.0)],
        r"The plan 'icd-chapters' gives epochs, which .* DP does not have; give steps and .*\. \(phase 1\)",
    ),
    "a sum of two": (
        lambda w: ["run", "submit", w.plan(secure_aggregation__min_sites=2)],
        r"The plan 'icd-chapters' must have 3 <= min_sites .*; the sum of two reveals the other\.",
    ),
    "no plan": (
        lambda w: ["plan", "check", "nowhere.toml"],
        r"nowhere\.toml does not exist; give the path of a TOML file\.",
    ),
    "not TOML": (
        lambda w: ["plan", "check", w.file("not.toml", "run = {")],
        r".*not\.toml is not valid TOML: .*",
    ),
    "wrong model hash": (
        lambda w: ["run", "submit", w.plan(model__sha256="b" * 64)],
        r"No model with the manifest bbbbbbbbbbbb… was added here; `foedus model add FOLDER` adds it, and .*\.",
    ),
    "model without safetensors": (
        lambda w: ["model", "add", str(Path(w.file("bare/config.json", "{}")).parent)],
        r".*bare has no \.safetensors file; convert the model's weights to safetensors first\.",
    ),
    "model with pickled weights": (
        lambda w: ["model", "add", str(Path(w.file("pickled/pytorch_model.bin", "")).parent)],
        r"The model folder holds pytorch_model\.bin, which could carry code; keep safetensors, JSON and text only\.",
    ),
    "no model folder": (lambda w: ["model", "add", "nowhere"], r"nowhere is not a folder; give the folder .*\."),
    "a home over a home": (
        lambda w: ["init", "--demonstration"],
        r".*operator exists and is not empty; choose another .*\.",
    ),
    "an unknown run": (lambda w: ["run", "show", "nothing"], r"There is no run 'nothing'; see `foedus run list`\."),
    "a bad name for a site": (
        lambda w: ["site", "invite", "North!", "--org", "North"],
        r"'North!' is no site name; use 1 to 40 small letters, digits and dashes\.",
    ),
    "a member invited again": (
        lambda w: ["site", "invite", "north", "--org", "North"],
        r"north is a member already; `foedus site rotate north` lets it make new keys\.",
    ),
    "approving nobody": (lambda w: ["site", "approve", "north"], r"north has no key that waits; .*"),
    "revoking nobody": (lambda w: ["site", "revoke", "nobody"], r"There is no site 'nobody'; see `foedus site list`\."),
    "a site's home": (
        lambda w: ["--home", str(w.site), "run", "list"],
        r"There is no Foedus home at .*north; `foedus init` makes one, --home names another\.",
    ),
    "a file for a home": (
        lambda w: ["--home", w.file("file", ""), "run", "list"],
        r"There is no Foedus home at .*file; `foedus init` makes one, --home names another\.",
    ),
}

# --- The site's program ---

FOR_THE_SITE: dict[str, tuple[Words, str]] = {
    "missing column": (
        lambda w: ["data", "add", "more", w.file("a.csv", "text,chapter\neye,Eye\n")],
        r"a\.csv has no column 'label'; .*",
    ),
    "empty file": (
        lambda w: ["data", "add", "more", w.file("empty.csv", "")],
        r"empty\.csv is empty; its first line must name the columns\.",
    ),
    "no rows": (lambda w: ["data", "add", "more", w.file("bare.csv", "text,label\n")], r"bare\.csv has no rows\."),
    "NaN": (
        lambda w: ["data", "add", "more", w.file("nan.csv", "text,label\neye,Eye\nNaN,Ear\n")],
        r"Row 2 of nan\.csv has NaN in column 'text'; fill it or leave the row out\.",
    ),
    "NaN in JSON": (
        lambda w: ["data", "add", "more", w.file("nan.jsonl", '{"text": "eye", "label": NaN}\n')],
        r"Row 1 of nan\.jsonl has NaN in column 'label'; fill it or leave the row out\.",
    ),
    "an empty label": (
        lambda w: ["data", "add", "more", w.file("gap.csv", "text,label\neye, \n")],
        r"Row 1 of gap\.csv is empty in column 'label'; fill it or leave the row out\.",
    ),
    "a number for a text": (
        lambda w: ["data", "add", "more", w.file("number.jsonl", '{"text": 7, "label": "Eye"}\n')],
        r"Row 1 of number\.jsonl has something other than text in column 'text'\.",
    ),
    "a list for a label": (
        lambda w: ["data", "add", "more", w.file("list.jsonl", '{"text": "eye", "label": ["Eye"]}\n')],
        r"Row 1 of list\.jsonl has a label in column 'label' that is neither text nor a whole number\.",
    ),
    "no file": (lambda w: ["data", "add", "more", "nowhere.csv"], r".*nowhere\.csv cannot be read: No such file .*\."),
    "a folder for a file": (
        lambda w: ["data", "add", "more", str(Path(w.file("folder.csv/file", "")).parent)],
        r".*folder\.csv cannot be read: Is a directory\.",
    ),
    "an unknown format": (
        lambda w: ["data", "add", "more", w.file("rows.xlsx", "")],
        r"rows\.xlsx is of no known format; its name must end in \.csv, .*",
    ),
    "a role that is none": (
        lambda w: ["data", "add", "more", w.file("b.csv", "text,label\neye,Eye\n"), "--column", "note"],
        r"--column 'note' is neither text=COLUMN nor label=COLUMN\.",
    ),
    "the same rows again": (
        lambda w: ["data", "add", "more", str(write_rows(w.folder / "again.csv", rows(12)))],
        r"The same rows were added already, as 'coding-terms'; use that dataset\.",
    ),
    "a name that is taken": (
        lambda w: ["data", "add", "coding-terms", w.file("c.csv", "text,label\nelbow,Eye\n")],
        r"A dataset named 'coding-terms' exists already; choose another name\.",
    ),
    "model without safetensors": (
        lambda w: ["model", "add", str(Path(w.file("bare/config.json", "{}")).parent)],
        r".*bare has no \.safetensors file; .*",
    ),
    "label not in the plan": (
        lambda w: ["approve", w.proposed(1, task__labels=["Eye", "Ear"])],
        r"Dataset 'coding-terms' has 4 rows whose label is not among the plan's labels\.",
    ),
    "plan above the cap": (
        lambda w: ["approve", w.proposed(2, noise=(1.0, 0.5), privacy__epsilon=90.0)],
        r"The plan can spend epsilon [0-9.]+ at delta 1e-05, and \[policy\] max_epsilon_per_run is 8\. "
        r"The run could spend epsilon [0-9.]+ of dataset 'coding-terms', which has spent or reserved 0, and .*\.",
    ),
    "rank above policy": (
        lambda w: ["approve", w.proposed(3, adapter__rank=65)],
        r"The plan's adapter has rank 65, and \[policy\] max_rank is 64\.",
    ),
    "without privacy": (
        lambda w: ["approve", w.proposed(4, privacy={"unit": "none"}, phase=[WITHOUT_DP])],
        r"The plan turns differential privacy off, and \[policy\] allow_without_privacy is false\.",
    ),
    "wrong model hash": (
        lambda w: ["approve", w.proposed(5, model__sha256="b" * 64)],
        r"The plan's model bbbbbbbbbbbb is not here; add it with `foedus-site model add`\.",
    ),
    "unknown dataset": (
        lambda w: ["approve", w.proposed(6, data__name="nothing")],
        r"There is no dataset named 'nothing' here; add it with `foedus-site data add`\.",
    ),
    "an unknown plan": (
        lambda w: ["approve", "nothing"],
        r"No plan 'nothing' was received here; `foedus-site plans` .*\.",
    ),
    "damaged token": (
        lambda w: ["join", w.token[:-9]],
        r"The token is incomplete or was altered on the way; paste it whole, or ask for a new one\.",
    ),
    "no token": (
        lambda w: ["join", "token"],
        r"This is no Foedus token; paste the string that begins with 'foedus1-'\.",
    ),
    "another site's token": (
        lambda w: ["join", w.token],
        r"This home is the site north already; use another --home for another site\.",
    ),
    "no home": (
        lambda w: ["--home", "/nowhere", "status"],
        r"There is no site home at /nowhere; `foedus-site join` makes one, --home names another\.",
    ),
    "the operator's home": (
        lambda w: ["--home", str(w.operator.home.path), "status"],
        r"There is no site home at .*operator; `foedus-site join` makes one, --home names another\.",
    ),
}
WITHOUT_DP = {"train": "head", "rounds": 1, "learning_rate": 1.0, "epochs": 1.0, "batch_size": 4}


@pytest.mark.parametrize("case", FOR_THE_OPERATOR)
def test_the_operator_is_told_in_one_sentence(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = FOR_THE_OPERATOR[case]
    assert_refused(Program(operator_cli.main, world.operator.home.path, monkeypatch, capsys), world, words, sentence)


@pytest.mark.parametrize("case", FOR_THE_SITE)
def test_the_site_is_told_in_one_sentence(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, sentence = FOR_THE_SITE[case]
    world.token = world.token or world.operator.registry.invite("west", "West").encode()
    assert_refused(Program(site_cli.main, world.site, monkeypatch, capsys), world, words, sentence)


def assert_refused(program: Program, world: World, words: Words, sentence: str) -> None:
    typed = words(world)
    before = world.says()
    ended = program(*typed)
    assert (ended.code, ended.out) == (2, "")
    name, _, said = ended.err.partition(": ")
    assert name in ("foedus", "foedus-site")
    assert re.fullmatch(sentence, said.removesuffix("\n")), said
    assert world.says() == before


# --- Tokens ---


def test_a_token_is_used_once_and_in_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(link, "enrol", lambda address, authority, body, proxy: world.operator.registry.enrol(body))
    registry = world.operator.registry
    token = registry.invite("used", "Used")
    Applicant(world.operator, token).ask()
    ended = Program(site_cli.main, tmp_path / "used", monkeypatch, capsys)("join", token.encode())
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == (
        "foedus-site: The coordinator refuses this site: The token was used already, by other keys; if that was not "
        "you, tell the operator now.\n"
    )

    late = replace(registry.invite("late", "Late"), expires=int(CLOCK.now()) - 1)
    ended = Program(site_cli.main, tmp_path / "late", monkeypatch, capsys)("join", late.encode())
    assert (ended.code, ended.out) == (2, "")
    assert re.fullmatch(
        r"foedus-site: The token expired at \S+, and this clock says \S+; ask the operator .*\.\n", ended.err
    )


# --- Before there is a roster, and with a model at hand ---


def test_a_run_is_submitted_to_somebody(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Operator(tmp_path / "alone", CLOCK)
    ended = Program(operator_cli.main, alone.home.path, monkeypatch, capsys)("run", "submit", world.plan())
    assert (ended.code, alone.store.runs.all()) == (2, [])
    assert ended.err == "foedus: There is no roster yet; approve the sites and run `foedus roster sign`.\n"
    alone.close()


def test_an_adapter_is_no_larger_than_its_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the child process that prepares a plan knows the model."""
    tiny = write_tiny_model(tmp_path / "tiny")
    foedus = Program(operator_cli.main, world.operator.home.path, monkeypatch, capsys)
    foedus("model", "add", str(tiny))
    plan = world.plan(model__sha256=manifest_sha256(tiny), adapter__rank=17)
    sentence = r"\[adapter\] rank is 17, but \S+ has only 16 dimensions\."
    assert_refused(foedus, world, lambda w: ["run", "submit", plan], sentence)
    assert world.operator.store.runs.all() == []


# --- Programs that keep running ---


def test_a_port_in_use_is_named(world: World) -> None:
    settings = world.operator.home.settings
    with socket.create_server(("127.0.0.1", settings.link.port)):
        quiet = {"GRPC_VERBOSITY": "NONE"}  # Flower, imported by other tests, has set another one in this process
        ended = Party(OPERATOR, world.operator.home.path, quiet).attempt("up", "--json")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"foedus: Cannot listen on 127.0.0.1:{settings.link.port}: the port is in use or the address is not of this "
        "machine; stop the other program or choose another port.\n"
    )


def test_one_daemon_works_on_a_home(world: World) -> None:
    with SiteHome.open(world.site).daemon_lock():
        ended = Party(SITE, world.site).attempt("run")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        f"foedus-site: A daemon is running on {world.site} already; stop it first, or use another --home.\n"
    )


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ('device = "gpu"', r"The device 'gpu' is none of \"auto\", \"cpu\" and \"cuda:0\"\."),
        ("thread = 1", r".*site\.toml has an unknown key 'thread'; did you mean 'threads'\?"),
        ('threads = "two"', r"'threads' in .*site\.toml must be a whole number, not 'two'\."),
        ("threads = -1", r"The trainer's threads must be 0 or more, .*\."),
        ("[policy]\nmin_sites = 2", r"\[policy\] min_sites must be 3 or more: .*"),
        ("[policy]\nmax_epsilon_per_run = nan", r"\[policy\] max_epsilon_per_run, .* must be above 0\."),
        ("[policy", r".*site\.toml is not valid TOML: .*"),
    ],
)
def test_wrong_settings_are_named(
    world: World, wrong: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    east = Program(site_cli.main, world.folder / "east", monkeypatch, capsys)
    (east.home / "site.toml").write_text(wrong)
    assert_refused(east, world, lambda w: ["run"], sentence)
    (east.home / "site.toml").write_text(SiteSettings().to_toml())
