"""Runs in mergekit's own environment: `python mergekit_run.py JOBS.json`, a list of [config, out]."""

import json
import sys
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions

if __name__ == "__main__":
    torch.set_num_threads(1)
    for config, out in json.loads(Path(sys.argv[1]).read_text()):
        options = MergeOptions(copy_tokenizer=False, lazy_unpickle=False, allow_crimes=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), out, options)
