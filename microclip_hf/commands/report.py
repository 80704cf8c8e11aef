"""`microclip report`: a run's folder -> a page that shows what was learned: curves, images, labels that changed."""

from pathlib import Path

from ..report.page import EARLIER, write_report
from ..run_names import REPORT
from . import command_frame, naming_options, read_options


@command_frame("report", "the page of before, if any, is still there")
def main(arguments: list[str] | None = None) -> None:
    """Write the page anew from what the run left in its folder, and from the images where they still are."""
    folder = {"help": f"The --output_dir of a finished run; {REPORT} in it is written anew."}
    (options,) = read_options("report", __doc__, (), arguments, folder=folder)
    with naming_options("output_dir"):
        num_missing = write_report(options.folder)
    print(f"Written: {Path(options.folder, REPORT)}")
    if num_missing:
        print(f"{num_missing} images can't be read any more; the page of before, if any, is {EARLIER}.")
