"""Bytes that a site sends in a round, counted on the messages of real sessions: the vector, and all that goes with it.

`python benchmarks/wire_bytes.py`: d = 1M coordinates in fields of 21 and of 16 bits; cohorts of 3 to 100 sites. Counted
are the signed envelopes A1 to A5 and the masked vector; not counted is what TLS and gRPC put around them. Sites bear
the longest names that there are, and the run has the largest id.
"""

from __future__ import annotations

import numpy as np

from foedus_common.protocol.encoding import FieldLayout
from report import report
from rounds import play

DIMENSION = 1_000_000
COHORTS = (3, 10, 30, 100)
GOALS = {21: 0.67, 16: 0.50}
FIXED, PER_PEER = 1024, 130


def main() -> bool:
    results = []
    for bits, goal in GOALS.items():
        ratio = FieldLayout(bits, 16, ((DIMENSION, 1.0),)).size / (4 * DIMENSION)
        claim = f"bytes of a masked vector over those of float32, b = {bits}, d = 1M"
        results.append(report(f"wire_bytes_{bits}_bits", claim, round(ratio, 3), goal, at_least=False))
    total = {}
    for sites in COHORTS:
        sent = play(np.zeros((sites, 8))).sent
        total[sites] = sum(map(len, sent))
        print(f"{sites} sites: {total[sites]:,} bytes besides the vector: {[len(envelope) for envelope in sent]}")
    least, most = COHORTS[0], COHORTS[-1]
    by_peer = (total[most] - total[least]) / (most - least)
    results += [
        report(
            "wire_bytes_by_peer", "bytes that a site sends for each peer", by_peer, PER_PEER, "bytes", at_least=False
        ),
        report(
            "wire_bytes_fixed",
            "bytes of a site's five envelopes, besides vector and what each peer adds",
            total[least] - (least - 1) * by_peer,
            FIXED,
            "bytes",
            at_least=False,
        ),
    ]
    return all(results)


if __name__ == "__main__":
    raise SystemExit(not main())
