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

# OpenMP threads wait for each other by spinning. Where another program takes a core, each of the thousands of small
# operations of a step then lasts as long as the scheduler's time slice: on 2 cores with one of them busy, a step of the
# tiny model took 20 times as long with the default than with this short spin. Large models do not notice either.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# oneDNN makes machine code for every matrix product of a shape it has not seen, and every batch has another number of
# tokens. Kept for 1024 shapes, the default of both caches, that code grew the tiny model's process by 20 MB a step. A
# forward needs some fifty.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")
