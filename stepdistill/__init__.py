"""Distil diffusion and flow pipelines into students that draw in one to eight steps."""
