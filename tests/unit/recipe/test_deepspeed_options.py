"""The keys of a recipe's deepspeed section are those that the pinned version of DeepSpeed reads."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from pipeline.recipe.deepspeed_options import DECIDED_ELSEWHERE, OPTIONS, ZERO_OPTIONS


class _Asked(set[str]):
    """Remembers what it is asked for."""

    def __contains__(self, key: object) -> bool:
        self.add(str(key))
        return False


class _Recording(dict[str, Any]):
    """A configuration that remembers the keys that are looked up in it."""

    asked = _Asked()

    def __copy__(self) -> _Recording:
        return self

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self.asked


def test_the_options_are_the_keys_that_deepspeed_reads() -> None:
    config = _Recording(train_batch_size=1)
    deepspeed_config.DeepSpeedConfig(config)  # pyright: ignore[reportArgumentType]
    read = set(config.asked) - set(deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert read - set(DECIDED_ELSEWHERE) == set(OPTIONS)
    assert len(OPTIONS) == len(set(OPTIONS))
    assert not set(OPTIONS) & set(DECIDED_ELSEWHERE)


def test_the_options_of_zero_are_the_keys_of_its_model() -> None:
    keys = [field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()]
    assert sorted(ZERO_OPTIONS) == sorted(keys)
