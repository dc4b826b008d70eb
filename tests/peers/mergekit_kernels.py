"""Runs inside mergekit's own environment: `mergekit_kernels.py JOBS.json INPUTS.safetensors RESULTS.safetensors`.

A job is {"method", "inputs", "has_base", "parameters", "per_model", "dtype", "out_dtype", "draws", "as_is",
"result"}: a registered merge method called on raw tensors, one thread. What mergekit leaves to chance is fixed, unless
`as_is`: of equal values, those with the lowest index are the larger; masks come from the uniform draws
named; quartiles are taken of all elements instead of a sample.
"""

import json
import sys
from collections import namedtuple
from pathlib import Path

import torch
from mergekit.merge_methods import arcee_fusion, registry
from mergekit.merge_methods.base import TensorGroup
from safetensors.torch import load_file, save_file

ARGSORT, SORT, TOPK = torch.argsort, torch.sort, torch.topk
Sorted = namedtuple("Sorted", "values indices")


def stable_argsort(x, dim=-1, descending=False):
    return ARGSORT(x, dim=dim, descending=descending, stable=True)


def stable_sort(x, dim=-1, descending=False):
    assert not descending
    return Sorted(SORT(x, dim=dim).values, ARGSORT(x, dim=dim, descending=True, stable=True).flip(dim))


def stable_topk(x, k, largest=True):
    assert largest
    indices = ARGSORT(x, descending=True, stable=True)[:k]
    return x[indices], indices


def drawn(tensors, names):
    rest = iter(names)

    def bernoulli(probabilities):
        uniform = tensors[next(rest)].view(probabilities.shape)
        return (uniform < probabilities.float()).to(probabilities.dtype)

    return bernoulli


def run(job, tensors):
    torch.argsort, torch.sort, torch.topk = ARGSORT, SORT, TOPK
    if not job["as_is"]:
        torch.argsort, torch.sort, torch.topk = stable_argsort, stable_sort, stable_topk
    torch.bernoulli = drawn(tensors, job["draws"])
    base = 0 if job["has_base"] else None
    group = TensorGroup.from_tensors([tensors[name] for name in job["inputs"]], base_index=base, name="x")
    first = 1 if job["has_base"] else 0
    per_model = {key: dict(enumerate(values, first)) for key, values in job["per_model"].items()}
    dtype = getattr(torch, job["dtype"]) if job["dtype"] else None
    (result,) = registry.get(job["method"])(
        (group,), parameters={**job["parameters"], **per_model}, dtype=dtype, out_dtype=getattr(torch, job["out_dtype"])
    )
    return result.contiguous().clone()


def main():
    torch.set_num_threads(1)
    arcee_fusion._QUANTILE_SAMPLE_SIZE = 1 << 40
    jobs, inputs, results = map(Path, sys.argv[1:])
    tensors = load_file(inputs)
    save_file({job["result"]: run(job, tensors) for job in json.loads(jobs.read_text())}, results)


main()
