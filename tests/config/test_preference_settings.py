"""A config of pairs: what is refused and what is said, before anything is loaded."""

import pytest

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT

LOSSES = "custom_components.training.preference_losses"


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def load(*overrides, settings_type=PreferenceSettings, config="tiny_dpo"):
    trusted = ["--trust-components", __name__.partition(".")[0]]
    return load_settings(settings_type, ["--config", f"configs/{config}.yaml", *trusted, *overrides])


def no_pair_each(answers, beta=0.1):
    return answers.policy_N2.sum(), answers.policy_N2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train_on=all", "train_on: all: the prompt is the same for both answers"),
        ("loss.beta=0", "loss.beta: 0 should be"),
        ("loss.bata=0.2", r"loss.bata: unknown key of .*rpo; did you mean 'loss.beta'\?"),
        ("loss.answers=1", "loss.answers: 1: the recipe gives this argument itself"),
        ("loss.label_smoothing=0.1", "loss.label_smoothing: unknown key"),
        (f"loss={{_component_: {LOSSES}.cdpo, label_smoothing: 0.5}}", "loss.label_smoothing: 0.5 should be"),
        (
            "loss={_component_: custom_components.training.loss.LinearCrossEntropy}",
            "is not made for this node; here it is one such as",
        ),
        ("loss={_component_: torchtune.rlhf.loss.DPOLoss}", "here it is custom_components.*preference_losses.sigmoid"),
        (f"loss={{_component_: {__name__}.no_pair_each}}", r"of 2 pairs it gives losses of shape \[\]"),
        ("loss_type=ipo", "loss_type: unknown key; here it is 'loss'"),
        ("beta=0.1", "beta: unknown key; here it is 'loss.beta'"),
        ("precompute_ref_log_probs=true", "the reference is the model as the run begins"),
        ("dataset._component_=custom_components.datasets.chat_dataset", "is for recipes/lora_single_device.py; here"),
        ("loss_chunk_size=0", "loss_chunk_size: 0 should be"),
    ],
)
def test_L26_what_cannot_be_trained_is_refused(override, message):
    with pytest.raises(UserError, match=message):
        load(override)


def test_L26_a_set_of_pairs_is_refused_by_the_recipe_of_dialogs():
    override = "dataset._component_=custom_components.datasets.preference_dataset"
    with pytest.raises(UserError, match="is for recipes/lora_dpo_single_device.py; here it is .*chat_dataset"):
        load(override, settings_type=LoRASettings, config="tiny_qlora")


@pytest.mark.parametrize("name", ["sigmoid", "rpo", "cdpo", "robust", "ipo", "simpo", "orpo"])
def test_every_loss_is_taken(name):
    assert load(f"loss={{_component_: {LOSSES}.{name}}}").preference_loss == name


def test_what_takes_policy_and_reference_apart_is_said(capsys):
    load("lora_dropout=0.1")
    assert "note:" not in capsys.readouterr().out  # a new adapter changes nothing, dropped or not
    load("lora_dropout=0.1", "init_adapter_from=outputs/sft/adapter", "neftune_noise_alpha=5")
    said = capsys.readouterr().out
    assert "note: lora_dropout 0.1: the reference, the adapter in init_adapter_from, is without dropout" in said
    assert "note: neftune_noise_alpha 5" in said
