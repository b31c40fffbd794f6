"""What `dynrank plan` says follows from the recipe, and what it advises is enough."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

import dynrank_ds.cli
from dynrank_ds.errors import RecipeError
from dynrank_ds.planning.activations import MicroBatch
from dynrank_ds.planning.architecture import BUILT_IN, Architecture, describe
from dynrank_ds.planning.plan import GIB, Cluster, Plan, first_change, make_plan
from dynrank_ds.planning.ranks import method_of, most_parameters
from dynrank_ds.planning.speed import HARDWARE, step_time
from dynrank_ds.planning.traffic import Traffic
from dynrank_ds.quantised_layers import linears_to_quantise, replace_linears
from dynrank_ds.recipe import load_recipe
from dynrank_ds.zero.config import load_config
from tests.support.architectures import ARCHITECTURES, architecture_config


def cluster(nodes: int, gpus: int, gib: float, gpu: str = "h100") -> Cluster:
    return Cluster(nodes, gpus, gib * GIB, HARDWARE[gpu])


@cache
def architecture(name: str) -> Architecture:
    return describe(load_recipe(name))


def plan(name: str, *overrides: str, on: Cluster, samples: int | None = None) -> Plan:
    """Overrides must not change the model or the adapter."""
    return make_plan(load_recipe(name, overrides), on, samples, architecture(name))


@pytest.mark.parametrize(
    ("path", "parameters"),
    [
        # As on the models' pages of the hub.
        ("meta-llama/Llama-2-7b-hf", 6_738_415_616),
        ("meta-llama/Llama-2-13b-hf", 13_015_864_320),
        ("meta-llama/Llama-2-70b-hf", 68_976_648_192),
        ("meta-llama/Meta-Llama-3-8B", 8_030_261_248),
        ("meta-llama/Meta-Llama-3-70B", 70_553_706_496),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
    ],
)
def test_built_in_models_have_their_published_number_of_parameters(path: str, parameters: int) -> None:
    found = describe(load_recipe("llama2_7b+metamathqa+lora", [f"model.path={path}"]))
    assert found.base_parameters == parameters
    assert sum(unit.elements for unit in found.units) == parameters + found.trainable_parameters
    assert found.layers == BUILT_IN[path].get("num_hidden_layers", 32)


NAME = "llama2_7b_metamathqa_pe_dyra"


def test_a_7b_model_takes_its_weights_on_one_gpu_and_a_share_of_them_on_eight() -> None:
    one, eight = (plan(NAME, on=cluster(1, n, 80)) for n in (1, 8))
    weights = 2 * one.architecture.base_parameters
    assert one.memory.parts.base == weights and one.memory.parts.gathers == 0
    assert eight.memory.parts.base == weights / 8 and eight.memory.parts.gathers > 0
    assert one.traffic.parameters == one.traffic.gradients == 0 < eight.traffic.parameters
    assert (one.accumulation, eight.accumulation) == (8, 1)
    assert one.steps == 31_250 and one.adjustments == 17 and one.fits and eight.fits


def test_weight_decomposition_adds_a_number_and_an_activation_for_each_output_row() -> None:
    recipe = load_recipe(NAME, ["adapter.weight_decomposed=true", "train.activation_checkpointing=false"])
    usual = load_recipe(NAME, ["train.activation_checkpointing=false"])
    found, expected = (make_plan(r, cluster(1, 8, 80), None, describe(r)) for r in (recipe, usual))
    rows = 4 * 4096 + 2 * 11008 + 4096  # of a layer's seven linears
    added = found.architecture.trainable_parameters - expected.architecture.trainable_parameters
    assert added == 32 * rows
    tokens = usual.train.micro_batch_size * usual.data.max_length
    kept = found.memory.parts.activations - expected.memory.parts.activations
    assert kept == pytest.approx(32 * tokens * rows * 2, rel=0.05)


def test_traffic_of_zero_3_is_twice_the_model_less_what_is_kept_for_backward() -> None:
    eight = plan(NAME, on=cluster(1, 8, 80))
    whole = 2 * 2 * eight.architecture.base_parameters * 7 / 8
    kept = 2 * 1e9 * 7 / 8  # elements of stage3_max_reuse_distance, and one layer more at most
    assert whole - 1.5 * kept < eight.traffic.parameters < whole
    assert eight.traffic.gradients == pytest.approx(4 * 9_995_136 * 7 / 8)
    # Stage 2 sends adapters alone.
    second = plan(NAME, "deepspeed.config=zero2", on=cluster(1, 8, 80))
    assert second.traffic.parameters < 1e-3 * eight.traffic.parameters
    assert second.memory.parts.base == 2 * second.architecture.base_parameters


def test_what_is_advised_first_makes_it_fit_and_a_little_less_would_not() -> None:
    overrides = ["train.activation_checkpointing=false", "deepspeed.config=zero2"]
    recipe, on = load_recipe(NAME, overrides), cluster(1, 8, 16)
    made = make_plan(recipe, on, None, architecture(NAME))
    assert not made.fits
    change = first_change(recipe, made)
    assert change is not None and change.plan.fits
    words = change.what.split()
    assert words[0] == "deepspeed.config=zero3"
    assert make_plan(load_recipe(NAME, [*overrides, *words]), on, None, architecture(NAME)).fits
    assert not make_plan(load_recipe(NAME, [*overrides, *words[:-1]]), on, None, architecture(NAME)).fits


def test_four_bits_are_advised_before_more_nodes() -> None:
    name = "llama2_70b_metamathqa_pe_dyra"
    recipe, on = load_recipe(name), cluster(1, 2, 40)
    made = make_plan(recipe, on, None, architecture(name))
    change = first_change(recipe, made)
    assert change is not None and not made.fits
    assert change.what == "model.quantisation=nf4 model.double_quantisation=true"
    assert make_plan(load_recipe(name, change.what.split()), on).fits


def test_more_nodes_are_advised_where_shards_are_too_large_and_only_numbers_that_divide_the_batch() -> None:
    name = "llama2_70b_metamathqa_pe_dyra"
    recipe, on = load_recipe(name), cluster(1, 4, 12)
    made = make_plan(recipe, on, None, architecture(name))
    change = first_change(recipe, made)
    assert change is not None and not made.fits
    nodes = change.plan.cluster.nodes
    assert change.what == f"on {nodes} nodes ({4 * nodes} GPUs)" and 64 % (4 * nodes) == 0
    assert make_plan(recipe, replace(on, nodes=nodes), None, architecture(name)).fits
    assert not make_plan(recipe, replace(on, nodes=nodes // 2), None, architecture(name)).fits
    assert first_change(recipe, make_plan(recipe, cluster(1, 4, 2), None, architecture(name))) is None


def test_seventy_billion_parameters_fit_where_the_documents_say_so() -> None:
    for name in ("llama2_70b_metamathqa_pe_dyra", "llama3_70b_codefeedback_pe_dyra"):
        for on in (cluster(1, 8, 80), cluster(2, 8, 40, "a100"), cluster(8, 8, 80)):
            made = plan(name, on=on, samples=100_000)
            assert made.fits
            # What the shards alone take, and not more than three times of it with everything.
            shards = 2 * made.architecture.base_parameters / on.gpus
            assert shards < made.memory.parts.total < 3 * shards + 8 * GIB


@pytest.mark.parametrize(
    ("method", "overrides", "most"),
    [
        ("lora", [], 1.0),
        ("adalora", [], 1.0),
        ("weightlora_plus", [], 1.0),
        ("pe_dyra", ["method.conserve=parameters"], 1.0),
        ("pe_dyra", ["method.moves=prune"], 1.0),
        ("ard_lora", [], 2.0),  # alpha_max
    ],
)
def test_the_largest_number_of_parameters_is_bounded_by_the_method(
    method: str, overrides: list[str], most: float
) -> None:
    recipe = load_recipe(f"llama2_7b+metamathqa+{method}", overrides)
    found = architecture(f"llama2_7b+metamathqa+{method}")
    assert (
        most_parameters(recipe, found, method_of(recipe, found, 31_250)) == most * found.trainable_parameters
    )


def test_every_moved_triple_may_end_in_the_largest_module() -> None:
    recipe, found = load_recipe(NAME), architecture(NAME)
    method = method_of(recipe, found, 31_250)
    # 12 triples at each of 17 adjustments, from attention (4096 + 1 + 4096) to the MLP (4096 + 1 + 11008).
    assert most_parameters(recipe, found, method) == found.trainable_parameters + 17 * 12 * (15_105 - 8_193)


@pytest.mark.parametrize("recomputed", [False, True])
def test_arithmetic_is_what_torch_counts(recomputed: bool, tmp_path: Path) -> None:
    """Adapters aside; torch counts eager attention of all pairs, the plan half of them."""
    sides = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "vocab_size": 500}
    config = LlamaConfig(**sides, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    config.save_pretrained(tmp_path)
    found = describe(load_recipe("llama2_7b+metamathqa+lora", [f"model.path={tmp_path}"]))
    model = AutoModelForCausalLM.from_config(config)
    model.requires_grad_(False).enable_input_require_grads()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.ones(2, 24, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.train()(input_ids=ids).logits.sum().backward()
    bare = replace(found, trainable_parameters=0)
    nothing = Traffic(0, 0, 0, 0, 0)
    seconds = step_time(
        bare, MicroBatch(2, 24, 48), 1, recomputed, nothing, HARDWARE["h100"], 1, 1
    ).arithmetic
    # Eager attention computes all pairs of tokens. The recomputation of a layer ends here before its last linear, whose
    # input an adapter would need.
    surplus = 4 * 3 * 64 * 24 * 48 * (4 if recomputed else 3) / 2
    last_linears = 2 * 3 * 160 * 64 * 48 if recomputed else 0
    expected = counter.get_total_flops() - surplus + last_linears
    assert seconds * 989e12 * 0.4 == pytest.approx(expected, rel=0.01)


def test_the_command_prints_a_plan(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "plan",
        "--recipe",
        NAME,
        "--gpus-per-node",
        "8",
        "--gpu-memory-gib",
        "80",
        "train.micro_batch_size=1",
    ]
    assert dynrank_ds.cli.main(words) == 0
    out = capsys.readouterr().out
    assert "9,995,136 trainable parameters at start (0.148%), 11,405,184 at most" in out
    assert "8 GPUs x 1 x 2 accumulated" in out and "31,250 steps, 17 adjustments" in out
    assert re.search(r"verdict +fits: \d+% of the GPU's memory", out)
    values = [float(n) for n in re.findall(r"^  (?!sum)\w.*? +(\d+\.\d\d)$", out, re.MULTILINE)]
    (total,) = re.findall(r"^  sum +(\d+\.\d\d)", out, re.MULTILINE)
    assert sum(values) == pytest.approx(float(total), abs=0.051)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--gpus-per-node", "0", "--gpu-memory-gib", "80"], "--gpus-per-node is 0: give a number above 0"),
        (
            ["--gpus-per-node", "8", "--gpu-memory-gib", "-1"],
            "--gpu-memory-gib is -1.0: give a number above 0",
        ),
        (
            ["--gpus-per-node", "8", "--gpu-memory-gib", "80", "--samples", "0"],
            "--samples is 0: give a number",
        ),
        (["--gpus-per-node", "3", "--gpu-memory-gib", "80"], "train.global_batch_size 16 is no multiple of"),
    ],
)
def test_an_impossible_cluster_is_refused(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dynrank_ds.cli.main(["plan", "--recipe", NAME, *words]) == 2
    assert sentence in capsys.readouterr().err


def test_a_data_set_of_unknown_length_leaves_hours_open(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--recipe", "llama2_7b+codefeedback_python+lora", "--gpus-per-node", "8"]
    assert dynrank_ds.cli.main([*words, "--gpu-memory-gib", "80"]) == 0
    assert "give --samples, the rows of the data set" in capsys.readouterr().out


def test_seventy_billion_parameters_in_nf4_take_a_quarter_and_their_scales() -> None:
    name = "llama2_70b_metamathqa_pe_dyra"
    on = cluster(1, 2, 80)
    for overrides, bits in ((["model.double_quantisation=true"], 8 / 64 + 32 / 64 / 256), ([], 32 / 64)):
        made = make_plan(load_recipe(name, ["model.quantisation=nf4", *overrides]), on)
        linears = 80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
        rest = 2 * 8192 * 32_000 + (2 * 80 + 1) * 8192  # embedding, head and norms stay in bf16
        shard = (linears / 2 + 2 * rest) / 2
        assert made.fits
        assert made.memory.parts.base == pytest.approx(shard + linears * bits / 8, rel=1e-6)
        # As STACK.md and ds_configs/README.md state them for every GPU.
        assert linears * bits / 8 / GIB == pytest.approx(1.0 if overrides else 4.0, abs=0.03)
        # The largest weight is unpacked for its use, and gathers move packed weights.
        assert made.memory.parts.buffers >= 2 * 8192 * 28672
        assert made.traffic.parameters < 0.3 * plan(name, on=on).traffic.parameters


@pytest.mark.parametrize("name", ["LLaMA", "Qwen2.5, tied", "OPT", "DeepSeek-V3", "Mixtral", "GPT-NeoX"])
def test_weights_in_four_bits_are_those_of_the_layers_that_a_run_quantises(name: str) -> None:
    config = architecture_config(*ARCHITECTURES[name])
    with torch.device("meta"):
        planned, replaced = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    names = list(linears_to_quantise(planned))
    assert names and names == list(replace_linears(replaced, BitsAndBytesConfig(load_in_4bit=True)))


def hpz(folder: Path, size: int) -> str:
    config = load_config("zero3_hpz", bf16=True)
    config["zero_optimization"]["zero_hpz_partition_size"] = size
    (folder / "hpz.json").write_text(json.dumps(config))
    return f"deepspeed.config={folder / 'hpz.json'}"


def test_hpz_holds_the_base_once_more_in_a_node_and_leaves_the_network_to_adapters(tmp_path: Path) -> None:
    on = cluster(4, 8, 80)
    name = "llama2_70b_metamathqa_pe_dyra"
    plain, twice = (plan(name, *extra, on=on) for extra in ([], [hpz(tmp_path, 8)]))
    base = 2 * plain.architecture.base_parameters
    assert twice.memory.parts.base - plain.memory.parts.base == pytest.approx(base / 8, rel=1e-6)
    between = twice.traffic.parameters - twice.traffic.within_node
    assert plain.traffic.within_node == 0 and between < 0.01 * plain.traffic.parameters
    assert twice.traffic.within_node == pytest.approx(
        plain.traffic.parameters * (7 / 8) / (31 / 32), rel=0.01
    )
    assert twice.time.traffic < plain.time.traffic


def test_offloaded_parameters_leave_the_gpu_and_come_back_for_each_gather() -> None:
    on = cluster(1, 8, 80)
    plain, moved, states = (
        plan(NAME, *extra, on=on)
        for extra in ([], ["deepspeed.config=zero3_offload_params"], ["deepspeed.config=zero3_offload"])
    )
    assert moved.memory.parts.base == moved.memory.parts.adapters == moved.memory.parts.optimizer == 0
    assert moved.memory.host_of_parameters == plain.memory.parts.base + plain.memory.parts.adapters
    assert moved.memory.host_of_optimizer == states.memory.host_of_optimizer == plain.memory.parts.optimizer
    assert states.memory.parts.base == plain.memory.parts.base and states.traffic.from_host == 0
    # What a GPU receives from the seven others and from its own machine are all that is gathered.
    assert moved.traffic.from_host == pytest.approx(moved.traffic.parameters / 7, rel=1e-6)
    assert moved.time.traffic > plain.time.traffic
    alone = plan(NAME, "deepspeed.config=zero3_offload_params", on=cluster(1, 1, 24))
    assert alone.traffic.parameters == 0 < alone.traffic.from_host and alone.memory.parts.gathers > 0


def test_increlora_of_a_large_model_is_refused_before_anything_is_planned() -> None:
    with pytest.raises(RecipeError, match="increlora forms the dense gradient"):
        plan("llama2_7b+metamathqa+increlora", on=cluster(1, 8, 80))


PAGE = (Path(__file__).resolve().parents[2] / "dynrank_ds/planning/README.md").read_text()
EXAMPLES = re.findall(r"```bash\n(dynrank plan .*?)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.mark.parametrize(
    ("command", "text"),
    EXAMPLES,
    ids=[command.split("--recipe ")[1].split(" --gpu-m")[0] for command, _ in EXAMPLES],
)
def test_the_documented_plans_are_those_of_today(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dynrank_ds.cli.main(command.split()[1:]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_the_documents_print_7b_on_1_and_8_and_70b_on_8_16_and_64_gpus() -> None:
    assert [int(n) for _, text in EXAMPLES for n in re.findall(r"(\d+) GPUs x", text)] == [1, 8, 8, 16, 64, 2]


GUIDE = (Path(__file__).resolve().parents[2] / "launcher/README.md").read_text()
ROWS = re.findall(r"^ *\| (\d+) \| `(dynrank plan .*?)` \| (.*?) \| (.*?) \| (.*?) \|$", GUIDE, re.MULTILINE)


def test_the_guide_from_one_gpu_to_64_has_the_numbers_of_the_documented_plans() -> None:
    assert [int(gpus) for gpus, *_ in ROWS] == [1, 8, 8, 16, 64]
    printed = dict(EXAMPLES)
    for gpus, command, memory, step, hours in ROWS:
        text = printed[command]
        assert f"{gpus} GPUs x" in text and "verdict     fits" in text
        assert memory.removesuffix(" GiB") == re.findall(r"sum +([\d.]+)", text)[0]
        assert step == " to ".join(re.findall(r"step +([\d.]+) s .*, ([\d.]+) s where", text)[0]) + " s"
        assert hours == " to ".join(re.findall(r"at most ([\d.]+) hours, or ([\d.]+)", text)[0]) + " h"
