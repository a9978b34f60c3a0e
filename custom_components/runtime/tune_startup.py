"""Runs at the start of the `tune` command, inside a checkout of this project only: see llama_lora_recipes.pth.

A .pth file in site-packages is the one place that comes before torchtune's own imports. It asks for `tune` by name,
because what it does here would reach into every other Python program of the environment.
"""

import os
import sys
from pathlib import Path

# torchtune's wheel installs a package `recipes` whose import raises, and `tune run recipes/x.py` imports `recipes.x`
# with the working directory at the end of the path only. At its start, this project's `recipes` is found.
sys.path.insert(0, str(Path.cwd()))

# OpenMP threads wait for each other by spinning, by default for milliseconds. Where another program takes a core, an
# operation can then last as long as the scheduler's time slice. So short a spin costs an idle machine next to nothing;
# with a third of it, waking the threads again and again does (benchmarks/README.md).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# oneDNN makes machine code for every matrix product of a shape it has not seen, and every batch has another number of
# tokens. Kept for 1024 shapes, the default of both caches, that code grew the tiny model's process by 20 MB a step. A
# forward needs some fifty.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
