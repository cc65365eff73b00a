"""Networks that look at images: CLIP, DINOv2, Inception, one's own.

``load.py`` finds one by its name; ``resize.py`` has the resizes before them, FID's three (clean, tf1, pytorch) too.
Evaluation and perceptual terms come in here; no feature network knows either.
"""
