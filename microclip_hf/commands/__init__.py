"""The command line: `microclip <command>`; `microclip <command> --help` explains one."""

import importlib
import sys


# What each does, and the extra that it needs.
COMMANDS = {
    "adapt": ("adapt a CLIP to a folder of images without labels", "train"),
    "export": ("write an adapted model as one ONNX file", "onnx"),
}


def main() -> None:
    """Entry point of `microclip`."""
    arguments = sys.argv[1:]
    listing = "\n".join(f"  {name:10} {summary}" for name, (summary, _) in COMMANDS.items())
    usage = f"usage: microclip <command> [options]\n\ncommands:\n{listing}\n\nmicroclip <command> --help explains one."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return
    if arguments[0] not in COMMANDS:
        sys.exit(f"microclip: there is no command {arguments[0]!r}\n\n{usage}")
    try:
        command = importlib.import_module(f".{arguments[0]}", __name__)
    except ModuleNotFoundError as error:
        extra = COMMANDS[arguments[0]][1]
        sys.exit(f'microclip: {error.name} is missing; pip install "microclip_hf[{extra}]" brings it.')
    command.main(arguments[1:])
