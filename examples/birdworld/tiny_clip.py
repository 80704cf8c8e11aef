"""The architecture of the bird world's CLIP, its tokenizer and its image processor."""

import itertools
import re
from collections import Counter
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .texts import vocabulary


FOLDER = Path(__file__).parent / "clip"
IMAGE_SIZE = 64


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's kind of tokenizer, trained on the world's words: each of them is one token, others fall apart."""
    texts = (re.sub(r"{\w*}", "", text) for text in vocabulary())
    words = sorted({word for text in texts for word in re.findall(r"'s|\w+|[^\w\s]", text.lower())})
    merges = train_merges(words)
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=48)


def train_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until every word is one token.

    Ties go by the alphabet: the trainer of `tokenizers` breaks them otherwise in each process.
    """
    splits = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while pairs := Counter(pair for split in splits for pair in itertools.pairwise(split)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        splits = [_merge(split, best) for split in splits]
    return merges


def _merge(split: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for token in split:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP with random weights: 64 px, patches of 8, both towers 128 wide, four and three layers."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **tower,
            "num_hidden_layers": 3,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**tower, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=128,
    )
    return CLIPModel(config)


def make_image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preparation at 64 px."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def save(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Weights in half precision, tokenizer and image processor, for `CLIPModel` and `AutoProcessor`."""
    half = make_clip(tokenizer)
    half.load_state_dict(clip.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_image_processor().save_pretrained(folder)
