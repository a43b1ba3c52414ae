"""Memory: the peak of one method's work, in a process of its own."""

import multiprocessing
import os
import resource

import torch

from recipes.benchmark.methods import adapted
from recipes.benchmark.shapes import Setup, base_model
from recipes.benchmark.work import WARM_UP, WORKS

IMPORTS = (  # they take long, and would otherwise count as memory of a model
    "matplotlib.pyplot",
    "peft_queryable",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2",
)


def memory_in_new_process(setup: Setup, method: str, work: str) -> int:
    """What [`peak_memory`] finds in a process that has done nothing else.

    It is forked from one that has only imported the libraries, so that it starts at once.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # else glibc keeps some of the freed tensors resident
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS])
    with context.Pool(1) as pool:
        return pool.apply(peak_memory, (setup, method, work))


def peak_memory(setup: Setup, method: str, work: str) -> int:
    """Bytes that the model and its work add to this process, at their peak.

    On CUDA the memory is that of torch's tensors, elsewhere the resident memory of the process.
    """
    torch.set_num_threads(setup.threads)
    before = resident_peak()
    run = WORKS[work](adapted(method, base_model(setup), setup), method, setup, compiled=False)
    for _ in range(WARM_UP):
        run()
    return torch.cuda.max_memory_allocated() if setup.device == "cuda" else resident_peak() - before


def resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
