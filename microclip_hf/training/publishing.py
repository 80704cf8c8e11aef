"""The card of a run, and its way to the Hub: the Trainer's overrides for both."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers.trainer_utils import has_length

from ..hub.model_card import CardFacts, keep_card, split_results, write_model_card
from ..hub.push import CARD, PICTURE, check_repository, push_folder
from ..plots import plot_adaptation
from .saving import SavingTrainer


class PublishingTrainer(SavingTrainer):
    """A Trainer with a card of its own, which pushes a run's folder in one commit.

    Before the card is written, `card_facts` ([`CardFacts`]) may be replaced or added to.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.card_facts = CardFacts(base_model=self.model.clip.config._name_or_path or None)
        self._card: bytes | None = None  # as this Trainer wrote it

    @property
    def curves(self) -> list[dict[str, float]] | None:
        """What was logged, for [`plot_adaptation`]; `None` where nothing is trained."""
        return None if self.args.trains_nothing else self.state.log_history

    @property
    def num_images(self) -> int | None:
        """How many images there are to adapt to, as far as that is known."""
        return len(self.train_dataset) if has_length(self.train_dataset) else None

    def create_model_card(self, finetuned_from: str | None = None, **kwargs: Any) -> None:
        """Write the card and, where there is none yet, a picture of the run; for the results see `card_facts`.

        A Trainer that has neither trained nor evaluated keeps the card that it finds; otherwise one that it didn't
        write itself is kept as `README.old.md`.

        Args:
            finetuned_from (`str`, *optional*): the CLIP that was adapted.
            kwargs: `dataset`, `license` and `language` as in [`CardFacts`]; others of the base class have no effect.
        """
        card = Path(self.args.output_dir, CARD)
        if not self.is_world_process_zero() or (card.exists() and not self.state.log_history):
            return
        if card.exists() and card.read_bytes() != self._card:
            keep_card(self.args.output_dir)
        facts = {"base_model": finetuned_from, **kwargs}
        names = [field.name for field in fields(CardFacts) if facts.get(field.name) is not None]
        self.card_facts = replace(self.card_facts, **{name: facts[name] for name in names})
        evaluations = [entry for entry in self.state.log_history if "eval_accuracy" in entry]
        if evaluations:
            results = {name.replace("eval_", "adapted_", 1): value for name, value in evaluations[-1].items()}
            self.card_facts.results |= split_results(results)
        picture = os.path.join(self.args.output_dir, PICTURE)
        if self.state.log_history and not os.path.exists(picture):
            plot_adaptation(picture, self.curves, self.card_facts.results)
        write_model_card(self.model.config, self.args, self.card_facts, self.num_images)
        self._card = card.read_bytes()

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As in the base class; a repository that exists is also checked, as it will be when pushing. A `RuntimeError`
        if the Hub refuses, can't be reached, or the repository holds something else.
        """
        options = {} if private is None else {"private": private}  # an argument that transformers 5.18 doesn't have
        private = self.args.hub_private_repo if private is None else private
        try:
            super().init_hf_repo(token, **options)
            if self.is_world_process_zero():
                check_repository(self.hub_model_id, private, self.args.hub_revision, token or self.args.hub_token)
        except Exception as error:
            name = self.args.hub_model_id or os.path.basename(os.path.abspath(self.args.output_dir))
            raise RuntimeError(
                f"The repository {name} on the Hub can't be used: {error}\nLog in with 'hf auth login', choose "
                "another `hub_model_id`, or leave out `push_to_hub`."
            ) from error

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in the base class: the model, its code and card, and what training wrote beside them, in one commit.

        Checkpoints stay here, and so do the report and the labels of single images, which show and name the photos.

        Args:
            kwargs: passed to [`create_model_card`]; for the other arguments see [`push_folder`].

        Raises:
            RuntimeError: if the push fails. It says which command does it later; the Hub's repository is as before.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model()
        self.create_model_card(**kwargs)
        if not self.is_world_process_zero():
            return None
        args = self.args
        return push_folder(
            args.output_dir,
            self.hub_model_id or args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir)),
            commit_message or "End of training",
            args.hub_private_repo if private is None else private,
            args.hub_revision if revision is None else revision,
            args.hub_token if token is None else token,
            blocking,
        )
