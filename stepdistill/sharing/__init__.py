"""A student goes to others: to the Hugging Face Hub, to a page where people compare, and as one network to run without
diffusers.

``hub.py`` makes the folder that is pushed, ``hub_card.py`` its card's metadata, ``upload.py`` sends it; ``votes.py``,
``drawers.py`` and ``demo_page.py`` are the local page; ``one_network.py`` writes a one-step network for torch.export or
ONNX.
"""
