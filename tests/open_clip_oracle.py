"""Open_clip builds small random models and says what they make of texts and photos; run in a process of its own.

Open_clip imports torchvision, with which transformers would behave otherwise in all other tests. Of torchvision it
runs Python code alone here, which resizes and crops PIL images. Beside a PyTorch for CPUs the registry's torchvision
doesn't load its compiled operators, of detection, which are then declared and never called.
"""

import copy
import json
import sys
from pathlib import Path

import torch


try:
    import torchvision  # noqa: F401
except RuntimeError:
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.startswith("torchvision.")]:  # half imported
        del sys.modules[name]

import open_clip
from open_clip.push_to_hf_hub import save_for_hf
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import save_file


def build(case):
    """A model of one of open_clip's architectures, with changes, and its settings; no weight is a special one."""
    settings = {**open_clip.get_model_config(case["model"]), **case.get("settings", {})}
    settings["vision_cfg"] |= {"layers": 1, **case.get("vision_cfg", {})}
    settings["text_cfg"] |= {"layers": 1, **case.get("text_cfg", {})}
    arguments = copy.deepcopy(settings)
    kind = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    torch.manual_seed(0)
    model = kind(**arguments).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn(weight.shape)
    return model, settings


def answer(case, texts, photos, clip_tokenizer, folder):
    """Save a model as open_clip does, and in `answers.safetensors` what it makes of texts and photos."""
    model, settings = build(case)
    text = settings["text_cfg"]
    named = text.get("hf_tokenizer_name")
    tokenizer = open_clip.SimpleTokenizer() if named is None else HFTokenizer(named)
    ids = tokenizer(texts, context_length=text["context_length"])
    preprocessing = PreprocessCfg(size=settings["vision_cfg"]["image_size"], **case.get("preprocess_cfg", {}))
    transform = image_transform_v2(preprocessing, is_train=False)
    pixels = torch.stack([transform(Image.open(photo)) for photo in photos])
    with torch.no_grad():
        answers = {
            "ids": ids,
            "pixels": pixels,
            "image": model.encode_image(pixels),
            "text": model.encode_text(ids),
            "logit_scale": model.logit_scale.exp(),
        }
    open_clip.model.set_model_preprocess_cfg(model, vars(preprocessing))
    save_for_hf(model, HFTokenizer(named or clip_tokenizer), settings, folder, safe_serialization=True)
    save_file(answers, folder / "answers.safetensors")


if __name__ == "__main__":
    order, target = map(Path, sys.argv[1:])
    cases, texts, clip_tokenizer = json.loads(order.read_text(encoding="utf-8"))
    for name, case in cases.items():
        answer(case, texts, sorted(target.glob("*.png")), clip_tokenizer, target / name)
