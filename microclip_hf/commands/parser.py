"""How options are read: a short help where a command has many, and errors of one line."""

import copy
import difflib
from argparse import SUPPRESS, Action, ArgumentDefaultsHelpFormatter, ArgumentError, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser

from .words import advise


HELP_ALL = "--help_all"
LONGEST_NAME = 34  # columns of the help for the names of options
LIKENESS = 0.7  # from 0 to 1; names that are less alike aren't mistyped ones


class UsageError(ValueError):
    """Options that can't be read."""


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Help that shows an option's first spelling, and the defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=LONGEST_NAME)

    def _get_help_string(self, action: Action) -> str | None:
        # A help text that speaks of its default says what stands for `None`.
        silent = action.default is False or action.default in (None, SUPPRESS, "", [])
        if silent or "efault" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        return f"{_name(action)} {{{','.join(map(str, action.choices))}}}" if action.choices else _name(action)


class OptionParser(HfArgumentParser):
    """A command's options.

    Args:
        command (`str`): the name after `microclip`.
        description (`str`, *optional*): what the command does.
        options (`type` or `tuple[type, ...]`): dataclasses of options.
        groups (`Mapping[str, Sequence[str]]`, *optional*): for a command of many options, those that `--help` shows,
            by headings; `--help_all` then shows all.
        required (`Sequence[str]`, *optional*): options that have a default in their dataclass, and none here.
        others (`Mapping[str, dict[str, Any]]`): what no dataclass can say: what `add_argument` takes, by name.
    """

    def __init__(
        self,
        command: str,
        description: str | None,
        options: type | tuple[type, ...],
        groups: Mapping[str, Sequence[str]] | None,
        required: Sequence[str],
        others: Mapping[str, dict[str, Any]],
    ) -> None:
        super().__init__(
            options,
            prog=f"microclip {command}",
            description=description,
            allow_abbrev=False,  # what abbreviates one option today may abbreviate two tomorrow
            exit_on_error=False,
            formatter_class=HelpFormatter,
        )
        self.groups = groups
        if groups is not None:
            self.add_argument(HELP_ALL, action=_ShowAll, nargs=0, help="Show every setting.")
        for name, settings in others.items():
            self.add_argument(name, **settings)
        self.required = [action for action in self._actions if action.required or action.dest in required]
        first = sorted(self.required, key=lambda action: bool(action.option_strings))
        self.usage = " ".join([self.prog, *map(_placeholder, first), "[options]"])
        # Or else argparse would report them before what is unknown, such as another name of theirs.
        for action in self.required:
            action.required = False

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        """As argparse's; what is wrong, unknown or missing is a [`UsageError`]."""
        try:
            namespace, unknown = super().parse_known_args(args, namespace)
        except ArgumentError as error:
            name = f"{error.argument_name.partition('/')[0]}: " if error.argument_name else ""
            raise UsageError(f"{name}{error.message.rstrip('.')}.") from error
        if unknown:
            raise UsageError(self._refuse(unknown[0]))
        missing = [_name(action) for action in self.required if vars(namespace)[action.dest] is None]
        if missing:
            raise missing_error(self.prog, missing)
        return namespace, unknown

    def format_help(self) -> str:
        """The options of the groups, in short, where there are groups."""
        if self.groups is None:
            return super().format_help()
        actions = {_name(action).lstrip("-"): action for action in self._actions}
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for title, names in self.groups.items():
            formatter.start_section(title)
            formatter.add_arguments([_shortened(actions[name]) for name in names])
            formatter.end_section()
        formatter.add_text(f"{self.prog} {HELP_ALL} shows every setting, also those of transformers' Trainer.")
        return formatter.format_help()

    def format_full_help(self) -> str:
        """All options, with all that there is to say."""
        return super().format_help()

    def _refuse(self, word: str) -> str:
        """Why there is nothing to do with a word, and what to do in its place."""
        if not word.startswith("-"):
            return f"{word!r} belongs to no option; quote a value that has spaces, or leave out what is too much."
        option = word.partition("=")[0]
        name = option.lstrip("-").replace("-", "_").lower()
        names = [_name(action).lstrip("-") for action in self._actions]
        advice = advise(name, names)
        if advice is not None:
            return f"There is no setting {option}; {advice}."
        options = [_name(action).lstrip("-") for action in self._actions if action.option_strings]
        near = difflib.get_close_matches(name, options, 1, LIKENESS)
        if near:
            return f"There is no setting {option}; did you mean --{near[0]}?"
        return f"There is no setting {option}; {HELP_ALL if self.groups else '--help'} lists all settings."


class _ShowAll(Action):
    """Print the full help, and end."""

    def __call__(self, parser: ArgumentParser, *_: Any) -> None:
        print(parser.format_full_help(), end="")
        parser.exit()


def missing_error(program: str, names: Sequence[str]) -> UsageError:
    """What is raised where a program was given less than it needs."""
    return UsageError(f"Missing: {', '.join(names)}. Pass what is missing; {program} --help explains it.")


def _name(action: Action) -> str:
    """An option's first spelling in full, or what an argument without a name is called."""
    return next((option for option in action.option_strings if option.startswith("--")), action.dest)


def _placeholder(action: Action) -> str:
    """What a usage says of an option, or of an argument without a name."""
    return f"{_name(action)} ..." if action.option_strings else action.dest.upper()


def _shortened(action: Action) -> Action:
    """An option with the first sentence of its help."""
    short = copy.copy(action)
    short.help = action.help.partition(". ")[0].rstrip(".")
    return short
