"""lm-eval, which has never heard of the method, on a task of local JSON: its numbers are those computed by hand."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.models import adapted, llama, randomise
from helpers.words import tokenizer

pytest.importorskip("lm_eval")

# Prompts and choices of unequal lengths, so that batches are padded.
EXAMPLES = [
    {
        "question": " ".join(f"w{3 + (7 * i + j) % 61}" for j in range(1 + i % 4)),
        "choices": [f"w{3 + (5 * i) % 61}", f"w{3 + (11 * i) % 61} w{4 + i}", f"w{20 + i}"],
        "answer": i % 3,
    }
    for i in range(12)
]
TASK = {
    "task": "words",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "words.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{ question }}",
    "doc_to_choice": "{{ choices }}",
    "doc_to_target": "{{ answer }}",
    "metric_list": [{"metric": "acc"}],
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The adapted model, and the accuracy and log-likelihoods that lm-eval finds for it, loaded from its folder."""
    folder = tmp_path_factory.mktemp("lm_eval")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = adapted(type(llama()).from_pretrained(folder / "base"), target_modules=["q_proj", "down_proj"])
    randomise(model)
    model.save_pretrained(folder / "adapter")
    (folder / "words.jsonl").write_text("\n".join(map(json.dumps, EXAMPLES)))
    (folder / "words.yaml").write_text(yaml.safe_dump(TASK))
    command = [
        *(sys.executable, "-m", "peft_queryable", "lm_eval", "run", "--model", "hf"),
        *("--model_args", "pretrained=base,peft=adapter,dtype=float32", "--include_path", ".", "--tasks", "words"),
        *("--batch_size", "4", "--device", "cpu", "--output_path", "results", "--log_samples"),
    ]
    settings = {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(folder.glob("results/**/results_*.json")).read_text())
    lines = next(folder.glob("results/**/samples_*.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda sample: sample["doc_id"])
    found = [[float(response[0][0]) for response in sample["resps"]] for sample in samples]
    return model, results["results"]["words"]["acc,none"], torch.tensor(found)


def by_hand(model) -> torch.Tensor:
    """The log-likelihood of every choice after its question, [examples, choices], one sequence at a time."""
    encode = tokenizer().encode

    def log_likelihood(question: str, choice: str) -> float:
        prompt, completion = (encode(part, add_special_tokens=False) for part in (question, choice))
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return -torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="sum").item()

    return torch.tensor([[log_likelihood(row["question"], choice) for choice in row["choices"]] for row in EXAMPLES])


def test_log_likelihoods_are_the_adapters(evaluation):
    """lm-eval's log-likelihoods, in padded batches, are those of the adapted model, and not the base model's."""
    model, _, found = evaluation
    torch.testing.assert_close(found, by_hand(model), atol=1e-4, rtol=1e-5)
    with model.disable_adapter():
        assert not torch.allclose(found, by_hand(model), atol=0.1)


def test_accuracy(evaluation):
    """lm-eval's accuracy is the share of examples whose answer is the likeliest choice; some are wrong."""
    model, accuracy, _ = evaluation
    correct = by_hand(model).argmax(dim=1) == torch.tensor([row["answer"] for row in EXAMPLES])
    assert accuracy == correct.double().mean().item()
    assert 0 < accuracy < 1
