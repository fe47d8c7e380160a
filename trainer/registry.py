"""Finds trainers by name among the installed packages' entry points, group `overnight.trainers`.

Built-in trainers and strangers' plugins are found the same way. Only the trainer that is asked for is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

from overnight.store.errors import CampaignError
from overnight.trainer.protocol import Trainer, TrainerContext

GROUP = "overnight.trainers"


def installed_trainers() -> Mapping[str, EntryPoint]:
    """Return the entry point of every installed trainer by name, sorted; imports none of them.

    Raises:
        CampaignError: two packages claim one name.
    """
    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        other = found.setdefault(point.name, point)
        if other.value != point.value:
            raise CampaignError(
                f"trainer `{point.name}` is offered by both `{other.value}` and `{point.value}`; uninstall one of them"
            )
    return found


def trainer_class(name: str) -> type[Trainer]:
    """Import the trainer called `name`.

    Raises:
        CampaignError: none is installed under that name, or its package does not import.
    """
    installed = installed_trainers()
    if name not in installed:
        names = ", ".join(f"`{other}`" for other in installed)
        raise CampaignError(
            f'`trainer = "{name}"` in `[campaign]` is not installed; choose one of {names}, or install the package '
            f"that offers it (entry-point group `{GROUP}`)"
        )
    try:
        loaded = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise CampaignError(
            f"trainer `{name}` (`{installed[name].value}`) does not import: {error}; reinstall its package"
        ) from error
    return _as_trainer(name, loaded)


def _as_trainer(name: str, loaded: object) -> type[Trainer]:
    if isinstance(loaded, type) and issubclass(loaded, Trainer):
        return loaded
    raise CampaignError(f"trainer `{name}` is not a class with the methods of `overnight.trainer.protocol.Trainer`")


def build_trainer(name: str, settings: Mapping[str, object], context: TrainerContext) -> Trainer:
    """Return the trainer called `name` for these settings, in this process; opens no data and loads no torch.

    Raises:
        CampaignError: there is no such trainer, or its settings or knobs are wrong.
    """
    return trainer_class(name).from_settings(settings, context)
