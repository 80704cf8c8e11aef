"""The card that a saved model brings along: what it is, how it was made, what it reached."""

import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .modeling_microclip import MicroCLIPForImageClassification
from .training_args import MicroCLIPTrainingArguments


METHODS = {
    "zero_shot_accuracy": "CLIP with the class names",
    "cupl_accuracy": "CLIP with the descriptions",
    "adapted_accuracy": "this model",
}
SETTINGS = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "learning_rate",
    "weight_decay",
    "num_crops",
    "prior_ratio",
    "fairness_weight",
    "seed",
)
TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

An image classifier of {{ num_classes }} classes, adapted by microCLIP ([arXiv:2510.02270](https://arxiv.org/abs/2510.02270))
from `{{ base_model }}` to {{ num_images }} images without labels.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{{ name }}", trust_remote_code=True)
print(classify("photo.png"))
```

Classes: {{ classes }}.
{{ results }}
## How it was made

{{ settings }}
"""


def write_model_card(
    model: MicroCLIPForImageClassification,
    args: MicroCLIPTrainingArguments,
    base_model: str,
    num_images: int,
    accuracies: dict[str, float],
) -> None:
    """Write `README.md` into the output folder.

    Args:
        model ([`MicroCLIPForImageClassification`]): the adapted model.
        args ([`MicroCLIPTrainingArguments`]): its settings, with the output folder and perhaps the Hub id.
        base_model (`str`): the CLIP that was adapted, a Hub id or a folder.
        num_images (`int`): images adapted to.
        accuracies (`dict[str, float]`): fractions by the names in `METHODS`; may be empty.
    """
    name = args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))
    local = os.path.isdir(base_model)
    results = []
    if "adapted_accuracy" in accuracies:
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type="imagefolder",
                dataset_name="test images",
                metric_type="accuracy",
                metric_value=accuracies["adapted_accuracy"],
            )
        ]
    data = ModelCardData(
        base_model=None if local else base_model,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["microclip"],
        model_name=name,
        eval_results=results or None,
    )
    rows = [f"| {METHODS[key]} | {100 * accuracies[key]:.1f} |" for key in METHODS if key in accuracies]
    table = "\n".join(["", "| test accuracy | % |", "|---|---|", *rows, ""]) if rows else ""
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        name=name,
        base_model=os.path.basename(os.path.abspath(base_model)) if local else base_model,
        num_images=num_images,
        num_classes=model.num_labels,
        classes=", ".join(model.config.id2label.values()),
        results=table,
        settings="\n".join(f"- {setting}: {getattr(args, setting)}" for setting in SETTINGS),
    )
    Path(args.output_dir, "README.md").write_text(str(card), encoding="utf-8")
