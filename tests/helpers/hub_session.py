"""A session of a user with a Hub, in a process of its own: huggingface_hub reads its settings when it is imported.

python -m helpers.hub_session RESULTS: saves logits, by what they were computed with, and the pushed cards.
"""

import re
import sys

import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM

from helpers.models import adapted, outputs, randomise, token_ids
from peft_queryable import model_card

BASE, ADAPTER = "user/base", "user/adapter"


def main(results_path: str) -> None:
    torch.manual_seed(0)
    ids = {"input_ids": token_ids()}
    base = AutoModelForCausalLM.from_pretrained(BASE)
    model = adapted(base, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")

    randomise(model)
    logits = {"pushed as v1": outputs(model, ids)}
    model.push_to_hub(ADAPTER, revision="v1")
    randomise(model)
    logits["pushed as main"] = outputs(model, ids)
    model.push_to_hub(ADAPTER)
    cards = {"PEFT's push": str(ModelCard.load(ADAPTER))}
    model_card(ADAPTER).push_to_hub(ADAPTER)
    cards["ours"] = str(ModelCard.load(ADAPTER))
    model.push_to_hub(ADAPTER)
    cards["pushed again"] = str(ModelCard.load(ADAPTER))

    for revision in ("v1", "main"):
        base = AutoModelForCausalLM.from_pretrained(BASE)
        logits[f"PeftModel {revision}"] = outputs(PeftModel.from_pretrained(base, ADAPTER, revision=revision), ids)
        logits[f"AutoPeftModel {revision}"] = outputs(
            AutoPeftModelForCausalLM.from_pretrained(ADAPTER, revision=revision), ids
        )
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", cards["ours"], re.DOTALL)[1], namespace)
    logits["card"] = outputs(namespace["model"], ids)
    torch.save({"logits": logits, "cards": cards}, results_path)


if __name__ == "__main__":
    main(sys.argv[1])
