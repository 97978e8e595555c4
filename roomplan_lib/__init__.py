"""Workbench that teaches a language model to understand rooms."""

import os

__version__ = "0.1.0"

# Waiting OpenMP threads spin for milliseconds by default. Where two programs share the cores, that made each of them
# 15 times slower (2.7 against 40 small steps a second, two cores); a short spin keeps the full speed of one program.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # read once, when torch is first imported
# In a notebook Open3D would start a viewer of its own, which asks public servers for this machine's address.
os.environ.setdefault("OPEN3D_DISABLE_WEB_VISUALIZER", "true")  # read once, when open3d is first imported
