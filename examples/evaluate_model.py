"""
Measure a model on photos with labels: how well each of its ways of predicting does, and where it fails.

    python examples/evaluate_model.py \
        --model_name_or_path adapted \
        --clip openai/clip-vit-base-patch32 \
        --descriptions descriptions.json \
        --test_dir test/ \
        --output_dir results

`adapted` is a folder or a Hub id; `--clip`, with `--descriptions`, is what it is compared with and may be left out.
`test/` has a sub-folder for each class. A plain CLIP is measured with `--model_name_or_path
openai/clip-vit-base-patch32 --class_names names.txt`; `--dataset_name` reads a data set of the Hub; `--help` lists
every setting. `accelerate launch` in place of `python` shares the images out among GPUs. Interrupted, the same command
goes on.
"""

from microclip_hf.commands.evaluate import main


if __name__ == "__main__":
    main()
