"""A DeepSpeed that has moved what this package uses of it is named in one sentence, at start."""

from __future__ import annotations

import pytest

from dynrank_ds.errors import MachineError
from dynrank_ds.zero import deepspeed_internals
from dynrank_ds.zero.deepspeed_internals import (
    DeepSpeedEngine,
    DeepSpeedZeroOptimizer_Stage3,
    Init,
    PartitionedParameterCoordinator,
)


def test_the_installed_deepspeed_has_all_that_is_used() -> None:
    deepspeed_internals.check()


def test_a_removed_function_is_named_with_the_version_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PartitionedParameterCoordinator, deepspeed_internals._CACHE)
    with pytest.raises(MachineError, match=r"has moved .*__params_to_release.*install deepspeed==0\.19\.8"):
        deepspeed_internals.check()


@pytest.mark.parametrize(
    ("name", "what"),
    [("DeepSpeedEngine", "module_forward_pre_hook"), ("DeepSpeedZeroOptimizer_Stage3", "fp16_groups")],
)
def test_a_class_without_an_attribute_that_is_used_is_named(
    name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        """Nothing of what is used."""

    assert getattr(deepspeed_internals, name) in (DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3)
    monkeypatch.setattr(deepspeed_internals, name, Other)
    with pytest.raises(MachineError, match=what):
        deepspeed_internals.check()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (DeepSpeedZeroOptimizer_Stage3, "create_reduce_and_remove_grad_hooks"),
        (DeepSpeedEngine, "_broadcast_model"),
        (Init, "_zero_init_param"),
    ],
)
def test_a_function_that_does_other_work_than_what_is_left_out_is_named(
    owner: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, lambda *arguments: None)
    with pytest.raises(MachineError, match=rf"has moved .*{name}.*install deepspeed==0\.19\.8"):
        deepspeed_internals.check()
