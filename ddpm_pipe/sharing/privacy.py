"""What others are told of this machine: nothing. Paths are cut to their last part."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def shared_name(place: str) -> str:
    """What others are told of where a model or data are: the id of a repository; of a path, whether or not it is there
    now, only the last part."""
    try:
        validate_repo_id(place)
        is_id = not Path(place).exists()
    except HFValidationError:
        is_id = False
    return place if is_id else Path(place).expanduser().resolve().name


def write_json(content: Any, file: Path) -> None:
    """Write JSON without what concerns this machine alone: where a part was loaded from, and absolute paths."""

    def shared(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shared(entry) for key, entry in value.items() if key != "_name_or_path"}
        if isinstance(value, list):
            return [shared(entry) for entry in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~")) else value

    file.write_text(json.dumps(shared(content), indent=2) + "\n")
