# /// script
# dependencies = ["peft_queryable"]
# ///
"""The life of an adapter on a CPU: train it, look at its routes, save it, load it. Nothing comes from the Hub.

python -m recipes.quickstart
"""

import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_queryable import QueryableLoraConfig, record_routing

UP, DOWN = 64, 65  # the first token of a row, which says how the numbers after it go on
CONFIG = LlamaConfig(
    vocab_size=66,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_hidden_layers=8,
    initializer_range=0.1,
)


def rows(first: int) -> torch.Tensor:
    """Sixteen rows [16, 12] that count up or down from a random number, modulo 64."""
    steps = torch.arange(11) * (1 if first == UP else -1)
    return torch.cat([torch.full((16, 1), first), (torch.randint(64, (16, 1)) + steps) % 64], dim=1)


def main(steps: int = 401, folder: str = "outputs/quickstart") -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the fastest for a model as small as this
    base = LlamaForCausalLM(CONFIG)
    base.save_pretrained(f"{folder}/base")
    model = get_peft_model(base, QueryableLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids = torch.cat([rows(UP), rows(DOWN)])
        labels = ids.masked_fill(torch.arange(12) < 2, -100)  # nothing tells where a row starts to count
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    model.eval()
    for name, ids in (("up", rows(UP)), ("down", rows(DOWN))):
        with torch.no_grad(), record_routing(model) as trace:
            logits = model(input_ids=ids).logits
        for block, weights in trace.weights().items():  # [tokens, atoms]
            print(f"counting {name}, mean route of block {block}:", *(f"{weight:.2f}" for weight in weights.mean(0)))

    model.save_pretrained(f"{folder}/adapter")
    loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapter")
    with torch.no_grad():
        print("same logits after loading:", torch.equal(loaded.eval()(input_ids=ids).logits, logits))


if __name__ == "__main__":
    main()
