"""Where commands write: places that hold nothing yet, so that nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

from opd.errors import RunFolderError


def new_folder(name: str) -> Path:
    """The folder of this name. Raises RunFolderError for one that holds something, and for a place in a file."""
    place = Path(name)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise RunFolderError(f"'{name}' is there already; give --out a folder that is new or empty.")
    _refuse_place_in_a_file(place)
    return place


def _refuse_place_in_a_file(place: Path) -> None:
    above = next((folder for folder in place.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        raise RunFolderError(f"'{above}' is a file, so '{place}' cannot be written; give --out another place.")


def new_file(name: str, suffix: str) -> Path:
    """The file of this name. Raises RunFolderError for one that is there, for another suffix, and for a place in a file."""
    place = Path(name)
    if place.suffix != suffix:
        raise RunFolderError(f"'{name}' does not end in {suffix}; give --out a name that does.")
    if place.exists():
        raise RunFolderError(f"'{name}' is there already; give --out another name, or remove it.")
    _refuse_place_in_a_file(place)
    return place
