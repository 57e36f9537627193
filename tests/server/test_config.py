"""The operator's home: made whole or not at all, private, and strict about what people write into foedus.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography import x509

from foedus_common.clock import DAY, ManualClock
from foedus_common.errors import LocalError
from foedus_common.identity import public_bytes
from foedus_server.config import Home, Link, Settings, create_root_key, home_path, init
from operators import Operator
from seeded import seeded

RANDOM = seeded("config")
ROOT = bytes(range(32))


def made(path: Path, settings: Settings | None = None, root: bytes | None = ROOT) -> Home:
    return init(path, settings or Settings("Test"), root_public_key=root, random=RANDOM, clock=ManualClock())


def rewritten(home: Home, old: str, new: str) -> Home:
    """The home opened after a person replaced some text in its settings."""
    file = home.path / "foedus.toml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return Home.open(home.path)


# --- Where it is ---


def test_the_home_is_the_option_or_the_variable_or_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert home_path(Path("/given"), {"FOEDUS_HOME": "/other"}) == Path("/given")
    assert home_path(None, {"FOEDUS_HOME": "/other"}) == Path("/other")
    assert home_path(None, {"FOEDUS_HOME": ""}) == tmp_path / "foedus-home"
    assert home_path(None, {}) == tmp_path / "foedus-home"


# --- Making one ---


def test_everything_in_a_new_home_is_private(tmp_path: Path) -> None:
    made(tmp_path / "home", root=None)
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "home").iterdir()}
    assert set(modes.values()) == {0o600}
    assert set(modes) == {
        "authority.crt",
        "authority.key",
        "foedus.db",
        "foedus.toml",
        "plan.key",
        "root.key",
        "root.pub",
        "server.key",
    }


def test_a_demonstration_holds_its_root_and_any_other_home_does_not(tmp_path: Path) -> None:
    demonstration, real = made(tmp_path / "demonstration", root=None), made(tmp_path / "real")
    assert demonstration.demonstration
    assert public_bytes(demonstration.root_key()) == demonstration.root_public_key()
    assert not real.demonstration
    assert real.root_public_key() == ROOT
    with pytest.raises(LocalError, match="not on this machine; give its file with --root-key"):
        real.root_key()


def test_the_root_key_is_made_on_its_own_machine(tmp_path: Path) -> None:
    public = create_root_key(tmp_path / "root.key", RANDOM)
    assert (tmp_path / "root.key").stat().st_mode & 0o777 == 0o600
    assert made(tmp_path / "home", root=public).root_public_key() == public
    with pytest.raises(LocalError, match="not overwritten"):
        create_root_key(tmp_path / "root.key", RANDOM)


def test_a_home_is_not_made_over_anything(tmp_path: Path) -> None:
    made(tmp_path / "home")
    before = {path.name: path.read_bytes() for path in (tmp_path / "home").iterdir()}
    with pytest.raises(LocalError, match="exists and is not empty"):
        made(tmp_path / "home")
    (tmp_path / "file").touch()
    with pytest.raises(LocalError, match="exists and is not empty"):
        made(tmp_path / "file")
    assert {path.name: path.read_bytes() for path in (tmp_path / "home").iterdir()} == before


def test_a_home_may_be_made_in_an_empty_folder_and_below_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b"):
        made(path)
        assert Home.open(path).settings == Settings("Test")
        assert path.stat().st_mode & 0o777 == 0o700


def test_a_home_that_cannot_be_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="database"):
        made(tmp_path / "home", Settings("Test", database="oracle17://host/name"))
    assert list(tmp_path.iterdir()) == []


# --- Its settings ---


@pytest.mark.parametrize(
    "settings",
    [
        Settings("Test"),
        Settings(
            'Kliniken "Nord" \\ Süd',
            host="coordinator.example",
            link=Link("0.0.0.0", 1, 65_535),
        ),
    ],
)
def test_settings_survive_their_file(tmp_path: Path, settings: Settings) -> None:
    made(tmp_path / "home", settings)
    assert Home.open(tmp_path / "home").settings == settings


def test_addresses_as_dialled_and_as_bound() -> None:
    settings = Settings("Test", host="2001:db8::1", link=Link(listen="::", port=1, enrolment_port=2))
    assert (settings.link_address, settings.enrolment_address) == ("[2001:db8::1]:1", "[2001:db8::1]:2")
    assert (settings.listen_address, settings.enrolment_listen_address) == ("[::]:1", "[::]:2")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("enrolment_port", "enrollment_port", "unknown key 'enrollment_port'; did you mean 'enrolment_port'?"),
        ("port = 8443", "port = '8443'", "'port' in .* must be a whole number"),
        ("port = 8443", "port = 0", "port is 0; a port is a number from 1 to 65535"),
        ("port = 8443", "port = 8444", "port 8444 is given twice"),
        ('host = "127.0.0.1"', 'host = "two words"', "is no address"),
        ('federation = "Test"', 'federation = ""', "federation's name"),
        ('federation = "Test"', "", "lacks the key 'federation'"),
        ('federation = "Test"', "federation =", "is not valid TOML"),
    ],
)
def test_a_mistake_in_the_settings_is_one_sentence(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(LocalError, match=message):
        rewritten(made(tmp_path / "home"), old, new)


# --- Opening one ---


def test_a_home_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"no Foedus home at .*; `foedus init` makes one"):
        Home.open(tmp_path)


def test_a_home_that_others_can_look_into_is_refused(tmp_path: Path) -> None:
    made(tmp_path / "home").path.chmod(0o750)
    with pytest.raises(LocalError, match="chmod 700"):
        Home.open(tmp_path / "home")


@pytest.mark.parametrize("name", ["authority.key", "plan.key", "root.key", "server.key"])
def test_a_key_that_others_can_read_is_refused(operator: Operator, name: str) -> None:
    (operator.home.path / name).chmod(0o640)
    uses = {
        "authority.key": operator.home.shown_authority,
        "plan.key": operator.home.plan_key,
        "root.key": operator.home.root_key,
        "server.key": lambda: operator.home.tls(operator.random, operator.clock),
    }
    with pytest.raises(LocalError, match=f"chmod 600 .*{name}"):
        uses[name]()


# --- What the link shows ---


def shown(operator: Operator, home: Home | None = None) -> x509.Certificate:
    return x509.load_pem_x509_certificate((home or operator.home).tls(operator.random, operator.clock).certificate)


def test_the_servers_certificate_is_for_the_host_and_the_loopback(operator: Operator) -> None:
    certificate = shown(operator, rewritten(operator.home, 'host = "127.0.0.1"', 'host = "coordinator.example"'))
    certificate.verify_directly_issued_by(operator.home.shown_authority().certificate)
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["coordinator.example", "localhost"]
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]


def test_the_servers_certificate_is_renewed_near_its_end_and_for_a_new_host(operator: Operator) -> None:
    first = shown(operator)
    operator.clock.advance(366 * DAY)
    assert shown(operator) == first
    operator.clock.advance(2 * DAY)
    second = shown(operator)
    assert second.serial_number != first.serial_number
    assert second.public_key() == first.public_key()
    third = shown(operator, rewritten(operator.home, 'host = "127.0.0.1"', 'host = "other.example"'))
    assert third.serial_number != second.serial_number
