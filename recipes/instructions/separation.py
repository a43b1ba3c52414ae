# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""How far apart encoders put instructions: no training, a minute on two CPU cores.

python -m recipes.instructions.separation
python -m recipes.instructions.separation sentence-transformers/all-MiniLM-L6-v2  # or a folder
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_queryable import BackboneEncoder, InstructionEncoder, SentenceEncoder
from peft_queryable.reference_texts import REFERENCE
from recipes.common.smollm2 import smollm2_folder
from recipes.instructions.data import TASKS

TEXTS = [  # instructions of 16 tasks, each with a paraphrase that shares few of its words
    *((task.instruction, task.paraphrase) for task in TASKS.values()),
    ("Translate the sentence into French.", "How would a Parisian say this?"),
    ("Summarise the article in one sentence.", "Give me the gist, briefly."),
    ("Write a poem about the sea.", "Compose some verses on the ocean."),
    ("Fix the bug in this Python function.", "The code below fails: repair it."),
    ("Classify the review as positive or negative.", "Did this customer like the product?"),
    ("List the capital of each country.", "Name the seat of government for these nations."),
    ("Reverse the order of the words.", "Say it backwards, last word first."),
    ("Explain the theorem to a child.", "Make this mathematics simple enough for a six-year-old."),
    ("Extract all dates from the text.", "Which days and years are mentioned?"),
    ("Answer as a polite customer service agent.", "Reply kindly, like someone at a help desk."),
    ("Convert the temperature to Fahrenheit.", "How many degrees is that in American units?"),
    ("Suggest a recipe with these ingredients.", "What could I cook from this?"),
]


def separation(instructions: Tensor, paraphrases: Tensor) -> tuple[float, float, float]:
    """Mean cosine of two tasks' instructions and its spread, and how often a paraphrase lies next to its own task."""
    instructions, paraphrases = normalize(instructions), normalize(paraphrases)
    cosines = (instructions @ instructions.T)[~torch.eye(len(instructions), dtype=torch.bool)]
    nearest = (paraphrases @ instructions.T).argmax(1)
    return cosines.mean().item(), cosines.std().item(), (nearest == torch.arange(len(nearest))).float().mean().item()


def report(name: str, encoder: InstructionEncoder) -> None:
    mean, spread, accuracy = separation(*(encoder(list(texts)) for texts in zip(*TEXTS, strict=True)))
    print(f"{name:<30} cosine {mean:.3f} ± {spread:.3f}   paraphrase found {accuracy:.0%} of {len(TEXTS)}")


def main() -> None:
    if sys.argv[1:]:
        return report(sys.argv[1], SentenceEncoder(sys.argv[1]))
    folder = smollm2_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    report("backbone", BackboneEncoder(model, tokenizer))
    report("backbone-centred", BackboneEncoder(model, tokenizer, REFERENCE))


if __name__ == "__main__":
    main()
