# /// script
# dependencies = ["peft_queryable[recipes,instructions]"]
# ///
"""How far apart encoders put instructions, and how near paraphrases: no training, a few minutes on two CPU cores.

python -m recipes.instructions.separation
python -m recipes.instructions.separation sentence-transformers/all-MiniLM-L6-v2  # or a folder
python -m recipes.instructions.separation --choosing  # the other half of the texts, to compare settings of an encoder

paraphrases.jsonl has 64 instructions, each with two paraphrases that share few words with it.
"""

import argparse
import json
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_queryable import BackboneEncoder, SentenceEncoder
from peft_queryable.reference_texts import REFERENCE
from recipes.common.smollm2 import smollm2_folder

Encode = Callable[[list[str]], Tensor]


def load_texts(choosing: bool) -> tuple[list[str], list[list[str]]]:
    """Instructions and paraphrases of the file's first half, which chooses settings, or the second, which shows them.

    The first sixteen lines are in the half that chooses because earlier encoders were compared on them.
    """
    lines = Path(__file__).with_name("paraphrases.jsonl").read_text(encoding="utf-8").splitlines()
    half = lines[: len(lines) // 2] if choosing else lines[len(lines) // 2 :]
    rows = [json.loads(line) for line in half]
    return [row["instruction"] for row in rows], [row["paraphrases"] for row in rows]


def cosines_between(instructions: Tensor) -> Tensor:
    """Cosines of all ordered pairs of two tasks' instructions, from [tasks, d]."""
    directions = normalize(instructions)
    return (directions @ directions.T)[~torch.eye(len(directions), dtype=torch.bool)]


def paraphrases_found(instructions: Tensor, paraphrases: Tensor) -> Tensor:
    """For each paraphrase [tasks, 2, d], whether its own task's instruction [tasks, d] is the nearest: [tasks, 2]."""
    nearest = (normalize(paraphrases, dim=-1) @ normalize(instructions).T).argmax(-1)
    return nearest == torch.arange(len(instructions)).unsqueeze(1)


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share."""
    share = successes / n
    centre, half = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def report(name: str, encode: Encode, choosing: bool) -> None:
    texts, paraphrases = load_texts(choosing)
    instructions = encode(texts)
    found = paraphrases_found(instructions, torch.stack([encode(pair) for pair in paraphrases]))
    cosines, (low, high) = cosines_between(instructions), wilson(int(found.sum()), found.numel())
    print(
        f"{name:<30} cosine {cosines.mean():.3f} ± {cosines.std():.3f}   "
        f"paraphrases found {found.sum()} of {found.numel()}, {found.float().mean():.0%} ({low:.0%} to {high:.0%})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", nargs="?", help="a sentence-transformers model; SmolLM2's own encoders if none")
    parser.add_argument("--choosing", action="store_true", help="use the half of the texts that chooses settings")
    args = parser.parse_args()
    if args.encoder:
        return report(args.encoder, SentenceEncoder(args.encoder), args.choosing)
    folder = smollm2_folder()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    plain = BackboneEncoder(model, tokenizer)
    report("backbone", plain, args.choosing)
    report("the same, centred", lambda texts: plain(texts) - plain(REFERENCE).mean(0), args.choosing)
    report("backbone-centred", BackboneEncoder(model, tokenizer, centred=True), args.choosing)


if __name__ == "__main__":
    main()
