"""Whose tokens a module sees: masks of pairs, heads outside the layers, and layouts that are not known."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable

import pytest
import torch
import transformers
from helpers.architectures import ENCODER, VISION
from helpers.models import CACHE, LLAMA_PROJECTIONS, VOCAB, adapted, llama, outputs, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

LENGTHS = (3, 4)  # of two sequences in one row


def lora(base: nn.Module, targets: list[str] | str = "all-linear", **kwargs) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=4, target_modules=targets)).eval()


METHODS = {
    "lora": lora,
    "queryable": lambda base, targets="all-linear", **kwargs: adapted(base, target_modules=targets, **kwargs),
}


@pytest.fixture(params=METHODS)
def method(request) -> Callable[..., nn.Module]:
    """Wraps a model in float64 with a random adapter: plain LoRA is the control."""

    def wrap(base: nn.Module, *args, **kwargs) -> nn.Module:
        torch.manual_seed(0)
        model = METHODS[request.param](base.double(), *args, **kwargs)
        randomise(model)
        return model

    return wrap


def block_diagonal() -> Tensor:
    """[T, T] bool: each token sees those of its own sequence up to itself."""
    index = torch.tensor([i for i, n in enumerate(LENGTHS) for _ in range(n)])
    return (index[:, None] == index[None, :]).tril()


# Masks that say what each token may see


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_block_diagonal_masks(method, kind):
    """Sequences in one row that a mask [1, 1, T, T] keeps apart give the logits of the sequences alone."""
    model, ids = method(llama(), LLAMA_PROJECTIONS), token_ids(1, sum(LENGTHS))
    visible = block_diagonal()[None, None]
    mask = visible if kind == "bool" else torch.zeros(visible.shape).double().masked_fill(~visible, -torch.inf)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    together = outputs(model, {"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    apart = torch.cat([outputs(model, {"input_ids": part}) for part in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-9)


def test_tree_masks(method):
    """Two continuations of one prefix in one row, as tree drafts are verified, give the logits of each alone."""
    model, prefix, first, second = method(llama(), LLAMA_PROJECTIONS), *token_ids(1, 7).split((3, 2, 2), dim=1)
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    visible[5:, 3:5] = False
    inputs = {
        "input_ids": torch.cat([prefix, first, second], dim=1),
        "attention_mask": visible[None, None],
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 3, 4]]),
    }
    tree = outputs(model, inputs)
    for branch, positions in ((first, slice(3, 5)), (second, slice(5, 7))):
        alone = outputs(model, {"input_ids": torch.cat([prefix, branch], dim=1)})
        torch.testing.assert_close(tree[:, positions], alone[:, 3:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("scope", ["prompt", "sequence"])
def test_one_route_cannot_serve_a_tree(scope):
    """Where one route serves a row, a mask that keeps its tokens apart is refused; a causal one is not."""
    model, ids = adapted(llama(), target_modules=LLAMA_PROJECTIONS, routing_scope=scope), token_ids(1, sum(LENGTHS))
    with pytest.raises(ValueError, match=r"hides tokens from each other, .* `routing_scope='causal'`"):
        model(input_ids=ids, attention_mask=block_diagonal()[None, None])
    causal = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(
        outputs(model, {"input_ids": ids, "attention_mask": causal}), outputs(model, {"input_ids": ids})
    )


def test_masks_of_other_tokens_are_refused():
    """A mask that is about more tokens than the call and its cache hold says that others are kept elsewhere."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS)
    with pytest.raises(ValueError, match=r"4 tokens per row and 0 in its cache, but its attention mask is about 6"):
        model(input_ids=token_ids(1, 4), attention_mask=torch.ones(1, 6))


# Heads


def masked_lm() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER)).eval()


def roberta() -> nn.Module:
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**ENCODER)).eval()


def modern_bert() -> nn.Module:
    config = transformers.ModernBertConfig(**ENCODER, global_attn_every_n_layers=2, num_labels=3)
    return transformers.ModernBertForTokenClassification(config).eval()


def electra() -> nn.Module:
    return transformers.ElectraForMaskedLM(transformers.ElectraConfig(**ENCODER, embedding_size=16)).eval()


@pytest.mark.parametrize("scope", ["auto", "causal", "sequence"])
@pytest.mark.parametrize("build", [masked_lm, roberta, modern_bert, electra], ids=lambda build: build.__name__)
def test_heads_leave_padding_out(method, build, scope):
    """Modules after the layers see the tokens of the layers, with their padding."""
    model = method(build(), routing_scope=scope)
    ids = token_ids(2, 7)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    padded = outputs(model, {"input_ids": ids, "attention_mask": mask})[1:, :4]
    torch.testing.assert_close(padded, outputs(model, {"input_ids": ids[1:, :4]}), rtol=0, atol=1e-9)


def bert_decoder() -> nn.Module:
    return transformers.BertLMHeadModel(transformers.BertConfig(**ENCODER, is_decoder=True)).eval()


class WholeLogits(transformers.BertLMHeadModel):
    """A decoder that has no `logits_to_keep`, as those of older transformers."""

    def forward(self, input_ids, attention_mask=None, use_cache=None, **cache):
        return super().forward(input_ids, attention_mask, use_cache=use_cache, **cache)


def test_a_decoders_head_goes_on_from_the_cache(method):
    """The transform before a decoder's output layer is routed by all tokens so far, cached ones included."""
    base = WholeLogits(transformers.BertConfig(**ENCODER, is_decoder=True)).eval()
    model, ids = method(base), token_ids(2, 7)
    assert any("cls.predictions.transform" in name for name, _ in model.named_parameters() if "lora_A" in name)
    full = outputs(model, {"input_ids": ids})
    with torch.no_grad():
        first = model(input_ids=ids[:, :4], use_cache=True)
        steps = [first.logits]
        for t in range(4, 7):
            steps.append(model(input_ids=ids[:, t : t + 1], **{CACHE: first[CACHE]}).logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=0, atol=1e-9)
    changed = ids.clone()
    changed[:, 5:] = (ids[:, 5:] + 1) % (VOCAB - 3) + 3
    torch.testing.assert_close(outputs(model, {"input_ids": changed})[:, :5], full[:, :5], rtol=0, atol=1e-9)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class Speech(nn.Module):
    """A projection at half the rate of the inputs and an encoder with a mask at that rate, as in wav2vec 2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.projection, self.encoder = nn.Sequential(nn.Linear(8, 8)), Encoder()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.projection(inputs_embeds.unflatten(1, (-1, 2)).mean(2))
        return self.encoder(x, attention_mask=attention_mask[:, ::2])


def test_padding_before_the_layers_is_known_or_refused():
    """A module before the layers whose tokens are not the mask's is refused if the mask hides some."""
    model = adapted(Speech(), target_modules=["projection.0", "layers.0"])
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    model(inputs_embeds=x, attention_mask=mask)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match=r"projection sees 3 tokens per row that no stack .* mask .*, about 6, may"):
        model(inputs_embeds=x, attention_mask=mask)


def roberta_decoder() -> nn.Module:
    return transformers.RobertaForCausalLM(transformers.RobertaConfig(**ENCODER, is_decoder=True)).eval()


def blip() -> nn.Module:
    text = {key: value for key, value in ENCODER.items() if key != "pad_token_id"}
    config = transformers.BlipConfig(text_config=text | {"bos_token_id": 1}, vision_config=VISION)
    return transformers.BlipForConditionalGeneration(config).eval()


def test_heads_of_an_inner_decoder():
    """In BLIP the text decoder generates: its head is left out, and the cache that it wraps is found again."""
    with pytest.warns(UserWarning, match=r"leaves out 2 modules .*transform.dense': .*decoder': it is the language"):
        model = adapted(blip().double(), target_modules="all-linear")
    randomise(model)
    inputs = {"pixel_values": torch.randn(2, 3, 8, 8).double(), "max_new_tokens": 6, "do_sample": False}
    settings = {"output_logits": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**inputs, **settings, use_cache=use_cache) for use_cache in (True, False))
    torch.testing.assert_close(cached.logits, whole.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("build", "head"), [(bert_decoder, "cls"), (roberta_decoder, "lm_head")])
def test_heads_that_get_the_last_tokens_alone(method, build, head):
    """Heads get the last tokens alone in `generate`, but routes need all: "all-linear" leaves them out and says so."""
    ids = token_ids(1, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = method(build(), routing_scope="auto")
    said = [str(w.message) for w in caught if "leaves out 1 modules" in str(w.message)]
    names = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    if "queryable" in model.peft_type.lower():
        assert len(said) == 1 and f"'{head}." in said[0] and "`logits_to_keep`" in said[0]
        assert not any(f".{head}." in name for name in names)
    else:
        assert any(f".{head}." in name for name in names)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(input_ids=ids, **settings)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **settings))
    full = outputs(model, {"input_ids": ids})[:, -1:]
    torch.testing.assert_close(outputs(model, {"input_ids": ids, "logits_to_keep": 1}), full, rtol=0, atol=1e-9)


def test_a_named_head_is_refused():
    """A head that is named is refused when the adapter is made, with a line that works, but not in masked models."""
    with pytest.raises(ValueError, match=r"'cls\.predictions\.transform\.dense' cannot be adapted") as refused:
        adapted(bert_decoder(), target_modules=["dense"])
    pattern = re.search(r"exclude_modules=r'(.*)'`", str(refused.value))[1]
    adapted(bert_decoder(), target_modules=["dense"], exclude_modules=pattern)(token_ids(1, 6), logits_to_keep=1)
    model = adapted(masked_lm(), target_modules=["dense"])
    assert any("cls.predictions.transform" in name for name, _ in model.named_parameters() if "lora_A" in name)


class LastTokens(nn.Module):
    """A decoder whose head may be given the last tokens alone, which no signature says."""

    def __init__(self) -> None:
        super().__init__()
        self.decoder, self.head = Encoder(), nn.Sequential(nn.Linear(8, 8))

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, last: int = 0) -> Tensor:
        return self.head(self.decoder(hidden_states, attention_mask)[:, -last:])


def test_heads_on_a_part_of_the_tokens_are_refused():
    """Where nothing tells it before, a head that gets a part of the tokens is refused in that call."""
    model = adapted(LastTokens(), target_modules=["layers.0", "head.0"])
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    model(x, mask)
    with pytest.raises(ValueError, match=r"head sees 1 tokens per row of the 6 that decoder .*exclude_modules=r'head"):
        model(x, mask, last=1)


def test_only_what_needs_the_tokens_is_refused():
    """Without an active adapter, or with routes that depend on no token, a head on a part of the tokens is fine."""
    base, x, mask = LastTokens(), torch.randn(2, 6, 8), torch.ones(2, 6)
    expected = base(x, mask, last=1)
    model = adapted(base, target_modules=["layers.0", "head.0"])
    randomise(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x, mask, last=1), expected)
    ids, static = token_ids(1, 6), adapted(bert_decoder(), target_modules="all-linear", query_terms=[])
    randomise(static)
    assert any("cls.predictions.transform" in name for name, _ in static.named_parameters() if "lora_A" in name)
    kept = outputs(static, {"input_ids": ids, "logits_to_keep": 1})
    torch.testing.assert_close(kept, outputs(static, {"input_ids": ids})[:, -1:])


@pytest.mark.parametrize("shape", [(2, 5), (2, 1), (1, 6)], ids=str)
def test_prompt_masks_of_another_shape_are_refused(shape):
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, routing_scope="prompt")
    with pytest.raises(ValueError, match=r"`prompt_mask` must have the shape of the call's tokens, \[2, 6\], got"):
        model(input_ids=token_ids(2, 6), prompt_mask=torch.ones(shape))


def test_labels_by_position():
    """Labels that are passed by position tell the prompt as named ones do."""
    model = adapted(llama(), target_modules=LLAMA_PROJECTIONS, routing_scope="prompt")
    randomise(model)
    ids = token_ids(2, 6)
    labels = ids.masked_fill(torch.arange(6) < 3, -100)
    base = model.get_base_model()
    parameters = list(inspect.signature(base.forward).parameters)
    arguments = [
        {"input_ids": ids, "labels": labels}.get(name) for name in parameters[: parameters.index("labels") + 1]
    ]
    assert torch.equal(base(*arguments).logits, base(input_ids=ids, labels=labels).logits)
