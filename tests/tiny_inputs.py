"""The smallest inputs of a run: a CLIP with random weights, pictures of shapes, names, sentences."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import CLIPModel, CLIPTokenizer, MetaClip2Model, PreTrainedTokenizerBase, XLMRobertaTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


# Of a CLIP that wasn't trained.
LOGIT_SCALE = 1 / 0.07
DESCRIPTIONS = {
    "red disc": ["A round red shape.", "A circle filled with red."],
    "green square": ["A green shape with four equal sides.", "A box filled with green."],
    "blue bar": ["A long blue stripe.", "A thin bar filled with blue."],
}


def make_tokenizer(max_length: int = 77) -> CLIPTokenizer:
    """A CLIP tokenizer with one token a byte."""
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def make_world_tokenizer(max_length: int = 77) -> XLMRobertaTokenizer:
    """A tokenizer of the kind that MetaCLIP 2 has, with one token a letter. Its end of text has the id 2."""
    letters = [(chr(code), -4.0) for code in (*range(ord("!"), 127), *range(ord("À"), ord("ÿ")))]
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *letters, ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=vocab, model_max_length=max_length)


# Of each kind of CLIP.
TOKENIZERS = {CLIPModel: make_tokenizer, MetaClip2Model: make_world_tokenizer}


def make_clip(
    tokenizer: PreTrainedTokenizerBase,
    image_size: int = 32,
    patch_size: int = 8,
    width: int = 32,
    kind: type[CLIPModel | MetaClip2Model] = CLIPModel,
) -> CLIPModel | MetaClip2Model:
    """A CLIP with random weights and two layers in each tower."""
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = kind.config_class(
        text_config={
            **tower,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**tower, "image_size": image_size, "patch_size": patch_size},
        projection_dim=width // 2,
    )
    torch.manual_seed(0)
    return kind(config).eval()


def save_clip(folder: Path, image_size: int = 32, kind: type[CLIPModel | MetaClip2Model] = CLIPModel) -> None:
    """The CLIP with its tokenizer and image processor, loadable by its class and `AutoProcessor`."""
    tokenizer = TOKENIZERS[kind]()
    make_clip(tokenizer, image_size, kind=kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": image_size, "width": image_size}
    CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=size).save_pretrained(folder)


def draw_shape(class_name: str, rng: np.random.Generator) -> Image.Image:
    """A 48 x 64 picture of one class at a random place on a random grey."""
    color, shape = class_name.split()
    image = Image.new("RGB", (64, 48), (int(rng.integers(100, 200)),) * 3)
    left, top = (int(value) for value in rng.integers(4, 20, size=2))
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((left, top, left + 22, top + 22), fill=color)
    else:
        draw.rectangle((left, top, left + 22, top + (22 if shape == "square" else 6)), fill=color)
    return image


def write_inputs(folder: Path) -> None:
    """Write `clip/`, `photos/` (unlabelled), `test/` (a folder a class), `names.txt` and `descriptions.json`."""
    save_clip(folder / "clip")
    rng = np.random.default_rng(0)
    for class_name in DESCRIPTIONS:
        for split, count in (("photos", 16), ("test", 4)):
            for _ in range(count):
                name = f"{int(rng.integers(1 << 30)):08x}.png"
                path = folder / "photos" / name if split == "photos" else folder / "test" / class_name / name
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_shape(class_name, rng).save(path)
    (folder / "names.txt").write_text("\n".join(DESCRIPTIONS) + "\n", encoding="utf-8")
    (folder / "descriptions.json").write_text(json.dumps(DESCRIPTIONS, indent=1), encoding="utf-8")


def write_tar(path: str | Path, rows: list[dict[str, str | bytes]]) -> None:
    """Rows of a path and bytes as a WebDataset."""
    with tarfile.open(path, "w") as file:
        for row in rows:
            entry = tarfile.TarInfo(row["path"])
            entry.size = len(row["bytes"])
            file.addfile(entry, io.BytesIO(row["bytes"]))
