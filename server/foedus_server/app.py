"""The round engine as a Flower ServerApp: Flower's programming model, our grid underneath."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from foedus_server.rounds import RoundGrid
from foedus_server.runs import Coordinator, conduct


def server_app(coordinator: Coordinator) -> ServerApp:
    """A ServerApp that conducts the run named by its context over whichever grid it is given."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        assert isinstance(grid, RoundGrid)
        conduct(coordinator, context.run_id, grid)

    return app
