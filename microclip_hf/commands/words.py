"""What options are called elsewhere, and what to pass here, so that an error can say it."""

from collections.abc import Collection


# Of what is to pass for any of the words, the first that a command has; a text of several words is for every command.
SYNONYMS = {
    "e epoch epochs max_epochs n_epochs num_epochs": ("num_train_epochs",),
    "iterations iters max_iters num_steps num_train_steps steps": ("max_steps",),
    "b batch batch_size bs train_batch_size": ("batch_size", "per_device_train_batch_size"),
    "eval_batch_size val_batch_size": ("per_device_eval_batch_size", "batch_size"),
    "accum_freq accumulation accumulation_steps": ("gradient_accumulation_steps",),
    "lr lr0": ("learning_rate",),
    "wd": ("weight_decay",),
    "opt optimizer": ("optim",),
    "lr_scheduler sched schedule scheduler": ("lr_scheduler_type",),
    "warmup warmup_epochs": ("warmup_steps",),
    "amp bf16 half mixed_precision precision": ("bf16", "precision"),
    "grad_checkpointing": ("gradient_checkpointing",),
    "compile torchcompile": ("torch_compile",),
    "accelerator cpu cuda device devices gpu gpus no_cuda": ("device", "use_cpu"),
    "cpus num_threads nthreads threads": ("put OMP_NUM_THREADS=4, say, before the command",),
    "dataloader_num_workers dl_workers j num_proc num_workers workers": (
        "num_workers",
        "dataloader_num_workers",
    ),
    "random_seed": ("seed",),
    "align alignment": ("distribution_alignment",),
    "crops k n_crops": ("num_crops",),
    "gamma": ("prior_ratio",),
    "lambda": ("label_fusion_ratio",),
    "m model model_id model_name": ("llm", "model_name_or_path", "model", "folder"),
    "arch backbone base_model clip clip_model": ("clip", "model_name_or_path", "model"),
    "model_path pretrained weights": ("model_name_or_path", "model", "folder"),
    "checkpoint ckpt": ("resume_from_checkpoint", "model_name_or_path", "model", "folder"),
    "cont continue resume": ("resume_from_checkpoint",),
    "d data data_dir data_path dir folder i image image_dir images img imgs input inputs path photo photo_dir photos "
    "picture pictures source": ("train_dir", "test_dir", "photos", "photo", "folder"),
    "train train_data train_dir train_folder train_path": ("train_dir", "test_dir", "photos", "photo"),
    "eval eval_dir test test_data test_dir val val_data val_dir valid validation validation_dir": (
        "test_dir",
        "photos",
        "photo",
    ),
    "dataset dataset_id hf_dataset": ("dataset_name",),
    "split train_split": ("dataset_split",),
    "class_file class_map class_name class_names classes classnames label label_names labels names": (
        "class_names",
        "classes",
    ),
    "caption captions definitions description": ("descriptions",),
    "prompt prompts template": ("templates", "questions"),
    "benchmark": ("preset",),
    "dest destination log_dir logdir logs o out outdir output output_dir output_file output_folder output_path "
    "project results save save_dir save_path": ("output_dir", "output", "folder"),
    "csv json onnx png": ("output",),
    "exist_ok f force overwrite overwrite_output_dir": ("choose an output that isn't there yet; none is overwritten",),
    "cfg config_file settings yaml": ("config",),
    "hub hub_id repo repo_name": ("repo_id", "hub_model_id"),
    "push upload": ("push_to_hub",),
    "html plot": ("report",),
    "api_base endpoint url": ("base_url",),
    "instruction query question": ("questions",),
    "fp8 int quant quantize": ("int8",),
    "image_size img_size imgsz resolution size": ("leave it out; a model's own image processor sets the size",),
    "debug log_level loglevel v verbose": ("log_level",),
    "no_progress q quiet silent": ("disable_tqdm",),
}
WORDS = {word: said for words, said in SYNONYMS.items() for word in words.split()}
# What else there is to say of an option, or of what is passed without a name.
VALUES = {
    "use_cpu": "--use_cpu true for the CPU, or put CUDA_VISIBLE_DEVICES=0 before the command for one GPU",
    "folder": "the folder without an option's name",
    "photo": "the photo without an option's name",
    "photos": "the photos, or their folder, without an option's name",
}


def advise(word: str, names: Collection[str]) -> str | None:
    """What to do in place of passing `word`, to a command that takes `names`; `None` where nobody knows."""
    for said in WORDS.get(word, ()):
        if " " in said:
            return said
        if said in names:
            return f"pass {VALUES.get(said, f'--{said}')}"
    return None
