"""Templates of pages, which share one style."""

from pathlib import Path

import jinja2

from .thumbnails import percent, truncate


STYLE_FOLDER = Path(__file__).parent


def load_template(path: Path) -> jinja2.Template:
    """The template of a page, which may include `page_style.css`."""
    # Names of classes and files are anybody's text: escaped, or they would be read as HTML.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, STYLE_FOLDER], encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "name": truncate}
    return environment.get_template(path.name)
