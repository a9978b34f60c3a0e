"""A `model` node that is for another recipe, because it builds adapters or because it builds none."""

import pytest

import custom_components.models as models
from custom_components.config.full_settings import FULL_MODEL
from custom_components.config.training_settings import MODEL
from custom_components.models.builders import llama_from_config, lora_llama_from_config
from tests.support.paths import PROJECT
from tests.support.recipe_runs import run_here

BUILDERS = "custom_components.models."


def users_llama(checkpoint_dir: str):
    return llama_from_config(checkpoint_dir)


def users_lora_llama(checkpoint_dir: str):
    return lora_llama_from_config(checkpoint_dir, ["q_proj"])


def test_every_builder_is_for_one_recipe():
    # lora_llama takes a shape, which no config can give it.
    names = [name for name in models.__all__ if "llama" in name or "mistral" in name]
    builders = {BUILDERS + name for name in names} - {BUILDERS + "llama2_tokenizer", BUILDERS + "lora_llama"}
    assert {*MODEL.of_other_recipes, *FULL_MODEL.of_other_recipes} == builders
    for marker in (MODEL, FULL_MODEL):
        assert not {marker.ours, *marker.counterparts.values()} & {*marker.of_other_recipes}
        assert {marker.ours, *marker.counterparts.values()} <= builders


def of_recipe(recipe: str, tmp_path, component: str, *keys: str) -> str:
    config = {
        "lora_single_device": "tiny_qlora",
        "lora_dpo_single_device": "tiny_dpo",
        "full_single_device": "tiny_full",
    }
    node = f"model={{_component_: {component}{''.join(f', {key}' for key in keys)}}}"
    paths = [
        "--config",
        str(PROJECT / f"configs/{config[recipe]}.yaml"),
        f"output_dir={tmp_path}/out",
        "cache_dir=null",
        *("--trust-components", "tests"),
    ]
    code, _, err = run_here(recipe, *paths, "device=cpu", node)
    assert code == 2, err
    return err


FULL, LORA = "recipes/full_single_device.py", "recipes/lora_single_device.py"


@pytest.mark.parametrize(
    ("recipe", "component", "other", "ours"),
    [
        ("lora_single_device", "llama2_7b", FULL, "lora_llama2_7b"),
        ("lora_single_device", "llama_from_config", FULL, "lora_llama_from_config"),
        ("lora_dpo_single_device", "llama2_70b", FULL, "lora_llama2_70b"),
        ("full_single_device", "qlora_llama2_13b", LORA, "llama2_13b"),
        ("full_single_device", "lora_llama_from_config", LORA, "llama_from_config"),
        ("full_single_device", "lora_mistral_7b", LORA, "llama_from_config"),
    ],
)
def test_a_builder_of_ours_for_another_recipe_is_named(tmp_path, recipe, component, other, ours):
    err = of_recipe(recipe, tmp_path, BUILDERS + component)
    assert f"{BUILDERS + component!r} is for {other}; here it is {BUILDERS}{ours}" in err and err.count("error:") == 1


@pytest.mark.parametrize(
    ("recipe", "component", "words"),
    [
        ("lora_single_device", users_llama, f"builds a model without adapters, which is for {FULL}"),
        ("lora_dpo_single_device", users_llama, f"builds a model without adapters, which is for {FULL}"),
        ("full_single_device", users_lora_llama, f"builds a model with adapters, which is for {LORA}"),
    ],
)
def test_a_user_s_own_builder_for_another_recipe_is_refused(tmp_path, recipe, component, words):
    err = of_recipe(recipe, tmp_path, f"{__name__}.{component.__name__}", "checkpoint_dir: '${checkpoint_dir}'")
    assert words in err and err.count("\n") == 1
