"""A DeepSpeed configuration with a mistake is refused by its key, before DeepSpeed would find it or ignore it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from dynrank_ds.errors import RecipeError
from dynrank_ds.zero import config_checks
from dynrank_ds.zero.config import complete_config, load_config
from dynrank_ds.zero.config_checks import _FIXED, check_config


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"zero": {"stage3_max_live_params": 1}},
            "'zero_optimization.stage3_max_live_params', which DeepSpeed does",
        ),
        ({"zero": {"overlap_com": True}}, "does not know: did you mean 'overlap_comm'?"),
        (
            {"zero": {"offload_optimizer": {"device": "cpu", "pinmemory": True}}},
            "'zero_optimization.offload_optimizer.p",
        ),
        (
            {"zero": {"overlap_comm": "perhaps"}},
            "'zero_optimization.overlap_comm' to 'perhaps': input should be",
        ),
        (
            {"wall_clock_breakdwn": True},
            "does not know: did you mean 'wall_clock_",
        ),
        ({"train_batch": 3}, "sets 'train_batch', which DeepSpeed does not know: remove it"),
        (
            {"zero": {"stage": 2, "cpu_offload": True}},
            "cpu_offload', which is deprecated: give offload_optimizer",
        ),
        (
            {"zero": {"reduce_bucket_size": "auto"}},
            "'zero_optimization.reduce_bucket_size' to auto",
        ),
        (
            {"zero": {"stage": 2, "stage3_max_live_parameters": 1}},
            "is of stage 3, but its stage is 2: remove it",
        ),
        ({"zero": {"stage": 1, "offload_param": {"device": "cpu"}}}, "is of stage 3, but its stage is 1"),
        (
            {"zero": {"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}},
            "'zero_optimization.offload_optimizer.device' to nvme: give cpu",
        ),
        ({"zero": {"round_robin_gradients": True}}, "remove it, it is always False here"),
        (
            {"data_types": {"grad_accum_dtype": "bf16"}},
            "'data_types.grad_accum_dtype' to 'bf16'",
        ),
        ({"zero_allow_untested_optimizer": False}, "remove it, it is always True here"),
        (
            {"wandb": {"enabled": True}},
            "enables 'wandb', but wandb is not installed: pip install wandb, or remove it",
        ),
        ({"csv_monitor": {"enable": True}}, "sets 'csv_monitor.enable', which DeepSpeed does not know"),
        ({"curriculum_learning": {"enabled": True}}, "which this package does not support: remove it"),
    ],
)
def test_a_mistake_is_reported_by_its_key(
    config: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_checks, "_is_installed", lambda name: False)
    zero = {"stage": 3, **config.pop("zero", {})}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**config, "zero_optimization": zero}))
    with pytest.raises(RecipeError) as error:
        load_config(str(path), bf16=False)
    assert str(error.value).startswith(f"deepspeed.config {path} ") and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_given_twice_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization":\n {"stage": 3,\n "stage": 2}}')
    with pytest.raises(
        RecipeError, match=r"ds.json: the key 'stage' stands twice in the object .* in line 2"
    ):
        load_config(str(path), bf16=False)


def test_right_configurations_pass_and_the_shipped_ones_are_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for file in resources.files("dynrank_ds.ds_configs").iterdir():
        if file.name.endswith(".json"):
            check_config(json.loads(file.read_text()), file.name)
    monkeypatch.setattr(config_checks, "_is_installed", lambda name: True)
    right: dict[str, Any] = {
        "_comment": "for one node",
        "zero_optimization": {
            "stage": 3,
            "stage3_prefetch_bucket_size": 10,
            "offload_param": {"device": "cpu"},
        },
        "wandb": {"enabled": True, "project": "p"},
        "csv_monitor": {"enabled": True, "output_path": "logs"},
        "wall_clock_breakdown": True,
        "communication_data_type": "fp32",
    }
    check_config(right, "right")


def test_what_is_said_to_be_fixed_is_what_deepspeed_is_given() -> None:
    made = complete_config({"zero_optimization": {"stage": 3}}, 1, 1, 1.0, False)
    for path, value in _FIXED.items():
        found: Any = made
        for key in path.split("."):
            found = found[key]
        assert found == value, path
