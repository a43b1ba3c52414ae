"""llama.cpp with an exported LoRA gives the tokens that the model gives under the same fixed routes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from helpers.fixed import random_routes, trained
from helpers.gguf_files import write_lora, write_model
from helpers.models import LLAMA_PROJECTIONS, VOCAB, llama, token_ids

from peft_queryable import export_lora, fix_routes

NEW = 24
# llama.cpp's server hangs at the end of a process that has seen an exception.
SERVE = """
import json, os, sys, traceback
try:
    import xllamacpp as xlc
    model, lora, prompt, new = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    params = xlc.CommonParams()
    params.model.path = model
    params.n_ctx, params.warmup, params.cpuparams.n_threads = 256, False, 1
    params.fit_params = False
    if lora:
        adapter = xlc.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = lora, 1.0
        params.lora_adapters = [adapter]
    server = xlc.Server(params)
    answer = server.handle_completions({
        "prompt": prompt, "n_predict": new, "temperature": 0, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True,
        "cache_prompt": False,
    })
    print(answer["choices"][0]["text"], flush=True)
    os._exit(0)
except BaseException:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)
"""


def served(model, lora, prompt: list[int]) -> list[int]:
    command = [sys.executable, "-c", SERVE, str(model), str(lora), json.dumps(prompt), str(NEW)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return [int(token) for token in re.findall(r"<(\d+)>", run.stdout)]


def test_tokens_are_ours(tmp_path):
    """So are the base model's without the LoRA, and those of two sets of routes differ from it and from each other."""
    pytest.importorskip("xllamacpp")
    model = llama(hidden_size=64, intermediate_size=96, initializer_range=0.3, max_position_embeddings=256)
    write_model(model, tmp_path / "model.gguf")
    model = trained(model, target_modules=LLAMA_PROJECTIONS)
    prompt = token_ids(1, 8)

    def ours() -> list[int]:
        arguments = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "suppress_tokens": [VOCAB - 1]}
        return model.generate(input_ids=prompt, **arguments)[0, prompt.shape[1] :].tolist()

    with model.disable_adapter():
        answers = [ours()]
    assert served(tmp_path / "model.gguf", "", prompt[0].tolist()) == answers[0]
    for number in range(2):
        routes = random_routes(model)
        export_lora(model, tmp_path / f"lora{number}", routes)
        write_lora(tmp_path / f"lora{number}", model, tmp_path / "lora.gguf")
        with fix_routes(model, routes):
            answers.append(ours())
        assert served(tmp_path / "model.gguf", tmp_path / "lora.gguf", prompt[0].tolist()) == answers[-1]
    assert len(set(map(tuple, answers))) == 3
