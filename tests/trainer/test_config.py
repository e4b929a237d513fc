from collections.abc import Callable
from typing import Any

import pytest

from manifests.config import validate
from manifests.errors import ConfigError
from trainer.config import FREE_KEYS, PretrainConfig, differing_keys, flatten, order_digest, run_digest

MakeConfig = Callable[..., PretrainConfig]

# Another valid value for every key that decides what is computed.
OTHER = {
    "split": "val",
    "encoder": {"kind": "sleep", "width": 32},
    "objective": {"kind": "leave_one_out", "temperature": 0.5},
    "precision": "bf16",
    "backend": "gloo",
    "evaluation": None,
    "optimizer": {"schedule": "constant"},
    "filter": {"labelled": True},
    "weights": {"tiny": 2.0},
    "bucket_by": ["rate"],
}


def other_value(config: PretrainConfig, key: str) -> Any:
    value = getattr(config, key)
    if key in OTHER:
        return OTHER[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    pytest.fail(f"{key}: give another value of it in OTHER, or list it in FREE_KEYS")


@pytest.mark.parametrize("key", sorted(PretrainConfig.model_fields.keys() - FREE_KEYS - {"snapshots"}))
def test_a_key_that_is_not_free_is_in_the_digest_and_named(key: str, tiny_config: MakeConfig) -> None:
    config = tiny_config()
    other = tiny_config(**{key: other_value(config, key)})
    assert run_digest(other) != run_digest(config)
    assert all(line.startswith(key) for line in differing_keys(other, config.model_dump(mode="json")))
    assert differing_keys(other, config.model_dump(mode="json"))


def test_free_keys_exist_and_leave_the_digest_alone(tiny_config: MakeConfig) -> None:
    assert PretrainConfig.model_fields.keys() >= FREE_KEYS
    config = tiny_config()
    free = tiny_config(
        "other", steps=9, num_workers=(1, 3), faults={"max_skipped": 0}, ray={"max_failures": 1}, max_replaced=7
    )
    assert run_digest(free) == run_digest(config)
    assert differing_keys(free, config.model_dump(mode="json")) == []


def test_a_run_of_an_earlier_kymo_without_a_new_key_goes_on(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    earlier = config.model_dump(mode="json")
    assert "schedule" in earlier["optimizer"]
    del earlier["optimizer"]["schedule"], earlier["backend"], earlier["faults"]
    assert differing_keys(config, earlier) == []
    changed = tiny_config(optimizer={"schedule": "constant"})
    assert differing_keys(changed, earlier) == ["optimizer.schedule: 'cosine' → 'constant'"]


def test_a_key_that_this_kymo_no_longer_knows_is_named(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    earlier = config.model_dump(mode="json")
    earlier["encoder"]["gone"] = 3
    assert differing_keys(config, earlier) == ["encoder.gone: 3 → None"]


def test_the_digest_of_the_order_names_what_was_set_and_not_where_it_lies(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    moved = tiny_config(snapshots=[{"path": "/elsewhere"}])
    assert order_digest(moved) == order_digest(config)
    # A default that is written out is the same, so a later key with its default will be, too.
    assert order_digest(tiny_config(filter={"labelled": False})) == order_digest(config)
    assert order_digest(tiny_config(filter={"labelled": True})) != order_digest(config)
    assert order_digest(tiny_config(snapshots=[{"path": "/elsewhere", "weight": 2.0}])) != order_digest(config)


def test_the_number_of_workers_may_be_a_range_in_order(tiny_config: MakeConfig) -> None:
    assert tiny_config(num_workers=[2, 4]).num_workers == (2, 4)
    plain = tiny_config().model_dump(mode="json") | {"num_workers": [4, 2]}
    with pytest.raises(ConfigError, match=r"the least number stands first: \[2, 4\]"):
        validate(PretrainConfig, plain, where="x.yaml")
    assert flatten({"a": {"b": 1}, "c": [2]}) == {"a.b": 1, "c": [2]}
