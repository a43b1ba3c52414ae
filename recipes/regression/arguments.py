"""The arguments of the recipe."""

import os
from dataclasses import dataclass, field

from recipes.regression.baselines import METHODS
from recipes.regression.functions import FUNCTIONS
from recipes.regression.settings import SETTINGS
from recipes.regression.variants import ABLATIONS, SWEEP

GROUPS = {"paper": METHODS, "ablations": tuple(ABLATIONS), "sweep": tuple(SWEEP)}
QUICK = {"functions": ["Ackley", "Sin-Cos"], "seeds": 1, "epochs": 2, "compiled": False, "processes": 1}
QUICK_SETTING = {"pretrain_epochs": 1, "source_train": 128, "target_train": 96, "target_test": 32}


@dataclass
class Arguments:
    output_dir: str = field(default="outputs/regression", metadata={"help": "Folder for results and backbones."})
    setting: str = field(
        default="deep",
        metadata={"help": "wide: Tables 1 and 2; wide-short: a cut of it; deep: 9 and 10.", "choices": list(SETTINGS)},
    )
    methods: list[str] = field(
        default_factory=lambda: ["paper"],
        metadata={"help": "Methods to train, or groups.", "choices": [*GROUPS, *METHODS, *ABLATIONS, *SWEEP]},
    )
    functions: list[str] = field(
        default_factory=lambda: list(FUNCTIONS), metadata={"help": "Functions to learn.", "choices": list(FUNCTIONS)}
    )
    seeds: int = field(default=5, metadata={"help": "Runs of each function, with seeds 0, 1, ..."})
    epochs: int | None = field(
        default=None, metadata={"help": "Of adaptation, if not the paper's; the results get a file of their own."}
    )
    at_once: int = field(default=45, metadata={"help": "Runs that train as one stacked model; memory limits them."})
    encoder: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the sentence-transformers model that reads descriptions."}
    )
    device: str = field(default="cpu", metadata={"help": "Device of the models.", "choices": ["cpu", "cuda"]})
    processes: int = field(
        default=os.cpu_count() or 1,
        metadata={"help": "Stacked models that train side by side, each on one thread."},
    )
    compiled: bool = field(default=True, metadata={"help": "Use torch.compile, which needs a C++ compiler on a CPU."})
    quick: bool = field(default=False, metadata={"help": "Two functions, one seed, two epochs: to see that it runs."})
    estimate: bool = field(default=False, metadata={"help": "Time a few steps of each method instead of training."})
