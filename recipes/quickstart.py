# %% [markdown]
# # Quickstart
#
# The life of an adapter, in a minute on a CPU: train it, look at its routes, save and load it, and make a plain LoRA
# or a merged model of it. The base model is a tiny Llama that is made here, so nothing comes from the Hub.

# %%
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_queryable import QueryableLoraConfig, export_lora, fix_routes, mean_routes, record_routing

STEPS, FOLDER = 401, "outputs/quickstart"
torch.manual_seed(0)
torch.set_num_threads(1)  # the fastest for a model as small as this
tiny = LlamaConfig(
    vocab_size=66,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_hidden_layers=8,
    initializer_range=0.1,
)
base = LlamaForCausalLM(tiny)
base.save_pretrained(f"{FOLDER}/base")

# %% [markdown]
# **Train.** Each row counts up or down from a random number, modulo 64. Its first token says which.

# %%
UP, DOWN = 64, 65


def rows(first: int) -> torch.Tensor:  # [16, 12]
    steps = torch.arange(11) * (1 if first == UP else -1)
    return torch.cat([torch.full((16, 1), first), (torch.randint(64, (16, 1)) + steps) % 64], dim=1)


config = QueryableLoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(STEPS):
    ids = torch.cat([rows(UP), rows(DOWN)])
    labels = ids.masked_fill(torch.arange(12) < 2, -100)  # nothing tells where a row starts to count
    loss = model(input_ids=ids, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# %% [markdown]
# **Look at the routes**: each block's mean weights over the 16 atoms, for rows of either kind.

# %%
model.eval().requires_grad_(False)
traces = {}
for name, ids in (("up", rows(UP)), ("down", rows(DOWN))):
    with record_routing(model) as traces[name]:
        logits = model(input_ids=ids).logits
    for block, weights in traces[name].weights().items():  # [tokens, atoms]
        print(f"counting {name}, block {block}:", *(f"{weight:.2f}" for weight in weights.mean(0)))

# %% [markdown]
# **Save and load.** `import peft_queryable` comes before `from_pretrained`: PEFT does not find plugins by itself.

# %%
model.save_pretrained(f"{FOLDER}/adapter")
loaded = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{FOLDER}/base"), f"{FOLDER}/adapter").eval()
with torch.no_grad():
    print("same logits after loading:", torch.equal(loaded(input_ids=ids).logits, logits))

# %% [markdown]
# **Export and merge.** With its routes fixed, here at their mean for counting down, the adapter is a plain LoRA: it
# loads without this library, and merges. What it loses is the routing.

# %%
routes = mean_routes(traces["down"])
export_lora(model, f"{FOLDER}/lora", routes)
plain = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(f"{FOLDER}/base"), f"{FOLDER}/lora").eval()
with fix_routes(loaded, routes):
    merged = loaded.merge_and_unload()
labels = ids.masked_fill(torch.arange(12) < 2, -100)
for name, adapted in (("routed", model), ("exported", plain), ("merged", merged)):
    print(f"loss counting down, {name}: {adapted(input_ids=ids, labels=labels).loss:.4f}")
