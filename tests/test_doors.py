"""Models that are entered elsewhere than at `forward`, and parts of a model that run without each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from helpers.architectures import ENCODER, VISION
from helpers.models import CACHE, VOCAB, adapted, llama, randomise, token_ids
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

METHODS = {
    "lora": lambda base, targets, **kwargs: get_peft_model(base, LoraConfig(r=4, target_modules=targets)).eval(),
    "queryable": lambda base, targets, **kwargs: adapted(base, target_modules=targets, **kwargs),
}


@pytest.fixture(params=METHODS)
def method(request) -> Callable[..., nn.Module]:
    """Wraps a model in float64 with a random adapter: plain LoRA is the control."""

    def wrap(base: nn.Module, targets: list[str] | str = "all-linear", **kwargs) -> nn.Module:
        model = METHODS[request.param](base.double().eval(), targets, **kwargs)
        torch.manual_seed(0)
        randomise(model)
        return model

    return wrap


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


# Two towers


def clip() -> nn.Module:
    config = transformers.CLIPConfig(text_config=ENCODER, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def siglip() -> nn.Module:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=ENCODER, vision_config=VISION))


TOWERS = {
    "clip": (clip, r"(?!.*out_proj).*_proj|.*fc\d|.*projection"),
    "siglip": (siglip, r".*[qkv]_proj|.*fc\d|text_model.head"),
}


def pooled(output) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output


@pytest.fixture(params=TOWERS)
def towers(request, method) -> nn.Module:
    build, targets = TOWERS[request.param]
    return method(build(), targets)


def texts() -> dict[str, Tensor]:
    """Three rows, the second one padded."""
    ids = token_ids(3, 7)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 0, 0
    ids[:, -1] = VOCAB - 1  # what CLIP pools: the largest id
    ids[1, 3] = VOCAB - 1
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_features_are_those_of_the_whole_call(towers):
    """Features of texts or images alone are those of a call with both, of another number of images, too."""
    words, images = texts(), torch.randn(2, 3, 8, 8).double()
    both = towers(**words, pixel_values=images)
    base = towers.get_base_model()
    for features, embeds in (
        (base.get_text_features(**words), both.text_embeds),
        (base.get_image_features(pixel_values=images), both.image_embeds),
    ):
        same(nn.functional.normalize(pooled(features), dim=-1), embeds)


@torch.no_grad()
def test_features_of_rows_alone(towers):
    """Features of a batch are those of each row alone, without its padding."""
    base, words, images = towers.get_base_model(), texts(), torch.randn(2, 3, 8, 8).double()
    together = pooled(base.get_text_features(**words))
    if isinstance(base, transformers.CLIPModel):  # SigLIP pools the last position, which must not be padding
        alone = {name: value[1:2, :4] for name, value in words.items()}
        same(together[1:2], pooled(base.get_text_features(**alone)))
    same(together[:1], pooled(base.get_text_features(**{name: value[:1] for name, value in words.items()})))
    together = pooled(base.get_image_features(pixel_values=images))
    for row in range(2):
        same(together[row : row + 1], pooled(base.get_image_features(pixel_values=images[row : row + 1])))


@torch.no_grad()
def test_an_image_does_not_change_its_text(towers):
    """In a call of pairs, the features of a text do not depend on its image."""
    words, images = texts(), torch.randn(2, 3, 3, 8, 8).double()
    first, second = (towers(**words, pixel_values=pixels).text_embeds for pixels in images)
    assert torch.equal(first, second)


# Modules of one's own


def block(width: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Heads(nn.Module):
    """A trunk, whose layers are in a container of some kind, and heads of which a call runs those it names."""

    def __init__(self, container: Callable) -> None:
        super().__init__()
        self.layers = container([block() for _ in range(3)])
        self.heads = nn.ModuleDict({name: block() for name in "abc"})

    def trunk(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        layers = self.layers.values() if isinstance(self.layers, nn.ModuleDict) else self.layers
        for layer in layers:
            x = x + layer(x)
        return x

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, heads: str = "a") -> Tensor:
        x = self.trunk(hidden_states)
        return torch.stack([self.heads[name](x) for name in heads])

    def forward_features(self, x: Tensor) -> Tensor:
        return self.trunk(x)


CONTAINERS = {
    "list": nn.ModuleList,
    "dict": lambda layers: nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers)}),
    "sequential": lambda layers: nn.Sequential(*layers),
}
TARGETS = {"all": r"(layers|heads)\.\w+\.[02]", "heads": r"heads\.\w+\.[02]"}


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("scope", ["causal", "sequence"])
@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_heads_run_without_each_other(method, container, scope, targets):
    """A head gives the same numbers whatever heads run beside it; rows and padding change nothing."""
    model = method(Heads(CONTAINERS[container]), TARGETS[targets], routing_scope=scope, num_blocks=2)
    x, mask = torch.randn(2, 5, 8).double(), torch.ones(2, 5)
    mask[1, :2] = 0
    together = model(hidden_states=x, attention_mask=mask, heads="abc")
    for index, name in enumerate("abc"):
        same(model(hidden_states=x, attention_mask=mask, heads=name)[0], together[index])
        same(model(hidden_states=x[:1], heads=name)[0], together[index, :1])
        same(model(hidden_states=x[1:, 2:], heads=name)[0], together[index, 1:, 2:])
    same(model(hidden_states=x, attention_mask=mask, heads="cab"), together[[2, 0, 1]])


class Prefixed(nn.Module):
    """Heads whose trunk sees two more tokens than the model is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(2, 8))
        self.body = Heads(nn.ModuleList)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        rows = len(inputs_embeds)
        x = torch.cat([self.prefix.expand(rows, -1, -1), inputs_embeds], 1)
        return self.body(hidden_states=x, attention_mask=torch.cat([torch.ones(rows, 2), attention_mask], 1))


@pytest.mark.parametrize("scope", ["causal", "sequence"])
@torch.no_grad()
def test_heads_see_the_tokens_of_the_call_that_runs_them(method, scope):
    """An entry of a ModuleDict has the padding of the layers beside it, not that of the model's call."""
    model = method(Prefixed(), r"body\.(layers|heads)\.\w+\.[02]", routing_scope=scope)
    x, mask = torch.randn(2, 5, 8).double(), torch.ones(2, 5)
    mask[1, 3:] = 0
    together = model(inputs_embeds=x, attention_mask=mask)[0]
    same(model(inputs_embeds=x[1:, :3], attention_mask=mask[1:, :3])[0, :, :5], together[1:, :5])


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(2)])

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states = hidden_states + layer(hidden_states)
        return hidden_states


class Reader(nn.Module):
    """Two trunks, one after the other, on inputs of their own, and a head that reads the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Trunk(), Trunk(), block()

    def forward(self, question: Tensor, question_mask: Tensor, answer: Tensor, answer_mask: Tensor) -> Tensor:
        self.first(question, question_mask)
        return self.head(self.second(answer, answer_mask))


@pytest.mark.parametrize("scope", ["causal", "sequence"])
@torch.no_grad()
def test_a_head_has_the_padding_of_the_stack_that_ran_last(method, scope):
    """Two stacks have as many tokens; the head reads the last."""
    model = method(Reader(), r"((first|second)\.layers\.\d|head)\.[02]", routing_scope=scope)
    question, answer = torch.randn(2, 2, 5, 8).double()
    whole, mask = torch.ones(2, 5), torch.ones(2, 5)
    mask[1, 3:] = 0
    together = model(question, whole, answer, mask)
    same(model(question[1:], whole[1:], answer[1:, :3], mask[1:, :3]), together[1:, :3])


class Queries(nn.Module):
    """Two tokens more per row, and a mask of its own, in front of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.project(hidden_states)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.trunk = Queries(), Trunk()

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        x = torch.cat([inputs_embeds[:, :2], inputs_embeds], 1)
        mask = torch.cat([attention_mask[:, :2], attention_mask], 1)
        return self.trunk(self.queries(x, mask), mask)


class Patches(Embedded):
    """The model's inputs are under no name that tells tokens."""

    def forward(self, patches: Tensor, attention_mask: Tensor) -> Tensor:
        return self.trunk(self.queries(patches), attention_mask)


@pytest.mark.parametrize("scope", ["causal", "sequence"])
@pytest.mark.parametrize(
    ("kind", "inputs"), [(Embedded, "inputs_embeds"), (Patches, "patches")], ids=["own", "model's"]
)
@torch.no_grad()
def test_masks_in_front_of_the_layers(method, kind, inputs, scope):
    """A module in front of the layers has the padding of a mask of its own, or of the model's about as many tokens."""
    model = method(kind(), r"trunk\.layers\.\d\.[02]|queries\.project", routing_scope=scope)
    x, mask = torch.randn(2, 5, 8).double(), torch.ones(2, 5)
    mask[1, 3:] = 0
    alone = model(**{inputs: x[1:, :3]}, attention_mask=mask[1:, :3])
    same(alone, model(**{inputs: x}, attention_mask=mask)[1:, : alone.shape[1]])


@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_heads_on_one_vector_per_row(method, container):
    model = method(Heads(CONTAINERS[container]), TARGETS["all"])
    x = torch.randn(3, 8).double()
    together = model(hidden_states=x, heads="ab")
    for row in range(3):
        same(model(hidden_states=x[row : row + 1], heads="b")[0], together[1, row : row + 1])


@pytest.mark.parametrize("container", CONTAINERS)
@torch.no_grad()
def test_other_methods_than_forward(method, container):
    """Where a method that nothing tells of runs the layers, the call is refused or gives the numbers of `forward`."""
    model, x = method(Heads(CONTAINERS[container]), TARGETS["all"]), torch.randn(2, 5, 8).double()
    base = model.get_base_model()
    if "queryable" in model.peft_type.lower():
        with pytest.raises((RuntimeError, ValueError), match=r"outside a call of the model"):
            base.forward_features(x)
    else:
        base.forward_features(x)


class NanoGPT(nn.Module):
    """A decoder that keeps its list of layers in a dict, as nanoGPT does, with a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.ModuleList([block() for _ in range(3)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(VOCAB, 8), "h": layers, "out": nn.Linear(8, 8)})
        self.head = nn.Linear(8, VOCAB)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.transformer["wte"](input_ids)
        for layer in self.transformer["h"]:
            x = x + layer(x)
        return self.head(self.transformer["out"](x))


@torch.no_grad()
def test_lists_in_a_dict(method):
    """Layers in a list in a dict are a stack of the module that holds the dict."""
    model = method(NanoGPT(), r".*h\.\d\.[02]|.*out|head")
    ids, mask = token_ids(2, 6), torch.ones(2, 6)
    mask[1, :2] = 0
    together = model(input_ids=ids, attention_mask=mask)
    same(model(input_ids=ids[:1])[0], together[0])
    same(model(input_ids=ids[1:, 2:])[0], together[1, 2:])
    changed = ids.clone()
    changed[:, 4:] = (ids[:, 4:] + 1) % VOCAB
    assert torch.equal(model(input_ids=changed, attention_mask=mask)[:, :4], together[:, :4])


class Projected(nn.Module):
    """A decoder of transformers between two projections of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.project_in, self.project_out = nn.Linear(8, 32), nn.Linear(32, 8)
        self.model = llama().model

    def forward(self, inputs_embeds: Tensor, attention_mask=None, position_ids=None, past_key_values=None) -> Tensor:
        inputs = {"inputs_embeds": self.project_in(inputs_embeds), CACHE: past_key_values}
        inputs["use_cache"] = past_key_values is not None
        hidden = self.model(attention_mask=attention_mask, position_ids=position_ids, **inputs)[0]
        return self.project_out(hidden)


@torch.no_grad()
def test_modules_of_the_model_see_its_tokens(method):
    """A module before the layers and one after them see padding, packing and the cache of the model's call."""
    model, x = method(Projected(), ["project_in", "project_out", "q_proj"]), torch.randn(2, 6, 8).double()
    full = model(inputs_embeds=x)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    padded = model(inputs_embeds=x, attention_mask=mask)
    same(padded[1, 2:], model(inputs_embeds=x[1:, 2:])[0])
    packed = model(inputs_embeds=x.reshape(1, 12, 8), position_ids=torch.arange(6).repeat(2)[None])
    same(packed.reshape(2, 6, 8), full)
    cache = transformers.DynamicCache()
    steps = [model(inputs_embeds=part, past_key_values=cache) for part in x.split([3, 1, 2], dim=1)]
    same(torch.cat(steps, dim=1), full)


def test_tokens_of_no_call_are_refused():
    """A module that gets tokens outside a call of the model is refused: nothing tells which of them are padding."""
    model = adapted(Projected(), target_modules=["project_in", "project_out", "q_proj"])
    with pytest.raises(ValueError, match=r"project_in was called outside a call of the model, .*project_in"):
        model.get_base_model().project_in(torch.randn(2, 6, 8))
    model.get_base_model().project_in(torch.randn(2, 8))


class Cut(nn.Module):
    """A model whose encoder runs on longer rows than its own, as BigBird's, which fills up to whole blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.classifier = Encoder(), nn.Linear(8, 3)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, mask = (nn.functional.pad(t, pad) for t, pad in ((inputs_embeds, (0, 0, 0, 2)), (attention_mask, (0, 2))))
        return self.classifier(self.encoder(x, attention_mask=mask)[:, :-2])


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_tokens_of_another_length_than_the_layers():
    """A head on other tokens than the layers' is refused where the model call's mask hides some."""
    model = adapted(Cut(), target_modules=[r"layers.0", "classifier"], routing_scope="sequence")
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6)
    model(inputs_embeds=x, attention_mask=mask)
    mask[1, 4:] = 0
    with pytest.raises(ValueError, match=r"classifier sees 6 tokens per row that no stack .* about 6, may not be"):
        model(inputs_embeds=x, attention_mask=mask)


@torch.no_grad()
def test_modules_of_an_inner_model_see_its_tokens(method):
    """A projection of an inner model, before its layers, goes on from the cache and leaves padding out."""
    config = transformers.ElectraConfig(**ENCODER, embedding_size=16, is_decoder=True)
    model, ids = (
        method(transformers.ElectraForCausalLM(config), r".*(embeddings_project|query|value)"),
        token_ids(2, 6),
    )
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    full = model(input_ids=ids, attention_mask=mask).logits
    same(model(input_ids=ids[1:, :4]).logits, full[1:, :4])
    cache, steps = transformers.DynamicCache(), []
    for end in (3, 4, 6):
        inputs = {"input_ids": ids[:1, cache.get_seq_length() : end], "attention_mask": mask[:1, :end]}
        steps.append(model(**inputs, **{CACHE: cache}).logits)
    same(torch.cat(steps, dim=1), full[:1])


@torch.no_grad()
def test_a_model_in_a_model(method):
    """CLIPSeg calls the parts of a CLIP model that it holds: the features of its texts are those of CLIP itself."""
    small = {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 16}
    base = transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(**small, extract_layers=[1], reduce_dim=8)
    )
    model, words = method(base, r"clip\.(?!.*out_proj).*(_proj|fc\d|projection)"), texts()
    together = pooled(base.clip.get_text_features(**words))
    for row in range(3):
        same(
            pooled(base.clip.get_text_features(**{name: value[row : row + 1] for name, value in words.items()})),
            together[row : row + 1],
        )
    model(**words, pixel_values=torch.randn(3, 3, 8, 8).double())
