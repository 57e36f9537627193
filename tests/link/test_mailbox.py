"""Who is asked what, again, and whose answer counts: the coordinator's bookkeeping without any network."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foedus_common.clock import ManualClock
from foedus_common.errors import LocalError, RemoteError
from foedus_common.link import foedus_pb2 as pb
from foedus_common.objects import ObjectRef, ObjectStore
from foedus_server.link.mailbox import Mailbox, RunFiles

NOW = 1_800_000_000.0


class Stream:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def deliver(self, request: pb.Request) -> None:
        self.sent.append(request.id)


def request(key: str, ttl: float = 60.0, run_id: int = 7) -> pb.Request:
    return pb.Request(id=key, run_id=run_id, created_at=NOW, ttl=ttl)


def test_a_site_that_is_away_is_asked_when_it_comes_in_order() -> None:
    mailbox, stream = Mailbox(ManualClock(NOW)), Stream()
    mailbox.post("alpha", request("1"))
    mailbox.post("beta", request("2"))
    mailbox.post("alpha", request("3"))
    mailbox.connect("alpha", stream)
    mailbox.post("alpha", request("4"))
    assert stream.sent == ["1", "3", "4"]


def test_a_site_that_comes_back_is_asked_again_only_what_it_left_open() -> None:
    mailbox, again = Mailbox(ManualClock(NOW)), Stream()
    mailbox.connect("alpha", Stream())
    for key in "1234":
        mailbox.post("alpha", request(key))
    assert mailbox.answer("alpha", pb.Reply(id="2"))
    mailbox.forget(["3"])
    mailbox.connect("alpha", again)
    assert again.sent == ["1", "4"]


def test_an_expired_request_is_not_repeated_and_its_answer_does_not_count() -> None:
    clock, again = ManualClock(NOW), Stream()
    mailbox = Mailbox(clock)
    mailbox.post("alpha", request("1", ttl=10.0))
    mailbox.post("alpha", request("2", ttl=11.0))
    clock.advance(10.0)
    mailbox.connect("alpha", again)
    assert again.sent == ["2"]
    assert not mailbox.answer("alpha", pb.Reply(id="1"))


def test_only_the_first_answer_of_the_site_that_was_asked_counts() -> None:
    mailbox = Mailbox(ManualClock(NOW))
    mailbox.post("alpha", request("1"))
    assert not mailbox.answer("beta", pb.Reply(id="1", body=b"forged"))
    assert not mailbox.answer("alpha", pb.Reply(id="nobody asked"))
    assert mailbox.answer("alpha", pb.Reply(id="1", body=b"mine"))
    assert not mailbox.answer("alpha", pb.Reply(id="1", body=b"second thoughts"))
    assert [reply.body for reply in mailbox.take(["1", "1", "2"])] == [b"mine"]
    assert mailbox.take(["1"]) == []


def test_the_end_of_an_old_stream_does_not_hang_up_the_new_one() -> None:
    mailbox, old, new = Mailbox(ManualClock(NOW)), Stream(), Stream()
    mailbox.connect("alpha", old)
    mailbox.connect("alpha", new)
    mailbox.disconnect("alpha", old)
    assert mailbox.connected() == {"alpha": NOW}
    mailbox.disconnect("alpha", new)
    assert mailbox.connected() == {}


def test_a_run_is_told_of_its_replies_and_of_every_coming_and_going() -> None:
    mailbox, told, stream = Mailbox(ManualClock(NOW)), [], Stream()
    mailbox.watch(7, lambda: told.append(7))
    mailbox.watch(8, lambda: told.append(8))
    with pytest.raises(LocalError, match="already being driven"):
        mailbox.watch(8, lambda: None)
    mailbox.connect("alpha", stream)
    assert told == [7, 8]
    mailbox.post("alpha", request("1", run_id=8))
    mailbox.answer("alpha", pb.Reply(id="1"))
    assert told == [7, 8, 8]
    mailbox.close(8)
    mailbox.disconnect("alpha", stream)
    assert told == [7, 8, 8, 7]
    assert mailbox.take(["1"]) == []


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("post"), st.sampled_from("abc"), st.integers(0, 9)),
            st.tuples(st.just("answer"), st.sampled_from("abc"), st.integers(0, 9)),
            st.tuples(st.just("reconnect"), st.sampled_from("abc"), st.just(0)),
        ),
        max_size=60,
    )
)
def test_every_request_reaches_its_site_until_it_is_answered(steps: list[tuple[str, str, int]]) -> None:
    """Against a model: what a fresh stream gets is exactly what this site was asked and has not answered."""
    mailbox, unanswered, streams = Mailbox(ManualClock(NOW)), {}, {}
    for number, (step, site, which) in enumerate(steps):
        if step == "post":
            unanswered[str(number)] = site
            mailbox.post(site, request(str(number)))
            if site in streams:
                assert streams[site].sent[-1] == str(number)
        elif step == "answer":
            key = list(unanswered)[which % len(unanswered)] if unanswered else "0"
            counts = unanswered.get(key) == site
            assert mailbox.answer(site, pb.Reply(id=key)) is counts
            if counts:
                del unanswered[key]
        else:
            streams[site] = Stream()
            mailbox.connect(site, streams[site])
            assert streams[site].sent == [key for key, asked in unanswered.items() if asked == site]


def test_a_download_is_for_those_who_were_allowed(tmp_path: Path) -> None:
    files, ref = RunFiles(tmp_path / "7", 100), ObjectRef("0" * 64, 10)
    assert not files.may_download("alpha", ref)
    files.allow(ref, ["alpha"])
    files.allow(ref, ["beta"])
    assert [files.may_download(site, ref) for site in ("alpha", "beta", "gamma")] == [True, True, False]
    files.close()
    assert not files.may_download("alpha", ref)


def test_an_upload_belongs_to_the_site_that_sent_it(tmp_path: Path) -> None:
    files, ref = RunFiles(tmp_path / "7", 100), ObjectStore(tmp_path / "other").put(b"abc")
    files.expect("alpha")
    files.expect("beta")
    with files.receive("alpha", ref) as partial:
        partial.append(b"abc")
        partial.finish()
    assert files.upload("alpha", ref).read_bytes() == b"abc"
    assert files.received("beta", ref) == (0, False)
    for site in ("beta", "gamma"):
        with pytest.raises(RemoteError, match="has not uploaded") as refused:
            files.upload(site, ref)
        assert refused.value.suspects == (site,)
    files.close()
    assert not (tmp_path / "7").exists()


def test_uploads_are_capped_for_each_site_until_they_are_used_up(tmp_path: Path) -> None:
    files, first, second = RunFiles(tmp_path / "7", 100), ObjectRef("1" * 64, 60), ObjectRef("2" * 64, 41)
    files.expect("alpha")
    files.expect("beta")
    with files.receive("alpha", first):
        pass
    with pytest.raises(RemoteError, match="capped at 100 bytes"):
        files.receive("alpha", second)
    with files.receive("beta", second), files.receive("alpha", first):
        pass
    files.discard("alpha", first)
    with files.receive("alpha", second):
        pass
