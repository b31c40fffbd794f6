"""`dynrank resize` against dense SVDs of PEFT's updates."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from dynrank_ds.cli import main
from dynrank_ds.errors import RunError
from dynrank_ds.export.resizing import Size, resize_adapter

from .conftest import save_base

Updates = dict[str, torch.Tensor]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("resized") / "base", num_hidden_layers=2)


def dense_updates(base: Path, adapter: Path) -> Updates:
    """dW of every module as PEFT computes it, fp64."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter)
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.fixture(scope="module")
def made(base, tmp_path_factory) -> tuple[Path, Updates]:
    """An adapter with mixed ranks and scales, whose modules are of very different sizes."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 7},
        alpha_pattern={"down_proj": 3},
        base_model_name_or_path=str(base),
    )
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    for index, (_, module) in enumerate(m for m in model.named_modules() if hasattr(m[1], "lora_A")):
        torch.nn.init.normal_(module.lora_B["default"].weight, std=0.1 * 3.0**index)
    folder = tmp_path_factory.mktemp("made") / "adapter"
    model.save_pretrained(folder)
    return folder, dense_updates(base, folder)


def all_singular(updates: Updates) -> list[tuple[float, str]]:
    """Every singular value of every dense update with its module, largest first."""
    values = [(float(s), name) for name, dw in updates.items() for s in torch.linalg.svdvals(dw)]
    return sorted([v for v in values if v[0] > 1e-4], reverse=True)


def truncated(dw: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vt = torch.linalg.svd(dw)
    return u[:, :rank] * s[:rank] @ vt[:rank]


def expected_ranks(updates: Updates, size: Size) -> dict[str, int]:
    """One threshold over all modules, by trying every number of triples."""
    ordered = all_singular(updates)
    energy = sum(s**2 for s, _ in ordered)
    cost = {name: sum(dw.shape) for name, dw in updates.items()}
    for count in range(len(ordered) + 1):
        kept = ordered[:count]
        following = ordered[: count + 1]
        if (
            (size.rank is not None and count == size.rank * len(updates))
            or (size.threshold is not None and (count == len(ordered) or ordered[count][0] < size.threshold))
            or (size.parameters is not None and sum(cost[n] for _, n in following) > size.parameters)
            or (size.keep is not None and sum(s**2 for s, _ in kept) >= size.keep * energy)
        ):
            return {name: sum(n == name for _, n in kept) for name in updates}
    raise AssertionError


@pytest.mark.parametrize("size", [Size(rank=2), Size(parameters=700), Size(keep=0.9), Size(threshold=4.0)])
def test_the_result_is_the_truncated_svd_under_one_threshold(size, made, base, tmp_path):
    folder, updates = made
    changes = {change.name: change for change in resize_adapter(folder, tmp_path / "out", size, False)}
    ranks = expected_ranks(updates, size)
    assert {name: change.after for name, change in changes.items()} == ranks
    assert len(set(ranks.values())) > 1
    found = dense_updates(base, tmp_path / "out")
    assert set(found) == {name for name, rank in ranks.items() if rank}
    for name, dw in updates.items():
        best = truncated(dw, ranks[name])
        if ranks[name]:
            assert (found[name] - best).abs().max() < 1e-5 * dw.abs().max()
        assert changes[name].error == pytest.approx(float((dw - best).norm()), rel=1e-4, abs=1e-5)
        assert changes[name].norm == pytest.approx(float(dw.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("size", "rank"),
    [(Size(rank=3), 3), (Size(parameters=600), 2), (Size(keep=0.9), None), (Size(threshold=4.0), None)],
)
def test_uniform_gives_every_module_the_same_rank(size, rank, made, base, tmp_path):
    folder, updates = made
    if size.keep is not None:
        energy = sum(float(dw.norm()) ** 2 for dw in updates.values())
        rank = next(
            r
            for r in range(1, 8)
            if sum(float(truncated(dw, r).norm()) ** 2 for dw in updates.values()) >= size.keep * energy
        )
    if size.threshold is not None:
        rank = max(sum(n == name and s >= 4.0 for s, n in all_singular(updates)) for name in updates)
    resize_adapter(folder, tmp_path / "out", size, True)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == rank and set(config["rank_pattern"].values()) <= {rank}
    for name, dw in dense_updates(base, tmp_path / "out").items():
        assert (dw - truncated(updates[name], rank)).abs().max() < 1e-5 * updates[name].abs().max()


def test_growing_leaves_the_function_and_the_new_triples_receive_a_gradient(made, base, tokens, tmp_path):
    assert (
        main(
            [
                "resize",
                "--adapter",
                str(made[0]),
                "--output",
                str(tmp_path / "out"),
                "--rank",
                "9",
                "--uniform",
            ]
        )
        == 0
    )
    before = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), made[0])
    after = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(base), tmp_path / "out", is_trainable=True
    )
    logits = after(tokens, labels=tokens)
    assert (logits.logits - before(tokens).logits).abs().max() < 1e-5
    logits.loss.backward()
    grown = [m for m in after.modules() if hasattr(m, "lora_A")]
    assert len(grown) == 4
    for module in grown:
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        new = ~b.any(0)
        assert a.shape[0] == b.shape[1] == 9 and int(new.sum()) in (5, 2)
        assert b.grad[:, new].abs().amax(0).min() > 0
        assert a[new].any(1).all()


def test_a_module_that_keeps_its_rank_keeps_its_factors(made, tmp_path):
    resize_adapter(made[0], tmp_path / "out", Size(rank=7), True)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)[key], load_file(made[0] / WEIGHTS)[key])


def test_the_dtype_of_the_factors_stays_and_its_rounding_is_in_the_error(made, base, tmp_path):
    half = shutil.copytree(made[0], tmp_path / "half")
    save_file({k: v.bfloat16() for k, v in load_file(half / WEIGHTS).items()}, half / WEIGHTS)
    changes = resize_adapter(half, tmp_path / "out", Size(keep=0.999), False)
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {torch.bfloat16}
    before = {k: v.float() for k, v in load_file(half / WEIGHTS).items()}
    save_file(before, half / WEIGHTS)
    save_file(
        {k: v.float() for k, v in load_file(tmp_path / "out" / WEIGHTS).items()}, tmp_path / "out" / WEIGHTS
    )
    old, new = dense_updates(base, half), dense_updates(base, tmp_path / "out")
    for change in changes:
        if change.after:
            assert change.error == pytest.approx(
                float((old[change.name] - new[change.name]).norm()), rel=1e-3
            )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--rank", "0"], "--rank is 0: give at least 1"),
        (["--parameters", "-3"], "--parameters is -3: give at least 1"),
        (["--keep", "1.5"], "--keep is 1.5: give a share above 0, at most 1"),
        (["--threshold", "nan"], "--threshold is nan: give a singular value above 0"),
        (["--rank", "5"], "but the adapter has only 19 that change anything: add --uniform"),
        (["--parameters", "10"], "at this size no triple is left"),
        (["--rank", "40", "--uniform"], "at most 32 is possible with --uniform"),
    ],
)
def test_a_size_that_cannot_be_is_refused(options, sentence, made, tmp_path, capsys):
    assert main(["resize", "--adapter", str(made[0]), "--output", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_effect_or_with_nan_is_refused(made, tmp_path):
    for value, sentence in ((0.0, "changes nothing"), (torch.nan, "values that are not finite")):
        copy = shutil.copytree(made[0], tmp_path / "copy", dirs_exist_ok=True)
        stored = load_file(copy / WEIGHTS)
        save_file({k: v * value if "lora_B" in k else v for k, v in stored.items()}, copy / WEIGHTS)
        with pytest.raises(RunError, match=sentence):
            resize_adapter(copy, tmp_path / "out", Size(rank=1), False)
        assert not (tmp_path / "out").exists()


def test_an_output_is_replaced_only_by_the_same_size(made, tmp_path):
    resize_adapter(made[0], tmp_path / "out", Size(rank=1), False)
    resize_adapter(made[0], tmp_path / "out", Size(rank=1), False)
    with pytest.raises(RunError, match="was made of something else"):
        resize_adapter(made[0], tmp_path / "out", Size(rank=2), False)
