"""
Adapt CLIP to a folder of images without labels.

    accelerate launch examples/adapt.py \
        --model_name_or_path openai/clip-vit-base-patch32 \
        --train_dir photos/ \
        --class_names names.txt \
        --descriptions descriptions.json \
        --recipe recommended \
        --output_dir adapted

`accelerate launch` is for several devices; on one, `microclip adapt` does the same with the same options.
`names.txt` has one class name a line; `descriptions.json` is `{"class": ["sentence", ...]}` and may be left out.
`--test_dir` with a sub-folder for each class measures accuracy; `--push_to_hub` uploads the result;
`--resume_from_checkpoint true` continues an interrupted run; `--config settings.yaml` reads options from a file;
`--help` lists the main settings, `--help_all` every one.

Without any argument it shows itself on rendered birds, with no download: `examples/configs/birdworld.yaml`.
"""

import os
import shutil
import sys
from pathlib import Path

from microclip_hf.commands.adapt import main


def prepare_demo() -> list[str]:
    """Draw the demo's images anew where its configuration looks for them, relative to the repository's root."""
    import datasets
    import transformers
    from accelerate import PartialState
    from birdworld.domains import DOMAINS

    os.chdir(Path(__file__).parents[1])
    # What is left is the bar of training; all else takes seconds.
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()
    folder = Path("outputs/birdworld/dusk")
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            print(
                f"Drawing birds in {folder}: a folder without labels to adapt to, and one to measure by.", flush=True
            )
            shutil.rmtree(folder, ignore_errors=True)
            DOMAINS["dusk"].write(folder)
    return ["--config", "examples/configs/birdworld.yaml"]


if __name__ == "__main__":
    main(sys.argv[1:] or prepare_demo())
