"""Config files: Python files that set `config`; presets are those in `configs/`."""

import os
import runpy
import warnings
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "configs"
if not CONFIGS.exists():  # a source checkout: configs/ stands beside the package
    CONFIGS = Path(__file__).parents[2] / "configs"


def find_config(path: str | Path, folder: Path | None = None) -> Path:
    """The file of a config.

    A bare name (`demo_expert`) always means a preset, even if the working folder has a file of
    that name. A path that ends in .py or has a slash means a file.

    Args:
      path: a Python file, or the name of a preset.
      folder: of the presets; default: CONFIGS.

    Raises:
      ValueError: there is no such file or preset.
    """
    file, folder, name = Path(path), folder or CONFIGS, str(path)
    bundled = folder / f"{file.stem}.py"
    is_bare = not isinstance(path, Path) and os.sep not in name
    if is_bare and not name.endswith(".py"):
        local = next((path for path in (f"{name}.py", name) if Path(path).is_file()), None)
        if bundled.is_file():
            if local:
                warnings.warn(
                    f"{name}: this is the config that comes with flexolmo_jax, {bundled}; for the "
                    f"file in this folder, write ./{local}",
                    stacklevel=3,
                )
            return bundled
        if local:
            raise ValueError(
                f"no config named {name}; for the file in this folder, write ./{local}"
            )
    elif file.is_file():
        return file
    elif is_bare and bundled.is_file():
        return bundled
    known = ", ".join(sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__"))
    raise ValueError(f"no config at {path}; give a Python file, or one of: {known}")


def load_config(path: str | Path, kind: type, folder: Path | None = None) -> Any:
    """Runs a config file and returns its `config`.

    Args:
      path, folder: as in `find_config`.
      kind: the class that `config` must be of.

    Raises:
      ValueError: the file is missing or fails, or its config is of another stage.

    Examples:
      >>> import flexolmo_jax as fo
      >>> config = fo.load_config("demo_anchor", fo.AnchorTraining)
      >>> config.model.width, config.steps
      (128, 500)
    """
    file = find_config(path, folder)
    try:
        values = runpy.run_path(str(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    config = values.get("config")
    if not isinstance(config, kind):
        found = "none" if config is None else type(config).__name__
        raise ValueError(f"{file}: expected `config` to be {kind.__name__}, found {found}")
    return config
