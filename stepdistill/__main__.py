"""``python -m stepdistill``: what ``accelerate launch -m stepdistill train ...`` and torchrun start."""

from __future__ import annotations

from stepdistill.cli import main

if __name__ == "__main__":
    main()
