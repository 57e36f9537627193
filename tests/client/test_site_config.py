"""A site's home: strict settings, private files, one daemon.

A failure means that a typing mistake in the policy goes unnoticed, or that two daemons share one ledger's home.
"""

from __future__ import annotations

import fcntl
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from foedus_client import config
from foedus_client.config import SiteHome, SiteSettings, home_path
from foedus_client.policy import SitePolicy
from foedus_common.errors import LocalError

HOLD = """
import sys
from contextlib import ExitStack
from pathlib import Path
from foedus_client.config import SiteHome

with SiteHome.open(Path(sys.argv[1])).daemon_lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_home_is_named_by_option_environment_or_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert home_path(Path("/a"), {"FOEDUS_HOME": "/b"}) == Path("/a")
    assert home_path(None, {"FOEDUS_HOME": "/b"}) == Path("/b")
    assert home_path(None, {}) == tmp_path / "foedus-site-home"


def test_a_new_home_is_private_and_has_the_safe_settings(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "home")
    assert home.settings == SiteSettings()
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert stat.S_IMODE((home.path / "site.toml").stat().st_mode) == 0o600
    assert home.database.parent == home.objects.parent == home.path


def test_settings_read_back_as_they_were_written(tmp_path: Path) -> None:
    policy = SitePolicy(
        max_epsilon_per_run=3.0,
        delta=1e-6,
        min_sites=4,
        must_include=('North "Clinic"', "Süd"),
        base_models=("a" * 64,),
        max_rank=8,
        require_approval=False,
        allow_without_privacy=True,
    )
    settings = SiteSettings(
        coordinator="[::1]:8443",
        enrolment="[::1]:8444",
        proxy="http://ada:secret@proxy:3128",
        authorities="ca.pem",
        max_storage_gb=0.5,
        max_trainers=3,
        device="cuda:1",
        dtype="bfloat16",
        base_weights="4bit",
        gradient_checkpointing=True,
        tokens_per_batch=512,
        threads=4,
        niceness=10,
        policy=policy,
    )
    assert SiteHome.create(tmp_path / "home", settings).settings == settings


def test_making_a_home_again_keeps_what_people_wrote(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "home")
    (home.path / "site.toml").write_text("[policy]\nmax_rank = 2\n")
    assert SiteHome.create(home.path).settings == SiteSettings(policy=SitePolicy(max_rank=2))


@pytest.mark.parametrize(
    ("toml", "sentence"),
    [
        ("[policy]\nmax_epsilon_per_rum = 3\n", "did you mean 'max_epsilon_per_run'"),
        ("[polici]\n", "did you mean 'policy'"),
        ('[policy]\nmin_sites = "three"\n', "must be a whole number"),
        ("[policy]\nmin_sites = 2\n", "min_sites must be 3 or more"),
        ('device = "gpu"\n', "none of"),
        ('device = "cuda:x"\n', "none of"),
        ('dtype = "float16"\n', "must be one of"),
        ('coordinator = "here"\n', "write host:port"),
        ('enrolment = "here"\n', "write host:port"),
        ('proxy = "https://proxy:3128"\n', "must read http://host:port"),
        ('base_weights = "8bit"\n', "must be one of"),
        ('base_weights = "bfloat16"\ndtype = "float32"\n', 'set dtype to "auto"'),
        ("tokens_per_batch = -1\n", "0 .as the device allows. or more"),
        ("gradient_checkpointing = 1\n", "must be true or false"),
        ("threads = -1\n", "threads"),
        ("niceness = 20\n", "niceness"),
        ("max_storage_gb = 0.0\n", "must be above 0"),
        ("max_trainers = 0\n", "must be 1 or more"),
        ("device = ", "not valid TOML"),
    ],
)
def test_a_mistake_in_the_settings_gets_one_sentence(tmp_path: Path, toml: str, sentence: str) -> None:
    home = SiteHome.create(tmp_path / "home")
    (home.path / "site.toml").write_text(toml)
    with pytest.raises(LocalError, match=sentence):
        SiteHome.open(home.path)


def test_a_home_that_is_not_there_or_not_private_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"no site home at .*foedus-site join"):
        SiteHome.open(tmp_path / "home")
    home = SiteHome.create(tmp_path / "home")
    home.path.chmod(0o755)
    with pytest.raises(LocalError, match="chmod 700"):
        SiteHome.open(home.path)


def test_two_daemons_on_one_home_are_refused(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "home")
    other = SiteHome.create(tmp_path / "other")

    def enter() -> None:
        with home.daemon_lock():
            pass

    with home.daemon_lock(), other.daemon_lock(), pytest.raises(LocalError, match=r"running on .* already"):
        enter()
    enter()


def test_who_looks_whether_a_daemon_runs_keeps_none_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, looking = SiteHome.create(tmp_path / "home"), ExitStack()
    assert not home.daemon_runs()
    fcntl.flock(looking.enter_context(home._lock_file()), fcntl.LOCK_SH)
    assert not home.daemon_runs()  # two that look are in nobody's way
    monkeypatch.setattr(config, "_instant", looking.close)
    with home.daemon_lock():
        assert home.daemon_runs()


def test_a_daemon_that_was_killed_holds_no_lock(tmp_path: Path) -> None:
    home = SiteHome.create(tmp_path / "home")

    def enter() -> None:
        with home.daemon_lock():
            pass

    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"held\n"
        with pytest.raises(LocalError, match="already"):
            enter()
        daemon.kill()
        daemon.wait()
    enter()
