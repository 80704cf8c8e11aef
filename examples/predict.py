"""
Label photos, on one device or many.

    accelerate launch examples/predict.py photos/ --model adapted --output labels.csv

On one device `microclip predict` does the same with the same options. `photos/` may also be Parquet, WebDataset or
Arrow files, and `--dataset_name` a data set of the Hub; `labels.parquet` gets Parquet. Interrupted, the same command
goes on. `--help` lists every setting, and docs/prediction.md what to run on several machines.
"""

from microclip_hf.commands.predict import main


if __name__ == "__main__":
    main()
