"""Files of four and five bits, which llama.cpp's own quantizer makes: what is done around it, with one in its place."""

import ctypes
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.adapters import saved_adapter
from tests.support.modelfile import read_modelfile
from tests.support.models import loaded_model, with_random_adapters
from tests.support.recipe_runs import run_merge

pytest.importorskip("gguf")


class Parameters(ctypes.Structure):
    _fields_ = [("ftype", ctypes.c_int), ("nthread", ctypes.c_int32)]


@pytest.fixture
def quantizer(monkeypatch):
    """A llama_cpp whose quantizer copies the file, and the calls of it."""
    calls = []

    def quantize(source, target, parameters):
        calls.append((Path(source.decode()).name, parameters._obj.ftype))
        shutil.copy(source, target)
        return 0

    module = ModuleType("llama_cpp")
    module.LLAMA_FTYPE_MOSTLY_Q4_K_M, module.LLAMA_FTYPE_MOSTLY_Q5_K_M = 15, 17
    module.llama_model_quantize_default_params = Parameters
    module.llama_model_quantize = quantize
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    return module, calls


@pytest.fixture
def paths(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    adapter = saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "adapter")
    return {"checkpoint_dir": checkpoint, "adapter_dir": adapter, "output_dir": tmp_path / "merged", "format": "gguf"}


@pytest.mark.parametrize(("quantization", "file_type"), [("q4_k_m", 15), ("q5_k_m", 17)])
def test_the_merge_is_proved_in_f16_and_only_the_quantized_file_is_left(quantizer, paths, quantization, file_type):
    code, out, err = run_merge(**paths, quantization=quantization)
    assert code == 0, err
    assert quantizer[1] == [("merged-f16.gguf", file_type)]
    output = paths["output_dir"]
    assert [path.name for path in output.glob("*.gguf")] == [f"merged-{quantization}.gguf"]
    assert dict(read_modelfile((output / "Modelfile").read_text()))["FROM"] == f"./merged-{quantization}.gguf"
    assert f"merged-{quantization}.gguf" in (output / "README.md").read_text()
    assert "merged against the original weights + adapter" in out
    # It is recognized as a merge, which may be replaced.
    assert run_merge(**paths, quantization=quantization, overwrite_output_dir="true")[0] == 0


def test_a_quantizer_that_fails_leaves_nothing(quantizer, paths, monkeypatch):
    monkeypatch.setattr(quantizer[0], "llama_model_quantize", lambda *_: 1)
    code, _, err = run_merge(**paths, quantization="q4_k_m")
    assert code == 2 and "error: quantization: llama.cpp could not write merged-q4_k_m.gguf (1); set quant" in err
    assert not paths["output_dir"].exists()


def test_without_llama_cpp_the_error_says_how_else(paths, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, out, err = run_merge(**paths, quantization="q4_k_m")
    assert code == 2 and "error: quantization: q4_k_m needs llama.cpp's quantizer" in err
    assert "run `llama-quantize x-f16.gguf x.gguf q4_k_m`" in err and "compared" not in out
