"""What is said when a model cannot be served, before anybody asks for anything."""

from __future__ import annotations

from dataclasses import replace

import pytest

from service.errors import ModelNotFoundError
from service.settings import ServeSettings
from service.startup import served_model
from tests.gateway.fake_engine import INFO


def test_a_tokenizer_that_is_another_models_is_refused() -> None:
    assert served_model(ServeSettings(), INFO).tokenizer is not None
    with pytest.raises(ModelNotFoundError, match="the tokenizer has 4096 tokens, the model's vocabulary 4095"):
        served_model(ServeSettings(), replace(INFO, vocab_size=4095))
