"""What people do without us, with transformers: `python -m tests.bench.peer nf4|fold SOURCE [ADAPTER] OUT`."""

import sys

import torch
from transformers import AutoModelForCausalLM


def nf4(source: str, out: str) -> None:
    """bitsandbytes, while the weights are loaded."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto", device_map="cpu")
    model.save_pretrained(out)


def fold(source: str, adapter: str, out: str) -> None:
    """PEFT's merge_and_unload."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    {"nf4": nf4, "fold": fold}[sys.argv[1]](*sys.argv[2:])
