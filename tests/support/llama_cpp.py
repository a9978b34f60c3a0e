"""Models in llama.cpp, by the package llama-cpp-python, and files by its converters."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# A small byte-level tokenizer is none that the converter knows: Llama 3's by the way it splits texts into words.
_CONVERT = """
import runpy, sys
from pathlib import Path
sources, script, *arguments = sys.argv[1:]
sys.path[:0] = [sources, str(Path(sources, "gguf-py"))]
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"
sys.argv = [script, *arguments]
runpy.run_path(str(Path(sources, script)), run_name="__main__")
"""


def converted_by_llama_cpp(script: str, source: Path, target: Path, *arguments: str) -> Path:
    """Run one of llama.cpp's converters on a directory; skips the test where its sources are not there."""
    if (sources := os.environ.get("LLAMA_CPP_SOURCES")) is None:
        pytest.skip("llama.cpp's converters are not there: set LLAMA_CPP_SOURCES to a checkout of ggml-org/llama.cpp")
    command = [sys.executable, "-c", _CONVERT, sources, script, str(source), "--outfile", str(target), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=target.parent, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


@contextmanager
def in_llama_cpp(path: Path) -> Iterator:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not there: pip install llama-cpp-python")
    model = llama_cpp.Llama(str(path), n_ctx=0, n_threads=1, logits_all=True, verbose=False)
    try:
        yield model
    finally:
        model.close()


def llama_cpp_answer(model, prompt: list[int], max_new_tokens: int) -> list[int]:
    answer: list[int] = []
    for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
        if token == model.token_eos() or len(answer) == max_new_tokens:
            break
        answer.append(token)
    return answer


def llama_cpp_logits(model, tokens: list[int]) -> Tensor:
    model.reset()
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: len(tokens)]))
