"""Runs at the start of the `tune` command: see llama_lora_recipes.pth and config/tune_command.py.

A .pth file in site-packages is the only code that runs before torchtune's own imports. It checks the program's name,
because the changes made here would affect every other Python program of the environment.
"""

import os
import sys
from pathlib import Path

# torchtune's wheel installs a package `recipes` whose import raises, and `tune run recipes/x.py` imports `recipes.x`
# with the working directory at the end of the path only. At its start, this project's `recipes` is found.
if Path("recipes/__init__.py").is_file():
    sys.path.insert(0, str(Path.cwd()))

# Bars of libraries, as those of datasets and lm-eval, are for terminals: in a file they are one endless line.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

# OpenMP threads wait for each other by spinning, by default for milliseconds. If another program takes a core, an
# operation can then last as long as the scheduler's time slice. This short spin costs an idle machine almost nothing; a
# third of it would cost time, because the threads are woken again and again (benchmarks/README.md).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

# oneDNN generates machine code for every matrix product of a new shape, and every batch has another number of tokens.
# With the default of both caches, 1024 shapes, that code grew the tiny model's process by 20 MB per step. A forward
# needs about fifty.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
os.environ.setdefault("LRU_CACHE_CAPACITY", "128")

# CUDA memory in segments that grow: batches of other sizes reuse the memory of earlier ones instead of leaving gaps.
# Whoever has set the allocator up, under any of its names, keeps that. torch 2.11 and later read the first name, and
# warn about the second.
if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"} & os.environ.keys():
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
