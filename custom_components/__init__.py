"""The parts that the recipes put together: one responsibility a file, usable from torchtune's own recipes as well."""

import logging
import os
import sys

if sys.platform == "win32":
    _words = "llama-lora-recipes runs on Linux, macOS and WSL (Windows Subsystem for Linux), not on Windows itself"
    if os.path.splitext(os.path.basename(sys.argv[0]))[0] == "tune":  # noqa: PTH119, PTH122 - before pathlib is needed
        # note: imported from llama_lora_recipes.pth, where Python prints an exception and goes on.
        os.write(2, f"error: {_words}\n".encode())
        os._exit(2)
    raise ImportError(_words)

# What libraries say that nobody here can act on. torchao 0.15: its C++ extensions do not fit newer versions of torch;
# nothing here uses them. matplotlib: it lists the fonts, once on a machine.
for _name in ("torchao", "matplotlib"):
    logging.getLogger(_name).setLevel(logging.ERROR)
