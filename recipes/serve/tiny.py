"""What recipes/serve/vllm.py serves: a tiny random Llama, an encoder of instructions, and two adapters."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from peft_queryable import QueryableLoraConfig, Routes, export_lora

OUTPUT = Path("outputs/serve-vllm").absolute()
VOCAB = 128


def make_models() -> Routes:
    """The base model, an encoder of instructions, and two adapters; returns the routes of the group `legal`."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=2,  # of width 64, the least that vLLM takes on a CPU
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(OUTPUT / "base")
    tokenizer().save_pretrained(OUTPUT / "base")
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    BertModel(bert).save_pretrained(OUTPUT / "bert")
    tokenizer().save_pretrained(OUTPUT / "bert")
    transformer = Transformer(str(OUTPUT / "bert"))
    encoder = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())])
    encoder.save(str(OUTPUT / "encoder"))

    make_adapter("told", query_terms=("instruction",), instruction_encoder=str(OUTPUT / "encoder"))
    routed = make_adapter("routed")
    settings = routed.base_model.queryable_lora_router["default"].settings
    weights = (3 * torch.randn(settings.num_blocks, settings.num_atoms)).softmax(-1)
    routes = Routes(dict(enumerate(weights)))
    export_lora(routed, OUTPUT / "adapters/routed/groups/legal", routes)
    return routes


def make_adapter(name: str, **fields: Any) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(OUTPUT / "base")
    config = QueryableLoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", **fields)
    model = get_peft_model(base, config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(OUTPUT / "adapters" / name)
    return model


def tokenizer() -> Fast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Fast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
