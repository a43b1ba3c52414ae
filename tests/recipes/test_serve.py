"""The service over loopback: every client gets what `generate` gives alone, whoever else asks or leaves."""

from __future__ import annotations

import copy
import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest
import torch
from helpers.models import LLAMA_PROJECTIONS, adapted, llama, randomise
from helpers.words import tokenizer, words
from peft import PeftModel
from torch import nn

from peft_queryable import BackboneEncoder, use_instructions

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

from recipes.serve import __main__ as command  # noqa: E402
from recipes.serve import service as serving  # noqa: E402

CLIENTS, NEW = 8, 12


@pytest.fixture
def model(tmp_path) -> PeftModel:
    """In float64: adapters `one` and `two`, the second of which takes instructions."""
    base = llama(initializer_range=0.3, max_position_embeddings=256, eos_token_id=2, pad_token_id=0)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base", dtype=torch.float64)
    fields = {"target_modules": LLAMA_PROJECTIONS, "task_type": "CAUSAL_LM"}
    model = adapted(base, **fields)
    model.add_adapter("one", copy.deepcopy(model.peft_config["default"]))
    config = copy.deepcopy(model.peft_config["default"])
    config.instruction_encoder = "backbone"
    model.add_adapter("two", config)
    model.set_adapter("one")
    model.delete_adapter("default")
    for name in ("one", "two"):
        randomise(model, name)
    return model.double().eval()


@contextmanager
def served(model: nn.Module, length: int = 256, threads: int = CLIENTS) -> Iterator[int]:
    """The port of a service of `model`."""
    app = serving.make_app(serving.Service(model, tokenizer(), length, threads))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            thread.join(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def post(port: int, body: bytes | dict) -> tuple[int, bytes]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data, {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def events(stream: bytes) -> list[dict]:
    *lines, end = [line.removeprefix("data: ") for line in stream.decode().split("\n\n") if line]
    assert end == "[DONE]"
    return [json.loads(line) for line in lines]


def ask(port: int, **body) -> tuple[str, dict]:
    """The text of an answer, streamed or not, and its last message."""
    status, answer = post(port, {"max_tokens": NEW, **body})
    assert status == 200, answer
    messages = events(answer) if body.get("stream") else [json.loads(answer)]
    return "".join(message["choices"][0]["text"] for message in messages), messages[-1]


def alone(model: PeftModel, adapter: str, prompt: str, instruction: str | None = None) -> str:
    """What `generate` answers with the adapter set, by itself."""
    ids = tokenizer()(prompt, return_tensors="pt")["input_ids"]

    def new() -> str:
        out = model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return tokenizer().decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    if adapter == serving.BASE:
        with model.disable_adapter():
            return new()
    model.set_adapter(adapter, inference_mode=True)
    if instruction is None:
        return new()
    with use_instructions(model, instruction, encoder=BackboneEncoder(model, tokenizer())):
        return new()


def requests() -> list[dict]:
    """Eight that differ: in adapter, prompt, instruction, and half of them streamed."""
    adapters = ["one", "two", serving.BASE, "two", "two", "one", "two", "two"]
    told = [None, "w7 w8", None, "w9", None, None, "w10 w11 w12", "w7 w8"]
    return [
        {"model": adapter, "prompt": words(i, 4 + i % 3), "stream": i % 2 == 0}
        | ({"instruction": text} if text else {})
        for i, (adapter, text) in enumerate(zip(adapters, told, strict=True))
    ]


def test_clients_at_once(model):
    """Eight clients, several times: each gets the text of `generate` alone, streamed or whole."""
    asked = requests()
    expected = [alone(model, each["model"], each["prompt"], each.get("instruction")) for each in asked]
    model.set_adapter("one", inference_mode=True)
    assert len(set(expected)) == len(asked)
    assert alone(model, "two", asked[1]["prompt"]) != expected[1]
    start = threading.Barrier(CLIENTS)
    with served(model) as port, ThreadPoolExecutor(CLIENTS) as pool:

        def client(body: dict) -> list[str]:
            start.wait()
            return [ask(port, **body | {"stream": body["stream"] ^ bool(turn % 2)})[0] for turn in range(4)]

        for texts, text in zip(pool.map(client, asked), expected, strict=True):
            assert texts == [text] * 4


def test_who_leaves_harms_nobody(model, monkeypatch):
    """A client that leaves in the middle ends its own generation, and the others get their answers."""
    first, steps, noticed = [], [], []
    left, ended, thread = threading.Event(), threading.Event(), threading.local()

    class Noted(serving.Answer):
        def _generate(self, model: nn.Module, arguments: dict) -> torch.Tensor:
            thread.is_first = arguments["input_ids"].shape[1] == 9
            first.extend([self] * thread.is_first)
            try:
                return super()._generate(model, arguments)
            finally:
                if thread.is_first:
                    ended.set()

    def hold(module: nn.Module, args: tuple) -> None:
        if getattr(thread, "is_first", False):
            steps.append(len(steps))
            if len(steps) == 6:  # until the client has left, and the service knows
                noticed.append(left.wait(60) and first[0].stop.now.wait(60))

    expected = alone(model, "two", words(1, 5))
    monkeypatch.setattr(serving, "Answer", Noted)
    model.get_base_model().register_forward_pre_hook(hold)
    with served(model, threads=2) as port:
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "one", "prompt": words(0, 9), "max_tokens": 200, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        assert ask(port, model="two", prompt=words(1, 5))[0] == expected  # beside it
        response.close()
        connection.close()
        left.set()
        assert ended.wait(120)
        assert ask(port, model="two", prompt=words(1, 5))[0] == expected
    assert noticed == [True] and len(steps) == 6


REFUSED = {
    "unknown adapter": ({"model": "three"}, 404, "There is no adapter 'three', but ['one', 'two', '__base__']"),
    "bad JSON": (b"{", 422, "JSON decode error"),
    "unknown field": ({"top_p": 0.5}, 422, "top_p"),
    "no prompt": ({"prompt": None}, 422, "prompt"),
    "empty prompt": ({"prompt": ""}, 400, "no tokens"),
    "too long": ({"max_tokens": 62}, 400, "3 tokens and `max_tokens` is 62, which makes 65: at most 64"),
    "no instruction there": ({"instruction": "w5"}, 400, "names no `instruction_encoder`"),
    "an instruction for the base": ({"model": "__base__", "instruction": "w5"}, 400, "takes no instruction"),
}


def test_refusals(model):
    """What is wrong is named, before a stream begins, and the next request is answered."""
    good = {"model": "one", "prompt": "w5 w6 w7", "max_tokens": 2, "stream": True}
    with served(model, length=64) as port:
        for case, (body, status, message) in REFUSED.items():
            found, answer = post(port, body if isinstance(body, bytes) else good | body)
            assert found == status, case
            assert message in json.dumps(json.loads(answer)).replace('\\"', '"'), case
        assert post(port, good)[0] == 200
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as models:
            assert [each["id"] for each in json.load(models)["data"]] == ["one", "two", "__base__"]


def test_command(model, tmp_path):
    """Adapters are loaded under their names, and a request says why it ended."""
    model.save_pretrained(tmp_path)
    options = command.parse([f"first={tmp_path / 'one'}", str(tmp_path / "two"), "--threads", "1"])
    service = command.load(options)
    assert (service.names, service.length) == (["first", "two", "__base__"], 256)
    with served(service.model) as port:
        text, message = ask(port, model="first", prompt=words(3, 4))
        assert message["choices"][0]["finish_reason"] == "length" and message["usage"] == {"completion_tokens": NEW}
        assert len(text.split()) <= NEW
        end = next(token for token in tokenizer()(text)["input_ids"])
        service.model.generation_config.eos_token_id = end
        _, message = ask(port, model="first", prompt=words(3, 4), stream=True)
        assert message["choices"][0]["finish_reason"] == "stop" and message["usage"] == {"completion_tokens": 1}
    with pytest.raises(SystemExit):
        command.parse([str(tmp_path / "one"), f"one={tmp_path / 'two'}"])
