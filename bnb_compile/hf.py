"""The optimizers in Transformers' `Trainer`, under the names that it has for bitsandbytes'."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from . import optim
from .optim import GlobalOptimManager, Optimizer8bit

#: The class for each `TrainingArguments.optim` that would be bitsandbytes'.
CLASSES: dict[str, type[Optimizer8bit]] = {
    "adamw_8bit": optim.AdamW8bit,
    "adamw_bnb_8bit": optim.AdamW8bit,
    "paged_adamw_8bit": optim.PagedAdamW8bit,
    "paged_adamw_32bit": optim.PagedAdamW32bit,
    "ademamix": optim.AdEMAMix32bit,
    "ademamix_8bit": optim.AdEMAMix8bit,
    "paged_ademamix_8bit": optim.PagedAdEMAMix8bit,
    "paged_ademamix_32bit": optim.PagedAdEMAMix32bit,
    "lion_8bit": optim.Lion8bit,
    "lion_32bit": optim.Lion32bit,
    "paged_lion_8bit": optim.PagedLion8bit,
    "paged_lion_32bit": optim.PagedLion32bit,
    "rmsprop_bnb": optim.RMSprop32bit,
    "rmsprop_bnb_8bit": optim.RMSprop8bit,
    "rmsprop_bnb_32bit": optim.RMSprop32bit,
}


def optimizer_cls_and_kwargs(args: Any, **options: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes, to train with an optimizer of this package.

    `Trainer` then makes the optimizer as it makes bitsandbytes' own: weights of layers decay, biases and
    norms do not, and the weight of every ``nn.Embedding`` has 32-bit states. So a run continues from a
    checkpoint that `Trainer` wrote with bitsandbytes. bitsandbytes need not be installed.

    The first of the two is a factory and not the class, because only a factory is given the model: the one
    that is trained, with the adapters and the resized or copied embeddings that it has by then. `Trainer`
    takes factories since Transformers 5.2; before, ``Trainer(optimizers=(factory()(model, **kwargs), None))``
    does the same.

    Args:
        args: ``TrainingArguments``, whose `optim`, `learning_rate`, `weight_decay`, `adam_beta1`,
            `adam_beta2`, `adam_epsilon` and `optim_args` count as they do for bitsandbytes, or the name
            alone, one of `CLASSES`. What is in `optim_args` besides ``beta1=...`` to ``beta3=...`` goes to
            the class, whatever the algorithm: ``"min_8bit_size=16384,max_unorm=0.5"``.
        options: Hyperparameters and options of the class, instead of those in `args`.

    Returns:
        tuple: The factory; and the arguments, so that ``factory()(model, **kwargs)`` is the optimizer.

    Raises:
        ValueError: If there is no such name, or `optim_args` cannot be read.

    Example:
        >>> args = TrainingArguments(optim="adamw_8bit", learning_rate=1e-4, weight_decay=0.1)
        >>> Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))
        >>> Trainer(model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs("lion_8bit", lr=1e-5))
    """
    named = isinstance(args, str)
    name = args if named else args.optim
    name = getattr(name, "value", name)  # TrainingArguments has an enumeration
    if name not in CLASSES:
        raise ValueError(f"Unsupported optimizer: {name!r}, must be one of {sorted(CLASSES)}")
    cls = CLASSES[name]
    kwargs = {**({} if named else _from_arguments(cls, args)), **options}
    return lambda: functools.partial(_create, cls), kwargs


def _from_arguments(cls: type[Optimizer8bit], args: Any) -> dict[str, Any]:
    """Arguments of a class from ``TrainingArguments``; those in `optim_args` stay strings, which it reads."""
    options = {}
    for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
        key, _, value = pair.partition("=")
        if not (key and value):
            raise ValueError(f"Invalid optim_args: {args.optim_args!r}, must be like 'alpha=5,t_alpha=1000'")
        options[key] = value
    kwargs = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if not issubclass(cls, optim.RMSprop):
        betas = [args.adam_beta1, args.adam_beta2]
        if issubclass(cls, optim.AdEMAMix):
            betas.append(0.9999)
        kwargs["betas"] = tuple(options.pop(f"beta{i}", beta) for i, beta in enumerate(betas, 1))
    if issubclass(cls, (optim.AdamW, optim.AdEMAMix)):
        kwargs["eps"] = args.adam_epsilon
    return {**kwargs, **options}


def _create(cls: type[Optimizer8bit], model: nn.Module, **kwargs: Any) -> Optimizer8bit:
    # Imported when needed, and so that a type checker need not have it.
    trainer = importlib.import_module("transformers").Trainer
    # The method does not look at its Trainer. Which parameters it leaves out differs between versions.
    decaying = set(trainer.get_decay_parameter_names(None, model))
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [param for name, param in trained if name in decaying]},
        {"params": [param for name, param in trained if name not in decaying], "weight_decay": 0.0},
    ]
    optimizer = cls(groups, **kwargs)
    if optimizer.args.optim_bits == 8:
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager = GlobalOptimManager.get_instance()
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
