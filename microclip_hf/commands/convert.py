"""`microclip convert`: a CLIP in open_clip's format -> a folder as transformers writes it."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..configuration_microclip import HUB_PREFIX
from ..model_sources import announce_download
from ..open_clip import convert
from ..text_heads import load_tokenizer
from . import command_frame, naming_options, read_options


@dataclass
class ConvertArguments:
    """What a bare file doesn't tell."""

    quick_gelu: bool | None = HfArg(
        default=None,
        help="Of a bare file, where nothing else says it: the model's activation. It is true if its authors load the "
        "file into OpenAI's model, or into one called -quickgelu, and else false.",
    )
    tokenizer: str | None = HfArg(
        default=None, help="Hub id or folder. Default: the checkpoint's own, or else OpenAI's."
    )


@command_frame("convert", "no folder was written")
def main(arguments: list[str] | None = None) -> None:
    """Convert the CLIP, and say what it is."""
    description = (
        f"{__doc__} microclip adapt and evaluate take folders and repositories of open_clip's as they are; a bare "
        "file needs this, and other programs may."
    )
    source = {"help": "Hub id, folder, or file of weights (.pt, .bin, .safetensors)."}
    folder = {"help": "The folder to write, which is empty or isn't there yet."}
    options, others = read_options("convert", description, ConvertArguments, arguments, source=source, folder=folder)
    tokenizer = None
    if options.tokenizer is not None:
        tokenizer = load_tokenizer(options.tokenizer, {}, "Pass another --tokenizer.")
    announce_download(others.source.removeprefix(HUB_PREFIX))
    with naming_options("quick_gelu", "tokenizer"):
        checkpoint = convert(others.source, others.folder, options.quick_gelu, tokenizer)
    vision, processor = checkpoint.config.vision_config, checkpoint.image_processor
    side = vision.image_size
    print(
        f"Saved to {others.folder}: a ViT of {vision.num_hidden_layers} layers, {vision.num_attention_heads} heads "
        f"and {vision.hidden_act}; photos are {'cropped' if processor.do_center_crop else 'squashed'} to {side} x "
        f"{side} pixels."
    )
