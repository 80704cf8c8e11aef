"""`microclip check`: a folder of photos and two models -> which photos to label, and what these labels say."""

from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from ..check.folder import PAGE, TO_LABEL, Check, is_another_model, read_check
from ..check.results import PICTURE, RESULTS, RESULTS_PAGE, accuracies_table, describe_labels, told
from ..check.run import NUM_LABELS, CheckInputs, extend_check, finish_check, start_check
from ..files import check_writable
from ..hub.card_evaluation import add_section, read_card
from ..loading import choose_device
from . import command_frame, naming_options, read_options
from .options import check_files


INTERRUPTED = (
    "labels are as they were; the same command goes on, but for --more: rows that are missing are added by --more 1"
)


@dataclass
class CheckArguments:
    """What is compared, and how many photos to label; or which check to go on with."""

    model: str | None = HfArg(
        default=None,
        help="The adapted model: Hub id or folder. Or what microclip predict said by it, a .csv or .parquet file.",
        aliases=["--model_name_or_path"],
    )
    clip: str | None = HfArg(
        default=None, help="The CLIP that was adapted: Hub id or folder. Or such a file likewise."
    )
    descriptions: str | None = HfArg(
        default=None, help="The file of descriptions that CLIP goes by, and that the page shows. Default: the names."
    )
    class_names: str | None = HfArg(
        default=None, help="The file of class names, where --model is such a file. Default: those in both files."
    )
    output_dir: str | None = HfArg(default=None, help=f"Folder of the check, for {TO_LABEL} and {PAGE}.")
    num_labels: int = HfArg(default=NUM_LABELS, help="Photos to label.")
    seed: int = HfArg(default=0, help="Of the draw.")
    more: int | None = HfArg(default=None, help="Draw so many further photos for the check in --output_dir.")
    finish: str | None = HfArg(default=None, help=f"Folder of a check whose {TO_LABEL} has labels: say what they say.")
    update_card: bool = HfArg(
        default=False,
        help="With --finish: also write the verdict into the card, README.md, of the adapted model's folder.",
    )
    batch_size: int = HfArg(default=32, help="Photos classified at once.")
    device: str | None = HfArg(default=None, help="As torch calls it. Default: a GPU if there is one.")


@command_frame("check", INTERRUPTED)
def main(arguments: list[str] | None = None) -> None:
    """Draw photos to label, or more of them, or say what their labels say."""
    photos = {"nargs": "*", "help": "The folder of photos; none with --finish and --more."}
    options, others = read_options("check", __doc__, CheckArguments, arguments, photos=photos)
    with naming_options("output_dir", "num_labels", "more", "class_names"):
        if options.finish is not None:
            _refuse(options, others.photos, "finish", "update_card")
            _finish(options.finish, options.update_card)
        elif options.more is not None:
            _refuse(options, others.photos, "more", "output_dir")
            _tell(extend_check(_required(options, "output_dir"), options.more), options.more)
        else:
            _tell(_start(options, others.photos), options.num_labels)


def _start(options: CheckArguments, photos: list[str]) -> Check:
    """Everything that can be wrong without reading a model is refused first."""
    if len(photos) != 1:
        raise ValueError(
            f"There are {len(photos)} folders; pass the one folder of photos, as in microclip check photos/."
        )
    inputs = CheckInputs(
        photos=photos[0],
        model=_required(options, "model"),
        clip=_required(options, "clip"),
        descriptions=options.descriptions,
        class_names=options.class_names,
        device=choose_device(options.device, "--device"),
        batch_size=options.batch_size,
    )
    output_dir = _required(options, "output_dir")
    if options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}; pass 1 or more.")
    check_files(options, "descriptions", "class_names")
    check_writable(output_dir, "--output_dir")
    return start_check(inputs, output_dir, options.num_labels, options.seed)


def _required(options: CheckArguments, name: str) -> str:
    value = vars(options)[name]
    if not value:
        raise ValueError(f"--{name} is missing; microclip check --help says what it is.")
    return value


def _refuse(options: CheckArguments, photos: list[str], option: str, *allowed: str) -> None:
    """Refuse what a check that goes on knows already."""
    defaults = vars(CheckArguments())
    given = [
        name for name, value in vars(options).items() if value != defaults[name] and name not in (option, *allowed)
    ]
    refused = [*photos, *(f"--{name}" for name in given)]
    if refused:
        raise ValueError(f"{', '.join(refused)} can't go with --{option}, which takes all from the check's folder.")


def _tell(check: Check, num_labels: int) -> None:
    differs = check.differs
    print(
        f"The models differ on {sum(differs.values())} of {len(differs)} photos. Of {len(check.drawn)} drawn so far, "
        f"{sum(differs[file] for file in check.drawn)} are of these."
    )
    if len(check.drawn) < num_labels:
        print(f"There are no more photos than these {len(check.drawn)}.")
    print(
        f"Look at {check.folder / PAGE}, and write the class of each photo into {check.labels}. Then: microclip check "
        f"--finish {check.folder}"
    )


def _finish(folder: str, update_card: bool) -> None:
    """Say what the labels say; a card that can't be written is known before anything is."""
    card, model = None, None
    if update_card:
        record = read_check(folder).record
        model = record.sources["adapted"]
        if is_another_model(record, "adapted"):
            raise ValueError(
                f"--update_card: {model} isn't the model any more that was checked; leave its card as it is."
            )
        card = read_card(model)
    results = finish_check(folder)
    print(f"{told(results)}\n{describe_labels(results)}")
    print(f"Saved to {folder}: {RESULTS}, {RESULTS_PAGE}, {PICTURE}.")
    if card is not None:
        content = f"{results['sentence']}\n\n{accuracies_table(results)}\n\n{describe_labels(results)}\n"
        add_section(card, model, "## Did it help?", content)
        print(f"Added to the card: {Path(model, 'README.md')}")
