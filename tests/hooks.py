"""What torch keeps of hooks: passes that watch a model must leave none of theirs."""

from torch import nn
from torch.nn.modules import module as module_hooks


def hooks_of(module: nn.Module) -> list:
    """All of torch's own global hooks and those of every submodule, by the places that hold them.

    Torch forgets some of its global ones never: even the mark that one took keywords counts.
    """
    places = [vars(module_hooks), *map(vars, module.modules())]
    return [
        list(kept)
        for place in places
        for name, kept in place.items()
        if name.startswith(("_forward", "_global_forward")) and isinstance(kept, dict)
    ]
