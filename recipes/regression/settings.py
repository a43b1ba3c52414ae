"""The settings of the paper's Sec. 4.1 and B.3, a short one that a CPU can do, and what a run is."""

from dataclasses import dataclass
from typing import NamedTuple

RANK, ALPHA = 8, 16  # B.3; Sec. 4.1 states neither


@dataclass(frozen=True)
class Setting:
    """What Sec. 4.1 and B.3 fix. What only one of them states is used for both.

    Args:
        backbone: one of `BACKBONES`.
        target_train: target examples for adaptation.
        target_test: held-out target examples, whose number Sec. 4.1 does not tell.
        matmul_precision: torch's name for it; "medium" allows bfloat16 where a CPU has instructions for such products
            (AMX). The paper states none.
    """

    backbone: str
    target_train: int
    target_test: int = 800
    source_train: int = 2400  # of 3,000; the rest is for testing
    source_test: int = 600
    pretrain_epochs: int = 300
    epochs: int = 5000
    pretrain_lr: float = 3e-3  # for the MLP too, for which B.3 states none
    lr: float = 5e-4
    batch_size: int = 64
    matmul_precision: str = "highest"


SETTINGS = {
    "wide": Setting("wide", target_train=1200),
    "deep": Setting("deep", target_train=400),
    "wide-short": Setting("wide", target_train=1200, pretrain_epochs=100, epochs=200, matmul_precision="medium"),
}


class Run(NamedTuple):
    function: str
    seed: int
