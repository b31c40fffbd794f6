"""What is wrong with a user's DeepSpeed configuration, as far as DeepSpeed's own schema and this package's use show.

DeepSpeed ignores top-level keys that it does not know, fills "auto" in with its defaults, and finds the rest once the
engine is built, minutes after the start.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dynrank_ds.errors import RecipeError

_MONITORS = {
    "tensorboard": ("tensorboard", "tensorboardX"),
    "wandb": ("wandb",),
    "comet": ("comet_ml",),
    "csv_monitor": (),
}
"""Sections, and the packages of which one must be installed."""
_PLAIN = {
    "zero_optimization",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}
"""Keys of DeepSpeed 0.19 that a run of this package may have beside the monitors'."""
_TRAINING = {
    "amp",
    "autotuning",
    "checkpoint",
    "compile",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "dataloader_drop_last",
    "eigenvalue",
    "elasticity",
    "expert_parallel",
    "hybrid_engine",
    "pipeline",
    "progressive_layer_drop",
    "sparse_attention",
    "tensor_parallel",
    "torch_autocast",
    "weight_quantization",
}
"""Keys of DeepSpeed's own training features, which this package neither uses nor was tested with."""
_FIXED: dict[str, Any] = {
    "zero_optimization.round_robin_gradients": False,
    "zero_optimization.parameter_alignment": False,
    "data_types.grad_accum_dtype": "fp32",
    "communication_data_type": "fp32",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
"""What `complete_config` sets, whatever a file says."""


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration that DeepSpeed would misread, ignore in part, or fail with later.

    where: how messages call it. config: with a zero_optimization.stage from 1 to 3.

    Raises:
        RecipeError: the first mistake, with the key and what would be right.
    """
    for path, value in _leaves(config):
        if value == "auto":
            raise RecipeError(
                f"{where} sets '{path}' to auto, which Hugging Face's Trainer would fill in: remove it"
            )
        if path in _FIXED and value != _FIXED[path]:
            raise RecipeError(
                f"{where} sets '{path}' to {value!r}: remove it, it is always {_FIXED[path]!r} here"
            )
        if path.endswith(".device") and value == "nvme":
            raise RecipeError(
                f"{where} sets '{path}' to nvme: give cpu, or remove it; adapters that change their size cannot be "
                "swapped to a disk"
            )
    _check_top_level(config, where)
    _check_stage(config["zero_optimization"], where)
    _check_by_schema(config, where)
    for monitor, packages in _MONITORS.items():
        section = config.get(monitor)
        enabled = isinstance(section, dict) and section.get("enabled")
        if enabled and packages and not any(map(_is_installed, packages)):
            raise RecipeError(
                f"{where} enables '{monitor}', but {packages[0]} is not installed: pip install {packages[0]}, or "
                "remove it"
            )


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _check_top_level(config: Mapping[str, Any], where: str) -> None:
    known = _PLAIN | _MONITORS.keys()
    for key in config:
        if key in _TRAINING:
            raise RecipeError(f"{where} sets '{key}', which this package does not support: remove it")
        # A leading underscore or slash is how people write comments in JSON.
        if key not in known and not key.startswith(("_", "/", "#")):
            raise RecipeError(f"{where} sets '{key}', which DeepSpeed does not know: {_hint(key, known)}")


def _check_stage(zero: Mapping[str, Any], where: str) -> None:
    stage = zero["stage"]
    if stage == 3:
        return
    for key in zero:
        if key.startswith("stage3_") or key == "offload_param":
            raise RecipeError(
                f"{where} sets 'zero_optimization.{key}', which is of stage 3, but its stage is {stage}: remove it, or "
                "give stage 3"
            )


def _check_by_schema(config: Mapping[str, Any], where: str) -> None:
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    zero = config["zero_optimization"]
    for name, field in DeepSpeedZeroConfig.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("deprecated") and name in zero:
            raise RecipeError(
                f"{where} sets 'zero_optimization.{name}', which is deprecated: give {extra['new_param']} instead"
            )
    fields = DeepSpeedZeroConfig.model_fields.items()
    known = {name for name, _ in fields} | {field.alias for _, field in fields if field.alias}
    monitors = {name: config[name] for name in _MONITORS if name in config}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for schema, section, prefix in (
        (DeepSpeedZeroConfig, zero, "zero_optimization."),
        (DeepSpeedMonitorConfig, monitors, ""),
    ):
        try:
            schema(**section)
        except ValidationError as error:
            first = error.errors()[0]
            path = prefix + ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                options = known if len(first["loc"]) == 1 else ()
                raise RecipeError(
                    f"{where} sets '{path}', which DeepSpeed does not know: {_hint(str(first['loc'][-1]), options)}"
                ) from error
            raise RecipeError(
                f"{where} sets '{path}' to {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
            ) from error


def _hint(key: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"did you mean '{near[0]}'?" if near else "remove it"
