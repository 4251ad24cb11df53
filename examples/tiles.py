"""Sort pictures of a game into a folder for each class: `python examples/tiles.py <clone of the tiles> <folder>`.

The tiles of Dungeon Crawl Stone Soup, which their artists gave to the public domain (CC0), come from
`git clone https://github.com/crawl/tiles`: some 2,000 coloured pictures, most of 32x32 pixels.
"""

import argparse
import shutil
from pathlib import Path

RELEASE = "releases/Nov-2015"
CLASSES = {
    "altar": "dngn/altars",
    "armour": "item/armour",
    "book": "item/book",
    "floor": "dngn/floor",
    "gateway": "dngn/gateways",
    "monster": "mon",
    "potion": "item/potion",
    "spell": "gui/spells",
    "wall": "dngn/wall",
    "weapon": "item/weapon",
}
"""Name of a class -> where its pictures are in a release."""
SYMBOLS = "i-*"
"""Names of small symbols that the game lays over a picture, which are left out."""


def main(clone: Path, folder: Path) -> None:
    for name, place in CLASSES.items():
        release = clone / RELEASE / place
        if not release.is_dir():
            raise SystemExit(f"clone={str(clone)!r} has no folder {RELEASE}/{place}.")
        for file in release.rglob("*.png"):
            if not file.match(SYMBOLS):
                target = folder / name / file.relative_to(release).as_posix().replace("/", "_")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", type=Path, help="clone of https://github.com/crawl/tiles")
    parser.add_argument("folder", type=Path, help="where the folders of the classes go")
    main(**vars(parser.parse_args()))
