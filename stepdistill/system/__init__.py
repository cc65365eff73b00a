"""The installation and the machine: what ships, log lines, files, processes, where a number comes from.

Knows nothing of diffusion. Everything above may come in; most of it answers without torch.
"""
