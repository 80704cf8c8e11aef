"""
A page to try adapted models on: photos in, label bars, where the model looks, and CLIP beside it.

    python examples/space/app.py

needs `pip install ".[demo]"`. `MICROCLIP_MODELS=me/birds,folder` offers adapted models, Hub ids or folders; the first
is chosen at start, and the small model of rendered birds comes last. `make space` offers the demo's model, once there
is one. `MICROCLIP_CHECK=check` adds a tab that labels the photos of that folder of `microclip check`.
GRADIO_SERVER_NAME and GRADIO_SERVER_PORT say where it listens (127.0.0.1:7860).
"""

import csv
import dataclasses
import os
import sys
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import StrictDataclassError
from photos import check_photo, read_photo
from PIL import ImageOps
from safetensors import SafetensorError

from microclip_hf import MicroCLIPForImageClassification
from microclip_hf.data.class_names import read_class_names
from microclip_hf.descriptions.files import read_descriptions
from microclip_hf.explain.explanation import Explanation, explain, overlay
from microclip_hf.explain.patch_grid import PatchGrid
from microclip_hf.files import parse_json, read_text
from microclip_hf.loading import load_adapted
from microclip_hf.prediction import Prediction, predict_photos
from microclip_hf.prediction.predictions import column_names
from microclip_hf.run_names import FACTS


HERE = Path(__file__).resolve().parent
BIRDS = HERE / "birds"
# In a Space everything lies beside this file, in the repository one folder up.
BIRDWORLD = next(folder / "birdworld" for folder in (HERE, HERE.parent) if (folder / "birdworld").is_dir())
BIRD_MODEL = "rendered birds (built in)"
MODELS = [*filter(None, map(str.strip, os.environ.get("MICROCLIP_MODELS", "").split(","))), BIRD_MODEL]
# A folder of `microclip check`, whose photos a tab labels; it needs the extra train.
CHECK = os.environ.get("MICROCLIP_CHECK")
VIEWS = {"[FG] attention": "fg_attention", "salient patches": "saliency_mask"}
NUM_BARS = 5
COLUMNS = column_names(2)
MAX_FILES = 200
MAX_FILE_SIZE = "50mb"
# Pixels of the longer side of the overlay.
OVERLAY_SIZE = 512
ABOUT = """# microCLIP
Which class a photo shows, by a CLIP adapted to these classes without any label
([arXiv:2510.02270](https://arxiv.org/abs/2510.02270)), and where it looked."""
ABOUT_BIRDS = (
    "A small CLIP that knows nothing but rendered birds, with the descriptions of 30 invented species. It is **not "
    "adapted** yet; of real photos it understands nothing."
)
EXAMPLES = "Examples" if len(MODELS) == 1 else f"Examples, of the species of {BIRD_MODEL}"
NO_FILE = "Drop a photo in, take one with the camera, or choose an example first."


def refusal(message: str) -> gr.Error:
    """An error for the person at the page, not for the server's log."""
    return gr.Error(message, duration=None, print_exception=False)


def uploaded_path(payload: Any) -> str | None:
    """The file as it was uploaded, in place of `gr.Image`'s own reading, so that we say what is wrong with it."""
    return None if payload is None else payload.path


@dataclasses.dataclass(frozen=True)
class Choice:
    """A model to choose.

    Args:
        model ([`MicroCLIPForImageClassification`]): in evaluation mode.
        clip ([`MicroCLIPForImageClassification`], *optional*): the CLIP that it was made of, its head the names.
        about (`str`): what is known of both, in Markdown.
    """

    model: MicroCLIPForImageClassification
    clip: MicroCLIPForImageClassification | None
    about: str


@lru_cache(maxsize=4)
def load_choice(name: str) -> Choice:
    """The model of a name in `MODELS`.

    Raises:
        gr.Error: if it can't be loaded.
    """
    if name == BIRD_MODEL:
        names = read_class_names(BIRDS / "names.txt")
        # The settings that were chosen for this CLIP (examples/configs/birdworld.yaml).
        settings = {"prior_weighting": "uniform", "fusion_ratio": 0.75}
        descriptions = read_descriptions(BIRDS / "descriptions.json", names)
        model = MicroCLIPForImageClassification.from_clip(
            BIRDWORLD / "clip", names, descriptions=descriptions, **settings
        )
        return Choice(model, MicroCLIPForImageClassification.from_clip(BIRDWORLD / "clip", names), ABOUT_BIRDS)
    try:
        model = load_adapted(name)
    except (OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise refusal(f"The model {name} can't be loaded: {error}") from error
    clip, why_not = _load_base(name, model.config.class_names)
    return Choice(model, clip, f"{model.num_labels} classes.{why_not}")


def _load_base(name: str, class_names: list[str]) -> tuple[MicroCLIPForImageClassification | None, str]:
    """The CLIP that a model was made of, with these classes, or why there is none."""
    try:
        base = _find_base(name)
    except (KeyError, OSError, TypeError, ValueError, yaml.YAMLError):
        base = None
    if not isinstance(base, str):
        return None, " CLIP isn't shown beside it, since neither card nor report names the CLIP that it was made of."
    try:
        return MicroCLIPForImageClassification.from_clip(base, class_names), ""
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError, StrictDataclassError) as error:
        return None, f" CLIP isn't shown beside it, since {base} can't be loaded: {str(error).splitlines()[0]}"


def _find_base(name: str) -> Any:
    """The CLIP's Hub id in a model's card; of a model made here of a folder, that folder in the record of its run."""
    if not os.path.isdir(name):
        return ModelCard.load(name).data.base_model
    card = Path(name, "README.md")
    base = ModelCard.load(card).data.base_model if card.exists() else None
    record = Path(name, FACTS)
    return base or (parse_json(record, read_text(record))["model"] if record.exists() else None)


def classify(name: str, path: str | None, view: str, alpha: float) -> tuple[Any, ...]:
    """What the page shows of one photo: both labels, the overlay, notes, and what the overlay is drawn from."""
    if path is None:
        raise refusal(NO_FILE)
    choice = load_choice(name)
    try:
        image, note = read_photo(path)
        explanation = explain(choice.model, [image])[0]
    except ValueError as error:
        raise refusal(str(error)) from error
    if note:
        gr.Warning(note)
    beside = gr.skip()
    if choice.clip is not None:
        # Of this model the [CLS] path is CLIP's own answer to the names.
        beside = _bars(explain(choice.clip, [image])[0].cls_scores, explanation.class_names)
    explanation = _resize(explanation)
    notes = f"**{explanation.label}**, {explanation.scores.max():.1%}. {note or ''}"
    bars = _bars(explanation.scores, explanation.class_names)
    return bars, beside, draw(explanation, view, alpha), notes, explanation


def _bars(scores: Any, names: tuple[str, ...]) -> dict[str, float]:
    return dict(zip(names, map(float, scores), strict=True))


def _resize(explanation: Explanation) -> Explanation:
    """The same on a copy of the picture of one size: a session keeps it, and each move of the slider draws it."""
    image = ImageOps.contain(explanation.image, (OVERLAY_SIZE, OVERLAY_SIZE))
    grid, (x_scale, y_scale) = explanation.grid, np.divide(image.size, explanation.image.size)
    box = tuple(float(edge) for edge in np.multiply(grid.box, (x_scale, y_scale, x_scale, y_scale)))
    return dataclasses.replace(explanation, image=image, grid=PatchGrid(image.size, box, grid.shape))


def draw(explanation: Explanation | None, view: str, alpha: float) -> Any:
    """The overlay of the last photo, if there was one."""
    return None if explanation is None else overlay(explanation, alpha, VIEWS[view])


def introduce(name: str) -> tuple[str, dict[str, Any]]:
    """What is said of the model that is chosen at start, and whether CLIP has a place beside it."""
    choice = load_choice(name)
    return choice.about, gr.update(visible=choice.clip is not None)


def choose(name: str) -> tuple[Any, ...]:
    """Loads a model when it is chosen; what the page showed by another model is cleared."""
    choice = load_choice(name)
    return choice.about, None, gr.update(value=None, visible=choice.clip is not None), None, "", None


def label_files(name: str, paths: list[str] | None, progress: Any = gr.Progress()) -> tuple[list[list[str]], str]:  # noqa: B008
    """A row for each file, and the same as a CSV file."""
    if not paths:
        raise refusal("Choose some files first.")
    if len(paths) > MAX_FILES:
        raise refusal(f"These are {len(paths)} files; upload at most {MAX_FILES}. microclip predict has no limit.")
    model = load_choice(name).model
    remarks = [_remark(path) for path in paths]
    photos = [path for path, (_, readable) in zip(paths, remarks, strict=True) if readable]
    results = predict_photos(model, photos, batch_size=8)
    rows = []
    for path, (remark, readable) in zip(paths, remarks, strict=True):
        progress((len(rows), len(paths)), unit="files")
        result = next(results) if readable else None
        if isinstance(result, Exception):
            remark = f"The picture is damaged ({result})."
        values = dataclasses.astuple(result) if isinstance(result, Prediction) else [""] * (len(COLUMNS) - 1)
        texts = [f"{value:.6f}" if isinstance(value, float) else value for value in values]
        rows.append([Path(path).name, *texts, remark])
    file = Path(tempfile.mkdtemp(), "labels.csv")
    with open(file, "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([[*COLUMNS, "remark"], *rows])
    return rows, str(file)


def _remark(path: str) -> tuple[str, bool]:
    """What there is to say of a file, and whether it can be labelled."""
    try:
        return check_photo(path) or "", True
    except ValueError as error:
        return str(error), False


def build_page() -> gr.Blocks:
    """The page; nothing of it is fetched from elsewhere."""
    with gr.Blocks(title="microCLIP", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(ABOUT)
        model = gr.Dropdown(MODELS, value=MODELS[0], label="Model", elem_id="model", visible=len(MODELS) > 1)
        about = gr.Markdown()
        if CHECK:
            from labelling import build_labelling

            with gr.Tab("Label photos"):
                build_labelling(page, CHECK)
        with gr.Tab("One photo"):
            shown = _build_one(model)
        with gr.Tab("Many photos"):
            _build_many(model)
        page.load(introduce, model, [about, shown[1]], api_visibility="private")
        gr.on(model.change, choose, model, [about, *shown], api_name="choose")
    return page


def _build_one(model: gr.Dropdown) -> list[gr.components.Component]:
    """Returns what shows a prediction."""
    kept = gr.State()
    with gr.Row():
        with gr.Column(min_width=280):
            photo = gr.Image(
                type="filepath", label="Photo", sources=["upload", "webcam", "clipboard"], height=280, elem_id="photo"
            )
            photo.preprocess = uploaded_path
            button = gr.Button("Classify", variant="primary", elem_id="classify")
            pictures = [BIRDWORLD / "bird.png", *sorted(BIRDS.glob("*.png"))]
            examples = gr.Examples(list(map(str, pictures)), photo, cache_examples=False, label=EXAMPLES)
        with gr.Column(min_width=280):
            notes = gr.Markdown("", elem_id="notes")
            drawing = gr.Image(
                label="Where it looked", format="png", interactive=False, height=280, elem_id="overlay", buttons=[]
            )
            view = gr.Radio(list(VIEWS), value=next(iter(VIEWS)), label="Show", elem_id="view")
            alpha = gr.Slider(0, 1, 0.5, step=0.05, label="Strength of the overlay", elem_id="alpha", buttons=[])
    with gr.Row():
        label = gr.Label(label="microCLIP", num_top_classes=NUM_BARS, elem_id="microclip", min_width=280)
        clip = gr.Label(label="CLIP, by the names alone", num_top_classes=NUM_BARS, elem_id="clip", min_width=280)
    shown = [label, clip, drawing, notes, kept]
    event = {"fn": classify, "inputs": [model, photo, view, alpha], "outputs": shown, "show_progress_on": drawing}
    gr.on([button.click, photo.upload], **event, api_name="classify")
    examples.load_input_event.then(**event, api_visibility="private")
    redraw = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
    gr.on([view.change, alpha.change], draw, [kept, view, alpha], drawing, **redraw)
    return shown


def _build_many(model: gr.Dropdown) -> None:
    files = gr.File(label=f"Photos, at most {MAX_FILES}", file_count="multiple", height=200, elem_id="files")
    button = gr.Button("Label them", variant="primary", elem_id="label_files")
    table = gr.Dataframe(headers=[*COLUMNS, "remark"], label="Labels", interactive=False, wrap=True, elem_id="table")
    download = gr.File(label="As CSV", interactive=False, elem_id="csv")
    button.click(label_files, [model, files], [table, download], api_name="label_files")


def main() -> None:
    """Serve the page, on loopback unless Gradio's environment variables say otherwise."""
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Default(font=list(map(gr.themes.Font, font)), font_mono=list(map(gr.themes.Font, mono)))
    try:
        page = build_page()
    except ValueError as error:  # of the folder to label
        sys.exit(f"app.py: {error}")
    page.launch(theme=theme, show_error=True, ssr_mode=False, max_file_size=MAX_FILE_SIZE, footer_links=["api"])


if __name__ == "__main__":
    main()
