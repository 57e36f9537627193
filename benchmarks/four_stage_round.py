"""One round of four stages over the link: three site processes, mTLS on loopback, bodies as long as real ones.

`python benchmarks/four_stage_round.py`: what the link and Flower's messages cost, with no cryptography and no training.
"""

from __future__ import annotations

import statistics
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from foedus_client.link.site_link import SiteLink
from foedus_common.objects import ObjectStore
from foedus_server.link.grid import SiteGrid
from report import report
from sites import body, connected_sites, reply_with

GOAL_SECONDS = 0.1
SITES = ["alpha", "beta", "gamma"]
STAGES = ["query.keys", "query.shares", "query.mask", "query.unmask"]
WARM_UP, ROUNDS = 20, 300
BODY = bytes(2048)


def echoing(link: SiteLink, objects: ObjectStore) -> ClientApp:
    app = ClientApp()
    for stage in STAGES:

        @app.query(stage.removeprefix("query."))
        def answer(message: Message, context: Context) -> Message:
            return reply_with(body(message), message)

    return app


def one_round(grid: SiteGrid) -> float:
    start = time.perf_counter()
    for stage in STAGES:
        questions = [grid.message(site, stage, BODY, ttl=60.0) for site in SITES]
        assert len(grid.send_and_receive(questions, timeout=60.0)) == len(SITES)
    return time.perf_counter() - start


def main() -> bool:
    with connected_sites(SITES, echoing) as (_, server):
        grid = server.grid(2, 0)
        seconds = [one_round(grid) for _ in range(WARM_UP + ROUNDS)][WARM_UP:]
    median, worst = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    print(f"p50 {median * 1e3:.1f} ms, p99 {worst * 1e3:.1f} ms, {ROUNDS} rounds")
    return report(
        "four_stage_round",
        "p50 of a four-stage round with 3 site processes over mTLS",
        median,
        GOAL_SECONDS,
        "s",
        at_least=False,
    )


if __name__ == "__main__":
    raise SystemExit(not main())
