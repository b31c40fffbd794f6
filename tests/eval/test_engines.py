"""Engines against plain `transformers`, one prompt at a time."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from dynrank_ds.errors import ModelError, RunError
from dynrank_eval.engines import Completion, Engine, Request, start_engine
from dynrank_eval.engines.model import (
    ModelSpec,
    adapter_rank,
    check_length,
    check_model,
    encode_prompts,
    load_tokenizer,
)
from dynrank_eval.engines.serving import allowed_rank, needs_merging, parallel_size

LENGTH = 24


@pytest.fixture(scope="module")
def prompts(tiny_model: Path) -> list[list[int]]:
    """20 prompts of unequal length."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh 0123.", k=draw.randint(1, 40))) for _ in range(20)]
    return encode_prompts(load_tokenizer(str(tiny_model)), texts)


def spec(model: Path, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(str(model), adapter, "fp32", 128)


def complete(
    engine: Engine, prompts: list[list[int]], stop: tuple[str, ...] = (), length: int = LENGTH
) -> list[Completion]:
    """Greedily, in the order of the prompts."""
    done = dict(engine.generate([Request(prompt, length, stop) for prompt in prompts]))
    return [done[place] for place in range(len(prompts))]


def plain_greedy(model_dir: Path, adapter: Path | None, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Argmax of a full forward per token: no cache, no padding, no generate()."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    results = []
    for prompt in prompts:
        ids = list(prompt)
        while len(ids) < len(prompt) + LENGTH and ids[-1] != 1:
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        results.append(tuple(ids[len(prompt) :]))
    return results


def test_every_prompt_has_exactly_one_bos_and_no_eos(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model))
    plain, written = encode_prompts(tokenizer, ["abc", "<s>abc"])
    assert plain == written == [0, *tokenizer.convert_tokens_to_ids(list("abc"))]
    tokenizer.backend_tokenizer.post_processor = None
    assert encode_prompts(tokenizer, ["abc"]) == [plain[1:]], "no BOS where the tokenizer prepends none"
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert encode_prompts(tokenizer, ["abc"]) == [plain]


@pytest.mark.parametrize("adapted", [False, True])
def test_hf_engine_equals_plain_argmax(
    tiny_model: Path, tiny_adapter: Path, prompts: list[list[int]], adapted: bool
) -> None:
    prompts = prompts[:12]
    adapter = tiny_adapter if adapted else None
    completions = complete(start_engine("hf", spec(tiny_model, adapter)), prompts)
    expected = plain_greedy(tiny_model, adapter, prompts)
    assert [completion.token_ids for completion in completions] == expected
    assert len(set(expected)) > 10, "the texts of the model are too much alike to show anything"
    base = plain_greedy(tiny_model, None, prompts) if adapted else []
    assert base != expected


def test_hf_engine_cuts_before_the_first_stop_string(tiny_model: Path, prompts: list[list[int]]) -> None:
    engine = start_engine("hf", spec(tiny_model))
    whole = complete(engine, prompts)
    stop = whole[0].text[5:8]
    stopped = complete(engine, prompts, (stop,))
    for free, cut in zip(whole, stopped, strict=True):
        assert cut.text == free.text.split(stop)[0]
        assert cut.token_ids == free.token_ids[: cut.n_tokens]
    characters = [token for token in stopped[0].token_ids if token > 2]
    assert len(characters) == whole[0].text.index(stop) + len(stop), (
        "generation goes on after the stop string"
    )


def test_hf_engine_ignores_the_models_sampling_settings(
    tiny_model: Path, tmp_path: Path, prompts: list[list[int]]
) -> None:
    altered = shutil.copytree(tiny_model, tmp_path / "altered")
    (altered / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.6, "repetition_penalty": 5.0, "eos_token_id": [1, 20]}'
    )
    plain = complete(start_engine("hf", spec(tiny_model)), prompts)
    with_settings = complete(start_engine("hf", spec(altered)), prompts)
    for free, ended in zip(plain, with_settings, strict=True):
        expected = free.token_ids
        if 20 in expected:
            expected = expected[: expected.index(20) + 1]
        assert ended.token_ids == expected


def test_a_draw_does_not_depend_on_what_runs_beside_it(tiny_model: Path, prompts: list[list[int]]) -> None:
    """Each request has its own generator, and the shares are the model's."""
    engine = start_engine("hf", spec(tiny_model))
    requests = [Request(prompt, 8, (), 1.0, 1.0, seed) for seed, prompt in enumerate(prompts)]
    together = dict(engine.generate(requests))
    alone = dict(engine.generate(requests[3:4]))
    assert together[3] == alone[0]
    same = [Request(prompts[0], 1, (), 0.7, 1.0, seed) for seed in range(600)]
    firsts = [completion.token_ids[0] for _, completion in engine.generate(same)]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        share = torch.softmax(model(torch.tensor([prompts[0]])).logits[0, -1] / 0.7, dim=-1)
    likely = int(share.argmax())
    expected = float(share[likely])
    error = (expected * (1 - expected) / 600) ** 0.5
    assert abs(firsts.count(likely) / 600 - expected) < 4 * error


VLLM_SCRIPT = """
import json, sys
from pathlib import Path
from dynrank_ds.errors import RunError
from dynrank_eval.engines import Request, start_engine
from dynrank_eval.engines.model import ModelSpec
model, adapters, prompts, length, stop, output = json.loads(sys.argv[1])
rows = []
probe = tuple(map(tuple, prompts[:8]))
for adapter in adapters:
    served = None if adapter is None else Path(adapter)
    try:
        engine = start_engine("vllm", ModelSpec(model, served, "fp32", 128, probe))
    except RunError as error:
        rows.append(str(error))
        break
    for stops in ([], stop):
        done = dict(engine.generate([Request(prompt, length, tuple(stops)) for prompt in prompts]))
        rows.append([(done[place].text, done[place].token_ids) for place in range(len(prompts))])
    del engine  # its end takes vLLM's global groups along, the next engine's too
Path(output).write_text(json.dumps(rows))
"""


def by_vllm(
    model: Path, adapters: list[Path | None], prompts: list[list[int]], stop: str, output: Path
) -> tuple[list[Any], str]:
    """Per adapter the completions without and with a stop string, or the refusal; and what was logged.

    In a process of its own: vLLM changes threads and process groups of the one it runs in.
    """
    pytest.importorskip("vllm", reason="vllm is not installed")
    folders = [None if adapter is None else str(adapter) for adapter in adapters]
    job = json.dumps([str(model), folders, prompts, LENGTH, [stop], str(output)])
    done = subprocess.run([sys.executable, "-c", VLLM_SCRIPT, job], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text()), done.stderr


def by_hf(model: Path, adapters: list[Path | None], prompts: list[list[int]], stop: str) -> list[Any]:
    references = [start_engine("hf", spec(model, adapter)) for adapter in adapters]
    made = [complete(engine, prompts, stops) for engine in references for stops in ((), (stop,))]
    return [[[c.text, list(c.token_ids)] for c in completions] for completions in made]


def make_adapter(model: Path, folder: Path, **options: object) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **options)
    get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def test_vllm_engine_with_an_adapter_equals_hf_engine(
    tiny_model: Path, tiny_adapter: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    stop = complete(start_engine("hf", spec(tiny_model)), prompts[:1])[0].text[5:8]
    made, _ = by_vllm(tiny_model, [tiny_adapter], prompts[:10], stop, tmp_path / "made.json")
    assert made == by_hf(tiny_model, [tiny_adapter], prompts[:10], stop)


@pytest.mark.slow
def test_vllm_engine_equals_hf_engine_without_adapter_and_with_one_that_is_merged(
    tiny_model: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    """What vLLM cannot serve is merged, what changes nothing refused."""
    weighted = make_adapter(tiny_model, tmp_path / "dora", use_dora=True, init_lora_weights=False)
    empty = make_adapter(tiny_model, tmp_path / "empty")
    made, logged = by_vllm(tiny_model, [None, weighted, empty], prompts, "ab", tmp_path / "made.json")
    assert made[:4] == by_hf(tiny_model, [None, weighted], prompts, "ab")
    assert "merged into" in logged and "weight-decomposed" in logged
    assert "changes nothing" in made[4]


def test_an_adapter_that_changes_nothing_is_refused(
    tiny_model: Path, tiny_adapter: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    probe = tuple(map(tuple, prompts[:8]))
    empty = make_adapter(tiny_model, tmp_path / "empty")
    with pytest.raises(RunError, match="changes nothing"):
        start_engine("hf", ModelSpec(str(tiny_model), empty, "fp32", 128, probe))
    start_engine("hf", ModelSpec(str(tiny_model), tiny_adapter, "fp32", 128, probe))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 513}, "rank 513 is above 512"),
        ({"rank_pattern": {"x": 0}}, "rank 0"),
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "gaussian"}, None),
        ({}, None),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_known(
    change: dict[str, object], reason: str | None, tiny_adapter: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_adapter, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    found = needs_merging(folder)
    assert (found is None) if reason is None else (found is not None and reason in found)


def test_lora_rank_and_gpus_that_vllm_allows(tiny_model: Path, tiny_adapter: Path) -> None:
    assert adapter_rank(tiny_adapter) == 9
    assert allowed_rank(tiny_adapter) == 16
    assert [parallel_size(str(tiny_model), gpus) for gpus in (1, 2, 3, 8)] == [1, 2, 2, 2]


def test_gpus_share_the_mlp_evenly_too(tmp_path: Path) -> None:
    """LLaMA-2-13B: 40 heads go into 5, an MLP of 13824 does not."""
    LlamaConfig(num_attention_heads=40, hidden_size=5120, intermediate_size=13824).save_pretrained(tmp_path)
    assert [parallel_size(str(tmp_path), gpus) for gpus in (4, 5, 7, 8)] == [4, 4, 4, 8]


def test_incomplete_folders_are_named(tiny_model: Path, tmp_path: Path) -> None:
    for name, files, missing in [
        ("a", [], "config.json"),
        ("b", ["config.json"], "tokenizer"),
        ("c", ["config.json", "tokenizer.json"], "safetensors"),
        ("d", ["config.json", "tokenizer.json", "pytorch_model.bin"], "safetensors"),
    ]:
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).touch()
        with pytest.raises(ModelError, match=missing):
            check_model(str(tmp_path / name))
    with pytest.raises(ModelError, match="no such folder"):
        check_model(str(tmp_path / "absent"))
    with pytest.raises(RunError, match=r"adapter_config\.json"):
        adapter_rank(tmp_path)
    with pytest.raises(ModelError, match="1024 positions"):
        check_length(str(tiny_model), 1025)
    check_length(str(tiny_model), 1024)
    check_model("meta-llama/Llama-2-7b-hf")


def test_completions_keep_their_leading_space(data_dir: Path) -> None:
    """SentencePiece's decoder drops it from tokens that stand alone; in code it is indentation."""
    model = str(data_dir / "tiny-llama" / "stories260K-hf")
    tokenizer = load_tokenizer(model)
    texts = ["Once upon a", "Tom and", "One day,"]
    ids = encode_prompts(tokenizer, texts)
    completions = complete(start_engine("hf", ModelSpec(model, None, "fp32", 64)), ids, length=12)
    for text, prompt, completion in zip(texts, ids, completions, strict=True):
        whole = tokenizer.decode([*prompt, *completion.token_ids], skip_special_tokens=True)
        assert text + completion.text == whole
    assert any(completion.text.startswith(" ") for completion in completions)
