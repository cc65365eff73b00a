"""``python -m stepdistill train``, as a file: to start under torchrun or accelerate, or to copy and change.

python train/distill.py dmd_emoji_quick --output runs/dmd --updates 500
torchrun --nproc_per_node 2 train/distill.py dmd_emoji_quick --output runs/dmd
"""

from __future__ import annotations

import sys

from stepdistill.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
