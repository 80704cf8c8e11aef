"""CLIPs as open_clip publishes them -> transformers' `CLIPModel`, tokenizer and image processor, without open_clip."""

from .checkpoint import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    OpenClipCheckpoint,
    check_empty,
    convert,
    is_bare_file,
    read_open_clip,
)


__all__ = [
    "OPEN_CLIP_CONFIG",
    "OPEN_CLIP_WEIGHTS",
    "OpenClipCheckpoint",
    "check_empty",
    "convert",
    "is_bare_file",
    "read_open_clip",
]
