# note: must exist. torchtune's wheel installs a top-level package `recipes` whose import raises, and a namespace
# package (a folder without this file) loses to it, so `tune run recipes/...` would run theirs.
