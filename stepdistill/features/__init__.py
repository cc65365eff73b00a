"""Networks that look at images: CLIP, DINOv2, Inception, one's own; and the resize that each was trained with.

``load.py`` finds one by its name. Evaluation and perceptual terms come in here; no feature network knows either.
"""
