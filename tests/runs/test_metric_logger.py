"""What a metric logger gets, with the libraries themselves where they are installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from custom_components.config.components import trust_packages
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import config_text, load_settings
from custom_components.runs.metric_logger import metric_logger
from custom_components.runs.recognition import is_logged_config
from custom_components.runs.run_directory import RunDirectory
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT

LOGGERS = "torchtune.training.metric_logging."


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


class KeptLogger:
    """Keeps what it gets."""

    made: "KeptLogger"

    def __init__(self) -> None:
        KeptLogger.made = self
        self.records: list[tuple[int, dict]] = []
        self.config: object = None
        self.is_closed = False

    def log_config(self, config) -> None:
        self.config = OmegaConf.to_container(config, resolve=True)

    def log_dict(self, payload, step) -> None:
        self.records.append((step, payload))

    def close(self) -> None:
        self.is_closed = True


class BrokenLogger(KeptLogger):
    def __init__(self) -> None:
        raise RuntimeError("no key\nfor the server")


@pytest.fixture
def config(tmp_path, monkeypatch) -> str:
    monkeypatch.chdir(PROJECT)
    return config_text(load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", f"output_dir={tmp_path}"]))


def node(logger: type) -> dict:
    trust_packages([__name__.partition(".")[0]])
    return {"_component_": f"{__name__}.{logger.__name__}"}


def test_a_logger_gets_the_config_as_it_is_and_is_closed_on_every_way_out(config, tmp_path):
    config += "note: a price of ${amount} or ${x\n"
    with pytest.raises(KeyboardInterrupt), metric_logger(node(KeptLogger), RunDirectory(tmp_path), None) as logger:
        logger.log_config(config, RunDirectory(tmp_path))
        logger.log({"loss": 1.0, "peak_memory_gib": None}, step=3)
        logger.log_samples(["Who?"], ["Me."], step=3)
        raise KeyboardInterrupt
    assert KeptLogger.made.config == yaml.safe_load(config)
    assert KeptLogger.made.records == [(3, {"loss": 1.0})]
    assert KeptLogger.made.is_closed


def test_a_logger_that_cannot_start_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^metric_logger: .*BrokenLogger cannot start \(no key for the server\); "):
        metric_logger(node(BrokenLogger), RunDirectory(tmp_path), None).__enter__()


def test_without_a_logger_nothing_is_logged(config, tmp_path):
    with metric_logger(None, RunDirectory(tmp_path), None) as logger:
        logger.log_config(config, RunDirectory(tmp_path))
        logger.log({"loss": 1.0}, step=1)
        logger.log_samples(["Who?"], ["Me."], step=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["StdoutLogger", "DiskLogger"])
def test_the_config_that_a_logger_writes_is_known_as_the_runs(config, name, tmp_path):
    keys = {"log_dir": str(tmp_path / "logs")} if name == "DiskLogger" else {}
    with metric_logger({"_component_": LOGGERS + name, **keys}, RunDirectory(tmp_path), None) as logger:
        logger.log_config(config, RunDirectory(tmp_path))
        logger.log_samples(["Who?"], ["Me."], step=1)
    directory = RunDirectory(tmp_path)
    assert directory.results() == {directory.logged_config: is_logged_config}
    assert is_logged_config(directory.logged_config)
    directory.logged_config.write_text("# mine\n" + directory.logged_config.read_text())
    assert not is_logged_config(directory.logged_config)


@needs("tensorboard")
def test_tensorboard_has_numbers_and_answers(config, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = {"_component_": LOGGERS + "TensorBoardLogger", "log_dir": str(tmp_path / "logs")}
    with metric_logger(keys, RunDirectory(tmp_path), None) as logger:
        logger.log_config(config, RunDirectory(tmp_path))
        logger.log({"loss": 2.0, "lr": 1e-3}, step=4)
        logger.log({"val_loss": 1.5}, step=4)
        logger.log_samples(["Who?"], ["Line one\nline two"], step=4)
    [folder] = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    values = {}
    for tag in ("loss", "lr", "val_loss"):
        [event] = events.Tensors(tag)
        values[tag] = (event.step, pytest.approx(float(event.tensor_proto.float_val[0])))
    assert values == {"loss": (4, 2.0), "lr": (4, 1e-3), "val_loss": (4, 1.5)}
    [answer] = events.Tensors("sample_prompts/1/text_summary")
    assert answer.step == 4 and b"Line one\n    line two" in answer.tensor_proto.string_val[0]


@needs("wandb")
def test_a_resumed_wandb_run_goes_on_under_its_id(config, tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = RunDirectory(tmp_path)
    keys = {"_component_": LOGGERS + "WandBLogger", "log_dir": str(tmp_path / "logs")}
    ids = []
    for run_so_far in (None, directory, None):
        with metric_logger(keys, directory, run_so_far) as logger:
            text = config if run_so_far is None else config.replace("seed: ", "seed: 1")
            logger.log_config(text, directory)
            logger.log({"loss": 2.0}, step=4)
            logger.log_samples(["Who?"], ["Me."], step=4)
            assert wandb.run is not None and wandb.run.config["seed"] == yaml.safe_load(text)["seed"]
            assert dict(wandb.run.summary)["loss"] == 2.0 and "sample_prompts" in dict(wandb.run.summary)
            ids.append(wandb.run.id)
        assert wandb.run is None
        del logger  # else torchtune's logger closes the next one's run when it is deleted
    assert ids[0] == ids[1] != ids[2]
    assert json.loads(directory.wandb_run.read_text()) == {"wandb_run_id": ids[2]}
    assert {path.name for path in directory.results()} == {"torchtune_config.yaml", "wandb_run.json"}
    assert all(own(path) for path, own in directory.results().items())
    assert Path(tmp_path / "logs/wandb").is_dir()
