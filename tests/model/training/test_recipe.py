"""Recipes: what a file and the command line say, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from model.training.recipe import load_recipe
from tests.model.training.texts import write_recipe


def test_paths_are_relative_to_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, data={"validation": "valid.txt"}, training={"initial": "tales"}))
    assert recipe.run.directory == tmp_path / "run"
    assert [source.path for source in recipe.data.sources] == [tmp_path / "stories.txt.xz", tmp_path / "tales.txt"]
    assert recipe.data.validation == tmp_path / "valid.txt"
    assert recipe.training.initial == tmp_path / "tales"
    assert recipe.data.tokenizer is None
    with pytest.raises(ValidationError):
        recipe.run.threads = 3  # type: ignore[misc]


def test_single_keys_are_overridden(tmp_path: Path) -> None:
    overrides = ["training.steps=9", "training.learning_rate=1e-3", "model.n_head=1", "run.prompts=[a, b]"]
    recipe = load_recipe(write_recipe(tmp_path), overrides)
    assert (recipe.training.steps, recipe.training.learning_rate) == (9, 1e-3)
    assert recipe.model["n_head"] == 1
    assert recipe.run.prompts == ("a", "b")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"rate": 1}}, "training.rate"),
        ({"training": {"batch": 5}}, "batch: 5 is no multiple"),
        ({"data": {"tokenizer": "t.json"}}, "either tokenizer or vocab_size"),
        ({"data": {"window": 1}}, "data.window"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"data": {"held_out": 1}}, "data.held_out"),
        ({"run": {"device": "tpu"}}, "run.device"),
    ],
)
def test_what_is_no_recipe_is_named(tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path, **sections))


@pytest.mark.parametrize("override", ["steps", "=3", "training.steps.more=3", "training.steps=[", "training.steps=x"])
def test_a_bad_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match=r"training\.steps|KEY=VALUE"):
        load_recipe(write_recipe(tmp_path), [override])


@pytest.mark.parametrize("content", [b"- a list", b"training: [", b"\xff"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(path)
