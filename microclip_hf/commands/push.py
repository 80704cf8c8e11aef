"""`microclip push`: a saved model folder -> a repository on the Hub, in one commit."""

from dataclasses import dataclass

from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from ..hub.push import check_model_folder, push_folder
from . import command_frame, read_options


@dataclass
class PushArguments:
    """Where to, and how."""

    repo_id: str = HfArg(help="The repository, user/name; it is made where there is none.")
    private: bool = HfArg(default=False, help="Make a repository that others can't see.")
    revision: str | None = HfArg(default=None, help="A branch that exists. Default: the main one.")
    commit_message: str = HfArg(default="Push a microCLIP", help="The commit's title.")


@command_frame("push", "the repository holds all of a commit or nothing of it")
def main(arguments: list[str] | None = None) -> None:
    """Check the folder, and push it."""
    description = (
        f"{__doc__} The model, its code, image processor, card, descriptions, picture, training settings, results and "
        "TensorBoard logs are pushed; checkpoints and whatever else lies in the folder stay here. Log in before with "
        "'hf auth login'."
    )
    folder = {"help": "The folder that the model was saved in."}
    options, others = read_options("push", description, PushArguments, arguments, folder=folder)
    # What the Hub would refuse once the weights are uploaded.
    validate_repo_id(options.repo_id)
    if get_token() is None:
        raise ValueError("The Hub doesn't know you here; log in with 'hf auth login', or set HF_TOKEN.")
    check_model_folder(others.folder)
    pushed = push_folder(
        others.folder, options.repo_id, options.commit_message, options.private or None, options.revision
    )
    print(f"Pushed to {pushed.repo_url}")
