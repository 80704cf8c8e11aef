"""The source domain, and target domains: held-out species under another look."""

import json
import random
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage

from .birds import Bird, make_species, source_bird
from .render import PLACES, Look, render, render_with_mask
from .texts import caption, describe, make_name


SOURCE_LOOK = Look(scale=(58, 104), offset=0.1)
# Pictures of target domains are larger than the CLIP's input, so that crops show more.
TARGET_SIZE = 96


@dataclass(frozen=True)
class Domain:
    """Species of its own under a look of its own.

    Args:
        name (`str`): the domain's name, from which its species are drawn too.
        role (`"development"` or `"report"`): whether settings may be chosen on it.
        look ([`Look`]): how its pictures look.
        num_species (`int`): classes.
        absent (`int`): classes, the last ones, of which there are no pictures.
        imbalance (`float`): how many times as frequent the first class is as the last that is there.
    """

    name: str
    role: str
    look: Look
    num_species: int = 30
    absent: int = 0
    imbalance: float = 1.0

    @cached_property
    def species(self) -> dict[str, Bird]:
        """The attributes of every species by name, in the order of the labels."""
        rng = random.Random(f"species of {self.name}")
        species: dict[str, Bird] = {}
        for bird in make_species(rng, self.num_species):
            while (name := make_name(bird, rng)) in species:
                pass
            species[name] = bird
        return species

    @property
    def class_names(self) -> list[str]:
        """The species' names, in the order of the labels."""
        return list(self.species)

    @cached_property
    def descriptions(self) -> dict[str, list[str]]:
        """8 to 12 sentences on each species."""
        return {
            name: describe(bird, name, random.Random(f"descriptions of {self.name}: {name}"))
            for name, bird in self.species.items()
        }

    def examples(self, split: str, count: int, with_masks: bool = False) -> list[dict[str, Any]]:
        """Pictures with labels, the same in every call; a split's first pictures don't depend on `count`.

        Args:
            split (`str`): any name; other names, other pictures.
            count (`int`): number of pictures.
            with_masks (`bool`): add the bird's pixels as `mask`.

        Returns:
            Dictionaries with `image`, `label` and perhaps `mask`; images of 96 x 96.
        """
        present = self.num_species - self.absent
        weights = [self.imbalance ** (-index / max(1, present - 1)) for index in range(present)]
        birds = list(self.species.values())
        examples = []
        for index in range(count):
            rng = random.Random(f"{self.name} {split} {index}")
            label = rng.choices(range(present), weights)[0]
            arguments = (birds[label], rng.choice(self.look.places), self.look, rng, TARGET_SIZE)
            if with_masks:
                image, mask = render_with_mask(*arguments)
                examples.append({"image": image, "label": label, "mask": mask})
            else:
                examples.append({"image": render(*arguments), "label": label})
        return examples

    def dataset(self, split: str, count: int, with_masks: bool = False) -> Dataset:
        """[`examples`] as a data set with the features `image`, `label` (with names) and perhaps `mask`."""
        features = {"image": Image(), "label": ClassLabel(names=self.class_names)}
        if with_masks:
            features["mask"] = Image()
        return Dataset.from_list(self.examples(split, count, with_masks), features=Features(features))

    def write(self, folder: str | Path, num_train: int = 1600, num_test: int = 600) -> None:
        """Write `train/` (unlabelled), `test/` (a folder a class), `names.txt` and `descriptions.json`.

        Raises:
            FileExistsError: if the folder holds anything already.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(f"{folder} isn't empty; pass a new folder, or remove it first.")
        for split, count in (("train", num_train), ("test", num_test)):
            for index, example in enumerate(self.examples(split, count)):
                parent = folder / split
                if split == "test":
                    parent = parent / self.class_names[example["label"]]
                parent.mkdir(parents=True, exist_ok=True)
                example["image"].save(parent / f"{index:05}.png")
        (folder / "names.txt").write_text("\n".join(self.class_names) + "\n", encoding="utf-8")
        (folder / "descriptions.json").write_text(json.dumps(self.descriptions, indent=1), encoding="utf-8")


# Birds there are smaller and further from the middle than in the source domain, among more things. Each look's
# strength was set on the species of the development domains, by what the CLIP gets right without any adaptation.
_OUTDOORS = Look(clutter=(12, 28), scale=(54, 78), offset=0.13, tilt=0.3)
_LOOKS = {
    "garden": replace(_OUTDOORS, places=("meadow", "sand"), clutter=(28, 48), twigs=(2, 5), scale=(44, 64)),
    "dusk": replace(_OUTDOORS, gain=(0.62, 0.86), cast=(1.1, 0.95, 0.84), noise=8),
    "mist": replace(_OUTDOORS, places=("snow", "rock", "sky"), haze=(0.2, 0.4), blur=(0.5, 1.6)),
    "night": replace(_OUTDOORS, gain=(0.6, 0.88), cast=(0.92, 1.05, 1.0), noise=8, grey=(0.1, 0.3)),
    "thicket": replace(_OUTDOORS, places=("meadow",), clutter=(40, 64), twigs=(6, 11), scale=(46, 68)),
    "reef": replace(_OUTDOORS, places=("water",), cast=(0.8, 1.0, 1.1), haze=(0.08, 0.25), haze_color=(60, 130, 160)),
    "sketch": replace(_OUTDOORS, pencil=0.25, clutter=(4, 14)),
    "distant": replace(_OUTDOORS, scale=(44, 60), offset=0.2),
    "glare": replace(_OUTDOORS, gain=(1.15, 1.6), haze=(0.05, 0.18), haze_color=(255, 250, 236)),
    "trap": replace(_OUTDOORS, noise=30, tilt=0.6, blur=(0, 3), scale=(46, 68)),
    "rarities": replace(_OUTDOORS, gain=(0.6, 1.0), noise=10, twigs=(1, 3), scale=(48, 70)),
    "winter": replace(
        _OUTDOORS, places=("snow", "rock"), grey=(0.2, 0.5), gain=(0.8, 1.05), twigs=(1, 4), scale=(48, 70)
    ),
    "feeder": replace(
        _OUTDOORS,
        places=("sky", "meadow"),
        cast=(0.95, 1.08, 0.85),
        blur=(0, 1.6),
        tilt=0.5,
        offset=0.18,
        scale=(60, 90),
    ),
}
_DOMAINS = (
    Domain("garden", "development", _LOOKS["garden"]),
    Domain("dusk", "development", _LOOKS["dusk"]),
    Domain("mist", "development", _LOOKS["mist"]),
    Domain("steppe", "development", _LOOKS["garden"], absent=2, imbalance=20),
    Domain("bog", "development", _LOOKS["dusk"], absent=2, imbalance=20),
    Domain("night", "report", _LOOKS["night"]),
    Domain("thicket", "report", _LOOKS["thicket"]),
    Domain("reef", "report", _LOOKS["reef"], num_species=36),
    Domain("sketch", "report", _LOOKS["sketch"]),
    Domain("distant", "report", _LOOKS["distant"], num_species=24),
    Domain("glare", "report", _LOOKS["glare"]),
    Domain("trap", "report", _LOOKS["trap"], num_species=39),
    Domain("rarities", "report", _LOOKS["rarities"], absent=2, imbalance=20),
    Domain("winter", "report", _LOOKS["winter"], num_species=33, absent=6, imbalance=8),
    Domain("feeder", "report", _LOOKS["feeder"], imbalance=50),
)
DOMAINS = {domain.name: domain for domain in _DOMAINS}


def source_example(rng: random.Random, look: Look = SOURCE_LOOK) -> tuple[PILImage.Image, Bird, str]:
    """A picture of 64 x 64, all that can be said of it (the attributes and `place`), and a caption."""
    bird = source_bird(rng)
    place = rng.choice(list(PLACES))
    image = render(bird, place, look, rng)
    facts = {**bird, "place": place}
    return image, facts, caption(facts, rng)
