"""The recipes, one file per verb.

note: this file must exist. torchtune's wheel installs a top-level package `recipes` whose import raises, and a
namespace package (a folder without this file) loses to it, so `tune run recipes/...` would run theirs.
"""

import sys

try:
    # Imported before torch and torchao: what they would print, and what Ctrl-C does meanwhile, is settled here.
    from custom_components.runtime.starting import start_module
except ImportError as error:  # on Windows
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

start_module()
