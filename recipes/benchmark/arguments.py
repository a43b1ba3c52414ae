"""The arguments of the recipe."""

from dataclasses import dataclass, field

from recipes.benchmark.methods import METHODS
from recipes.benchmark.shapes import MODELS
from recipes.benchmark.work import WORKS

SWEEPS = {
    "length": (64, 128, 256, 512, 1024),
    "batch": (1, 2, 4, 8, 16),
    "r": (4, 8, 16, 32, 64),
    "num_atoms": (4, 8, 16, 32, 64),
    "top_k": (1, 2, 4, 8, 16),
    "num_blocks": (1, 2, 4, 8),
    "modules": (1, 2, 3, 4, 5, 6, 7),
}
QUICK = {"models": ["tiny"], "rounds": 2, "length": 16, "prompt": 8, "new_tokens": 3}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/benchmark", metadata={"help": "Folder for the JSON, tables and figures."})
    models: list[str] = field(
        default_factory=lambda: ["SmolLM2-135M", "Qwen2.5-0.5B"],
        metadata={"help": "Shapes to measure, with random weights.", "choices": list(MODELS)},
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "lora must be among them.", "choices": list(METHODS)}
    )
    works: list[str] = field(
        default_factory=lambda: list(WORKS),
        metadata={"help": "What the models do; `none` leaves the sweeps alone.", "choices": [*WORKS, "none"]},
    )
    modes: list[str] = field(
        default_factory=lambda: ["eager"],
        metadata={
            "help": "Without or with torch.compile; memory and sweeps are eager.",
            "choices": ["eager", "compile"],
        },
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    dtype: str = field(default="float32", metadata={"help": "Type of the base model's weights."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    rounds: int = field(default=15, metadata={"help": "Measurements of each method."})
    length: int = field(default=256, metadata={"help": "Tokens per row in prefill and training."})
    batch: int = field(default=2, metadata={"help": "Rows in prefill and training."})
    prompt: int = field(default=64, metadata={"help": "Tokens per row before decoding."})
    new_tokens: int = field(default=16, metadata={"help": "Tokens per row that are decoded."})
    sweeps: list[str] = field(
        default_factory=lambda: list(SWEEPS),
        metadata={"help": "Sizes to sweep, on the first of the models.", "choices": [*SWEEPS, "none"]},
    )
    quick: bool = field(default=False, metadata={"help": "A tiny model, few rounds and two values per sweep."})
    profile: bool = field(default=False, metadata={"help": "Profile instead of measuring."})
    write_docs: bool = field(default=False, metadata={"help": "Put the tables and figures into docs/speed.md."})
