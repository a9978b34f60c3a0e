"""What has to be set before torch and the helpers of tests/support are imported."""

import os

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # see custom_components/runtime/tune_startup.py
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes of the tests share the cores
pytest.register_assert_rewrite("tests.support")
