"""Runs inside the adapters library's own environment: `adapterhub_side.py JOBS.json ANSWERS.json`.

A job is `{"do": "load" | "make" | "places", ...}`; logits go to the file that the job names.
"""

import json
import logging
import sys
import warnings
from typing import Any

warnings.filterwarnings("ignore")

import adapters  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

IDS = torch.tensor([[3, 4, 5, 6, 7, 8], [9, 8, 7, 6, 5, 4]])
RECORDS: list[str] = []


class Record(logging.Handler):
    """Keeps what the library warns of."""

    def emit(self, record: logging.LogRecord) -> None:
        RECORDS.append(record.getMessage())


def model_of(job: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, job["class"]).from_pretrained(job["base"])
    adapters.init(model)
    return model.eval()


def keep_logits(model: nn.Module, name: str, job: dict[str, Any]) -> None:
    model.set_active_adapters(name)
    model.eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        save_file({"logits": model(**inputs).logits.contiguous()}, job["logits"])


def load(job: dict[str, Any]) -> dict[str, Any]:
    model = model_of(job)
    info: dict[str, Any] = {}
    RECORDS.clear()
    name = model.load_adapter(job["adapter"], use_safetensors=True, loading_info=info)
    warned = list(RECORDS)
    keep_logits(model, name, job)
    return {"name": name, "warned": warned, **{key: info[key] for key in ("missing_keys", "unexpected_keys")}}


def make(job: dict[str, Any]) -> dict[str, Any]:
    """An adapter of the library's own, with random weights."""
    torch.manual_seed(1)
    model = model_of(job)
    config = getattr(adapters, job["config_class"])(**job["config"])
    model.add_adapter("made", config=config)
    for name, parameter in model.named_parameters():
        if ".made." in name:
            nn.init.normal_(parameter, mean=float(job["config_class"] == "IA3Config"), std=0.3)
    model.save_adapter(job["adapter"], "made", with_head=job["with_head"], use_safetensors=True)
    keep_logits(model, "made", job)
    return {}


def places(job: dict[str, Any]) -> dict[str, Any]:
    """Which modules get a LoRA, and as what."""
    model = getattr(transformers, job["class"])(transformers.AutoConfig.for_model(job["model_type"], **job["sizes"]))
    adapters.init(model)
    everything = {"attn_matrices": ["q", "k", "v"], "intermediate_lora": True, "output_lora": True}
    model.add_adapter("made", config=adapters.LoRAConfig(r=2, **everything))
    found = {}
    for path, module in model.named_modules():
        if "made" in getattr(module, "loras", {}):
            location = module.location_key.removesuffix("_lora")
            fused = type(module).__name__ == "LoRAMergedLinear"
            slot = "qkv" if fused else (module.attn_key or location)
            found[path] = [slot, module.layer_idx]
    return {"places": found, "config": model.config.to_dict()}


def main(jobs_file: str, answers_file: str) -> None:
    torch.set_num_threads(1)
    logging.getLogger("adapters").addHandler(Record(logging.WARNING))
    with open(jobs_file) as file:
        jobs = json.load(file)
    answers = [{"load": load, "make": make, "places": places}[job["do"]](job) for job in jobs]
    with open(answers_file, "w") as file:
        json.dump(answers, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
