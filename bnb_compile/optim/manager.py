"""Hyperparameters and precision of single parameters, for all optimizers of the process."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

#: What can be overridden: hyperparameters of a group, and options of an optimizer.
OVERRIDABLE = set(
    "lr betas eps weight_decay alpha t_alpha t_beta3 lr_decay "
    "optim_bits states min_8bit_size max_unorm skip_zeros percentile_clipping block_wise".split()
)


def allow_overrides(names: Iterable[str]) -> None:
    """Let hyperparameters of a rule be overridden, too."""
    OVERRIDABLE.update(names)


class GlobalOptimManager:
    """Overrides for single parameters, such as 32-bit states for an embedding.

    There is one in a process; get it with `get_instance`. An override counts for every optimizer that has
    the parameter, whether it was made before or after the optimizer, and also after the first step: states
    are converted then. If bitsandbytes is imported, the overrides of its manager count too, before those made
    here.

    Example:
        >>> manager = GlobalOptimManager.get_instance()
        >>> manager.override_config(model.embedding.weight, "optim_bits", 32)
    """

    _instance: GlobalOptimManager | None = None
    #: Another text after each change: Dynamo guards a captured step by it.
    changes: str = "0"

    def __init__(self) -> None:
        raise RuntimeError("Call get_instance() instead")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The process's manager."""
        if cls._instance is None:
            cls._instance = cls.__new__(cls)
            cls._instance.initialize()
        return cls._instance

    def initialize(self) -> None:
        """Forget everything."""
        self._of_param: Any = WeakIdKeyDictionary()
        self._of_place: dict[tuple[int, int], tuple[weakref.ref[Tensor], torch.Size, dict[str, Any]]] = {}
        self._of_module: list[tuple[weakref.ref[Any], str, dict[str, Any]]] = []
        self._changed()

    def register_parameters(self, params: Iterable[Any]) -> None:
        """Remember the places of parameters, so that their overrides survive a replacement of the objects.

        Only a conversion that makes new parameters needs it (see ``torch.__future__``); ``model.cuda()``
        keeps them.

        Args:
            params: Parameters or param groups, as an optimizer takes them.
        """
        groups = list(params)
        if groups and not isinstance(groups[0], dict):
            groups = [{"params": groups}]
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                if param in self._of_param:
                    self._of_place[i, j] = weakref.ref(param), param.shape, self._of_param[param]
        self._changed()

    def override_config(
        self,
        parameters: Tensor | Iterable[Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: dict[str, Any] | None = None,
    ) -> None:
        """Override hyperparameters or options of parameters.

        Args:
            parameters: One or many.
            key: What to override: a key of a param group or an argument such as `optim_bits`.
            value: With what.
            key_value_dict: More keys and values.

        Raises:
            ValueError: If a key cannot be overridden, or there is none.
        """
        config = dict(key_value_dict or {})
        if key is not None:
            config[key] = value
        _check(config)
        for param in [parameters] if isinstance(parameters, Tensor) else parameters:
            # A dict for each, so that a later override of one does not reach the others.
            self._of_param.setdefault(param, {}).update(config)
        self._changed()

    def register_module_override(self, module: Any, param_name: str, config: dict[str, Any]) -> None:
        """Override hyperparameters or options of the parameter that a module has under a name.

        Args:
            module: A module; its parameter is looked up when an optimizer needs it, so it may be replaced.
            param_name: Such as "weight".
            config: As `key_value_dict` of `override_config`.
        """
        _check(config)
        self._of_module.append((weakref.ref(module), param_name, dict(config)))
        self._changed()

    def _changed(self) -> None:
        GlobalOptimManager.changes = str(int(self.changes) + 1)

    # -- what optimizers ask -------------------------------------------------------------------

    @property
    def version(self) -> tuple[Any, ...]:
        """Changes when an override is added."""
        theirs = _bitsandbytes_manager()
        if theirs is None:
            return (self.changes,)
        overrides = theirs.pid2config, theirs.index2config
        return self.changes, len(theirs.module_weight_config_triple), *map(repr, overrides)

    def overrides(self, groups: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Overrides of the parameters of an optimizer's groups, by id of the parameter."""
        found: dict[int, dict[str, Any]] = {}
        of_module = {id(param): config for param, config in self._of_modules()}
        theirs = _bitsandbytes_manager()
        for i, group in enumerate(groups):
            for j, param in enumerate(group["params"]):
                config: dict[str, Any] = {}
                if theirs:
                    config.update(theirs.index2config.get((i, j), {}))
                    config.update(theirs.pid2config.get(id(param), {}))
                # Only where the parameter that was registered is gone, and another one like it in its place.
                replaced, shape, of_place = self._of_place.get((i, j), (None, None, {}))
                if replaced is not None and replaced() is None and shape == param.shape:
                    config.update(of_place)
                config.update(of_module.get(id(param), {}))
                config.update(self._of_param.get(param, {}))
                if config:
                    found[id(param)] = config
        return found

    def _of_modules(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        theirs = _bitsandbytes_manager()
        ours = ((module(), name, config) for module, name, config in self._of_module)
        for module, name, config in (*(theirs.module_weight_config_triple if theirs else ()), *ours):
            param = getattr(module, name, None)
            if isinstance(param, Tensor):
                yield param, config


def _check(config: dict[str, Any]) -> None:
    unknown = sorted(set(config) - OVERRIDABLE)
    if unknown or not config:
        raise ValueError(f"cannot override {unknown or 'nothing'}, only {sorted(OVERRIDABLE)}")


def _bitsandbytes_manager() -> Any:
    """Bitsandbytes' own manager, if something has imported and used it."""
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    manager = getattr(module, "GlobalOptimManager", None)
    instance = getattr(manager, "_instance", None)
    return instance if hasattr(instance, "pid2config") else None
