"""Several sources of settings: they complete each other, and never contradict silently."""

from __future__ import annotations

import pytest

from neuqi_serve.errors import UsageError
from neuqi_serve.format.online_settings import merge_settings, settings_object


def test_sources_complete_each_other() -> None:
    merged = merge_settings([("--bits", {"bits": 3}), ("--hf-overrides", {"bits": 3, "group_size": 64})])
    assert merged == {"bits": 3, "group_size": 64}


def test_two_values_for_one_key_are_refused_with_both_sources() -> None:
    with pytest.raises(
        UsageError, match="expected one bits, got 3 from --bits and 2 from --additional-config"
    ):
        merge_settings(
            [("--bits", {"bits": 3}), ("--hf-overrides", {}), ("--additional-config", {"bits": 2})]
        )


def test_settings_are_an_object_of_our_method() -> None:
    given = {"quant_method": "neuqi", "bits": 2}
    assert settings_object(given, "x") == given
    assert settings_object(None, "x") == {}
    with pytest.raises(UsageError, match="expected an object of settings in x, got 3"):
        settings_object(3, "x")
    with pytest.raises(UsageError, match='expected quant_method "neuqi" in x'):
        settings_object({"quant_method": "gptq"}, "x")
