"""Keep the paths of this machine out of what is shared: each is cut to its last part."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def shared_name(place: str) -> str:
    """Return the name under which others are told of a model or data.

    This is the id of a repository on the Hub, or only the last part of a path, whether or not the path exists now.
    """
    try:
        validate_repo_id(place)
        is_id = not Path(place).exists()
    except HFValidationError:
        is_id = False
    return place if is_id else Path(place).expanduser().resolve().name


def write_json(content: Any, file: Path) -> None:
    """Write JSON without what concerns this machine alone.

    The entries that say where a part was loaded from are left out, and absolute paths are cut to their last part.
    """

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(entry) for key, entry in value.items() if key != "_name_or_path"}
        if isinstance(value, list):
            return [shared(entry) for entry in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

    file.write_text(json.dumps(shared(content), indent=2) + "\n")
