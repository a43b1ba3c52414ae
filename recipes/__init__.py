"""Programs that train, instruct and measure Queryable LoRA; README.md lists their commands."""

import logging
import os
import warnings

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # of what takes a moment; training keeps its own
# What other packages say at every import and every training, and no user can act on: kernels for other machines, and
# TRL's use of transformers' old name for `activation_checkpointing`.
for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", r"`(is_)?gradient_checkpointing` is deprecated", FutureWarning)
