"""What people do without us: `python -m tests.bench.peer SOURCE OUT`, transformers with bitsandbytes."""

import sys

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def main(source: str, out: str) -> None:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype="auto", device_map="cpu")
    model.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
