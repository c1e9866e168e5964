"""Keras's own rule for the default data format: ``image_data_format`` in its configuration file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from conv3dt_jax._arguments import DATA_FORMATS


def default_data_format() -> str:
    """ "channels_last", unless ``$KERAS_HOME/keras.json`` or ``~/.keras/keras.json`` says otherwise.

    Raises:
      ValueError: the file is there but cannot be read, is no JSON object, or names no data format.
    """
    home = os.environ.get("KERAS_HOME")
    path = (Path(home) if home else Path("~/.keras")).expanduser() / "keras.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return "channels_last"
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{_blame(path)} cannot be read ({error}); {_REMEDY}") from error
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_blame(path)} is no valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{_blame(path)} holds no JSON object; {_REMEDY}")
    data_format = config.get("image_data_format", "channels_last")
    if data_format not in DATA_FORMATS:
        raise ValueError(
            f"{_blame(path)} has image_data_format={data_format!r}, which is none of {DATA_FORMATS}; {_REMEDY}"
        )
    return data_format


_REMEDY = "repair or remove it, or pass data_format to the layer."


def _blame(path: Path) -> str:
    return f"`data_format=None` asks the Keras configuration, but {path}"
