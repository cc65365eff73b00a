"""``stepdistill watch``: a run's page while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder, or one with runs in it.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free.")] = 8642,
    opened: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Show a run's page while it trains, on this machine alone."""
    from stepdistill.watching.server import Server
    from stepdistill.watching.site import Site

    with Server(Site(run), port) as server:
        print(f"{server.url}  (Ctrl-C ends it)", flush=True)
        if opened:
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
