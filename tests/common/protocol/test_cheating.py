"""A coordinator that cheats, with c sites that help it.

Failure: it holds t shares of both kinds about one honest site, opens a sum over fewer than m_min sites, or opens two
sums of the same vectors.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from foedus_common.errors import Reason, RemoteError
from foedus_common.protocol import messages as m
from foedus_common.protocol import wire
from foedus_common.protocol.effects import AttemptSeen, Persist, Send, VectorMasked
from foedus_common.protocol.encoding import FieldLayout
from foedus_common.protocol.site_stages import Failed

VICTIM = "site-000"


def answer_of(effects) -> m.FromSite:
    (sent,) = [effect.envelope for effect in effects if isinstance(effect, Send)]
    return wire.parse_envelope(sent).message


def refused(effects) -> bool:
    return answer_of(effects) == m.Declined()


def test_one_site_does_not_list_a_site_as_alive_and_as_dead(federation):
    world = federation(5)
    world.run(until=3)
    site = "site-001"
    world.ask(site, 3, m.Survivors(world.names))
    assert refused(world.ask(site, 4, m.Survivors(tuple(name for name in world.names if name != VICTIM))))
    assert isinstance(world.states[site].stage, Failed)


@pytest.mark.parametrize(
    ("sites", "colluding", "family"), [(4, 1, 1), (5, 1, 1), (5, 0, 0), (6, 1, 1), (6, 1, 2), (7, 1, 3), (7, 2, 3)]
)
def test_two_survivor_sets_are_never_both_unmasked(federation, sites, colluding, family):
    """Every way of showing honest sites one of two sets, while c organisations sign both, the first of them with all
    sites of its family: at most one set gets t shares."""
    world = federation(sites, colluding, organisations={f"site-{sites - 1 - i:03}": "family" for i in range(family)})
    world.run(until=3)
    alive = world.names
    dead = tuple(name for name in world.names if name != VICTIM)
    helping = family + max(0, colluding - 1)
    helpers, honest = world.names[sites - helping :], world.names[: sites - helping]
    statements = {
        which: wire.survivors_statement(world.ctx, world.states[VICTIM].stage.u1, which) for which in (alive, dead)
    }
    start = dict(world.states)
    opened = 0
    for shown in product((alive, dead), repeat=len(honest)):
        world.states = dict(start)
        signatures = {which: {s: world.keys[s].sign(statements[which]) for s in helpers} for which in (alive, dead)}
        for site, which in zip(honest, shown, strict=True):
            answer = answer_of(world.ask(site, 3, m.Survivors(which)))
            if isinstance(answer, m.Consistency):
                signatures[which][site] = answer.signature
        seed_shares, key_shares = len(helpers), len(helpers)
        for site, which in zip(honest, shown, strict=True):
            if isinstance(world.states[site].stage, Failed):
                continue
            agreement = m.Agreement(tuple(sorted(signatures[which].items())))
            answer = answer_of(world.ask(site, 4, agreement))
            if isinstance(answer, m.Unmask):
                share = answer.shares[world.names.index(VICTIM)]
                seed_shares += isinstance(share, m.SelfMaskShare)
                key_shares += isinstance(share, m.PairKeyShare)
        assert min(seed_shares, key_shares) < world.config.threshold
        opened += max(seed_shares, key_shares) >= world.config.threshold
    assert opened  # an honest choice does open


def test_signatures_over_two_sets_cannot_be_mixed(federation):
    world = federation(5)
    world.run(until=3)
    some = world.names[:4]
    signatures = {}
    for site in world.names:
        which = some if site in ("site-000", "site-001") else world.names
        signatures[site] = answer_of(world.ask(site, 3, m.Survivors(which))).signature
    world.ask("site-001", 4, m.Agreement(tuple(signatures.items())))
    assert world.states["site-001"].stage.error.reason is Reason.BAD_SIGNATURE


def test_sites_shown_different_cohorts_do_not_accept_each_other_s_keys(federation):
    world = federation(5)
    smaller = replace(world.config, cohort=world.names[:4], threshold=3)
    answers = {}
    for site in world.names[:4]:
        config = smaller if site == VICTIM else world.config
        effects = world.ask(site, 0, config)
        answers[site] = next(effect.envelope for effect in effects if isinstance(effect, Send))
    world.ask("site-001", 1, m.PeerKeys(tuple(answers.values())))
    assert world.states["site-001"].stage.error.reason is Reason.CONFIG_MISMATCH


def test_sites_shown_different_key_sets_cannot_open_each_other_s_shares(federation):
    world = federation(5)
    keys = world.reach(1)["site-001"].envelopes
    sealed: dict[str, dict[str, bytes]] = {}
    for site in world.names[:4]:
        shown = keys[:4] if site == VICTIM else keys
        answer = answer_of(world.ask(site, 1, m.PeerKeys(shown)))
        peers = [name for name in world.names[: len(shown)] if name != site]
        sealed[site] = dict(zip(peers, answer.sealed, strict=True))
    request = m.PeerShares(tuple((site, sealed[site]["site-001"]) for site in world.names[:4] if site != "site-001"))
    world.ask("site-001", 2, request)
    assert world.states["site-001"].stage.error.reason is Reason.BAD_SHARE


def test_a_coordinator_that_calls_an_attempt_aborted_gets_no_second_sum_of_the_same_vectors(federation):
    """Each site is restarted with what its session told it to keep, and asked for the next attempt."""
    world = federation(4)
    world.run()
    retry = replace(world.config, attempt=1)
    for site in world.names:
        persisted = [e for effects in world.effects[site] for e in effects if isinstance(e, Persist)]
        records = [record for effect in persisted for record in effect.records]
        (masked,) = [record for record in records if isinstance(record, VectorMasked)]
        seen = frozenset(record.attempt for record in records if isinstance(record, AttemptSeen))
        world.alter_outbox(site, attempts_seen=seen, masked_in=masked.attempt)
        for config, reason in ((retry, Reason.VECTOR_REUSED), (world.config, Reason.ROUND_REUSED)):
            world.states[site] = world.sessions[site].begin()
            world.ask(site, 0, config, attempt=config.attempt)
            assert world.states[site].stage.error.reason is reason


@pytest.mark.parametrize("sites", [3, 4, 5])
def test_without_every_mask_a_vector_looks_like_noise(federation, sites):
    """One site's masked vector, even with the self-mask taken off by its owner, is no plain encoding."""
    world = federation(sites, layout=FieldLayout(21, 16, ((2000, 1.0),)))
    world.run(until=3)
    for site in world.names:
        words = world.vectors.load(world.states[site].stage.masked)
        ones = np.unpackbits(words.view(np.uint8)).sum()
        assert abs(int(ones) - words.size * 32) < 5 * (words.size * 16) ** 0.5
        with pytest.raises(RemoteError):
            world.layout.unpack_sum(words, 1)
