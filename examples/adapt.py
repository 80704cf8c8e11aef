"""
Adapt CLIP to a folder of images without labels.

    accelerate launch examples/adapt.py \
        --model_name_or_path openai/clip-vit-base-patch32 \
        --train_dir photos/ \
        --class_names names.txt \
        --descriptions descriptions.json \
        --output_dir adapted

`names.txt` has one class name a line; `descriptions.json` is `{"class": ["sentence", ...]}` and may be left out.
`--test_dir` with a sub-folder for each class measures accuracy; `--push_to_hub` uploads the result;
`--resume_from_checkpoint true` continues an interrupted run; `--help` lists every setting.
"""

from microclip_hf.commands.adapt import main


if __name__ == "__main__":
    main()
