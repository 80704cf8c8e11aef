"""A tab that labels the photos of `microclip check`, one by one, by keys; each label is saved as it is given."""

import html
import threading
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image, ImageOps

from microclip_hf.check.folder import NUM_CANDIDATES, Check, read_check
from microclip_hf.check.labels import NONE_OF_THESE, UNKNOWN, read_rows, set_label
from microclip_hf.check.page import describe_candidates, read_photo
from microclip_hf.images import UNREADABLE


SIDE = 768  # of a photo as it is sent, in pixels
# Keys by what they press. A key held down, or pressed again before the next photo is there, counts once.
KEYS = {"label_none": "0", "label_unknown": "u", "label_back": "ArrowLeft", "label_skip": "ArrowRight"}
LISTEN = """() => {
  const buttons = %s;
  let last = "", when = 0;
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    if (event.target.closest("input, textarea, [role=listbox], [role=tab]")) return;
    const button = document.getElementById(buttons[event.key]);
    const heading = document.getElementById("label_heading");
    if (!button || button.offsetParent === null) return;
    event.preventDefault();
    if (heading.innerText === last && Date.now() - when < 3000) return;
    last = heading.innerText;
    when = Date.now();
    button.click();
  });
}"""


class Labelling:
    """The photos of a check, in the order of its table."""

    def __init__(self, folder: str) -> None:
        self.check: Check = read_check(folder)
        self.lock = threading.Lock()  # two people's labels are written one after the other

    def rows(self) -> dict[str, str]:
        """Labels by file, in the order of the table as it is now; rows of photos that weren't drawn are left out."""
        drawn = set(self.check.drawn)
        return {row[0]: row[1].strip() for row in read_rows(self.check.labels) if row[0] in drawn}

    def open(self) -> tuple[Any, ...]:
        """What the page shows first: the first photo without a label."""
        self.check = read_check(self.check.folder)  # as after `--more`
        return self.show(self._next(""))

    def label(self, file: str, label: str) -> tuple[Any, ...]:
        """Label the photo that is shown, and show the next one without a label."""
        with self.lock:
            if file in self.rows():
                set_label(self.check.labels, file, label)
            elif file:
                gr.Warning(f"{file} has no row in {self.check.labels} any more, so its label isn't kept.")
        return self.show(self._next(file))

    def choose(self, file: str, number: int) -> tuple[Any, ...]:
        """Label the photo that is shown with one of its classes in question."""
        names = self.check.candidates(file) if file in self.rows() else []
        return self.label(file, names[number]) if number < len(names) else self.show(file)

    def move(self, file: str, step: int) -> tuple[Any, ...]:
        """Show the photo before or after; the last one, where none is shown."""
        files = list(self.rows())
        position = files.index(file) + step if file in files else len(files) - 1
        return self.show(files[min(max(position, 0), len(files) - 1)] if files else "")

    def show(self, file: str) -> tuple[Any, ...]:
        """File, heading, photo, what the classes look like, the buttons of classes, and no other class."""
        rows = self.rows()
        progress = f"{sum(map(bool, rows.values()))} of {len(rows)} photos have a label"
        if file not in rows:
            rest = f"All are labelled. Now: `microclip check --finish {self.check.folder}`"
            text = f"### {progress}\n\n{rest if all(rows.values()) else 'Load this page again.'}"
            return "", text, None, "", *[gr.update(visible=False)] * NUM_CANDIDATES, None
        described = describe_candidates(self.check, file)
        number = list(rows).index(file) + 1
        text = f"### Photo {number}: {_plain(file)}\n\n{progress}. This one: {_plain(rows[file]) or 'none yet'}."
        buttons = [gr.update(value=f"{number}  {name}", visible=True) for number, (name, _) in enumerate(described, 1)]
        buttons += [gr.update(visible=False)] * (NUM_CANDIDATES - len(buttons))
        return file, text, self._photo(file), _as_html(described), *buttons, None

    def _photo(self, file: str) -> Image.Image | None:
        try:
            return ImageOps.contain(read_photo(self.check, file, SIDE), (SIDE, SIDE))  # a small one is enlarged
        except UNREADABLE:
            gr.Warning(f"{Path(self.check.record.photos, file)} can't be read; put it back, or go on with the next.")
            return None

    def _next(self, file: str) -> str:
        """The next photo without a label, also from the beginning; "" where all have one."""
        rows = self.rows()
        files = list(rows)
        start = files.index(file) + 1 if file in rows else 0
        return next((each for each in files[start:] + files[:start] if not rows[each]), "")


def build_labelling(page: gr.Blocks, folder: str) -> None:
    """The tab of a check's folder.

    Raises:
        ValueError: if the folder holds no check.
    """
    own = Labelling(folder)
    # The client's, which says what is shown there: a file, since numbers of rows change as the table is sorted.
    file = gr.Textbox(visible=False)
    heading = gr.Markdown(elem_id="label_heading")
    with gr.Row():
        photo = gr.Image(
            label="Photo", interactive=False, height="50vh", elem_id="label_photo", buttons=[], min_width=280
        )
        with gr.Column(min_width=280):
            ids = [f"label_{number}" for number in range(1, NUM_CANDIDATES + 1)]
            classes = [gr.Button(visible=False, elem_id=name) for name in ids]
            with gr.Row():
                none = gr.Button(f"0  {NONE_OF_THESE}", elem_id="label_none", min_width=120)
                unknown = gr.Button(f"u  {UNKNOWN}", elem_id="label_unknown", min_width=120)
            with gr.Row():
                back = gr.Button("←  back", elem_id="label_back", min_width=120)
                skip = gr.Button("→  skip", elem_id="label_skip", min_width=120)
            other = gr.Dropdown(own.check.record.class_names, value=None, label="Another class", elem_id="label_other")
            described = gr.HTML(elem_id="label_described")
    shown = [file, heading, photo, described, *classes, other]
    quiet = {"api_visibility": "private", "show_progress": "hidden"}
    for number, button in enumerate(classes):
        button.click(partial(own.choose, number=number), file, shown, **quiet)
    for button, label in ((none, NONE_OF_THESE), (unknown, UNKNOWN)):
        button.click(partial(own.label, label=label), file, shown, **quiet)
    for button, step in ((back, -1), (skip, 1)):
        button.click(partial(own.move, step=step), file, shown, **quiet)
    other.input(own.label, [file, other], shown, **quiet)
    page.load(own.open, None, shown, **quiet)
    keys = {name: number for number, name in enumerate(ids, start=1)} | KEYS
    page.load(None, None, None, js=LISTEN % {str(key): name for name, key in keys.items()})


def _plain(text: str) -> str:
    """A text that Markdown shows as it is."""
    return "".join(f"&#{ord(sign)};" if sign in "\\`*_{}[]()#+-!|<>~&$" else sign for sign in text)


def _as_html(described: list[tuple[str, list[str]]]) -> str:
    parts = []
    for name, sentences in described:
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<h4>{html.escape(name)}</h4><ul>{items}</ul>")
    return "".join(parts)
