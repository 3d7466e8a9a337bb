"""What constructors take: every argument that bitsandbytes 0.43, 0.49 or 0.50 documents acts or raises."""

import copy
import inspect
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bnb_compile import optim
from bnb_compile.state import paging

# -- bitsandbytes' signatures, after `params` ----------------------------------------------------


def without(signature, *keys):
    return {key: default for key, default in signature.items() if key not in keys}


REQUIRED = inspect.Parameter.empty
ARGS = dict(optim_bits=32, args=None, min_8bit_size=4096)
MOMENTUM = dict(lr=REQUIRED, momentum=0, dampening=0, weight_decay=0, nesterov=False)
ADAM = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, amsgrad=False, **ARGS, is_paged=False)
ADAMW = {**ADAM, "weight_decay": 1e-2}
ADEMAMIX = dict(
    lr=1e-3,
    betas=(0.9, 0.999, 0.9999),
    alpha=5.0,
    t_alpha=None,
    t_beta3=None,
    eps=1e-8,
    weight_decay=1e-2,
    optim_bits=32,
    min_8bit_size=4096,
    is_paged=False,
)
LAMB = dict(
    lr=1e-3,
    bias_correction=True,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0,
    amsgrad=False,
    adam_w_mode=True,
    **ARGS,
    max_unorm=1.0,
)
LARS = dict(**MOMENTUM, **ARGS, max_unorm=0.02)
LION = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0, **ARGS, is_paged=False)
RMSPROP = dict(lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0, momentum=0, centered=False, **ARGS)
SGD = dict(**MOMENTUM, **ARGS)
ADAGRAD = dict(
    lr=1e-2, lr_decay=0, weight_decay=0, initial_accumulator_value=0, eps=1e-10, **{**ARGS, "optim_bits": 32}
)


def family(name, signature, named=()):
    """A class and its variants named for a number of bits, which lack the arguments `named`."""
    return {name: signature, **{f"{name}{n}bit": without(signature, *named) for n in (8, 32)}}


V50 = {
    **family("Adam", ADAM),
    **family("PagedAdam", ADAM),
    **family("AdamW", ADAMW),
    **family("PagedAdamW", without(ADAMW, "is_paged")),
    **family("AdEMAMix", ADEMAMIX, ["optim_bits"]),
    **family("PagedAdEMAMix", without(ADEMAMIX, "is_paged"), ["optim_bits"]),
    **family("LAMB", LAMB, ["optim_bits"]),
    **family("LARS", LARS, ["optim_bits"]),
    **family("Lion", LION, ["optim_bits"]),
    **family("PagedLion", without(LION, "is_paged"), ["optim_bits"]),
    **family("RMSprop", RMSPROP, ["optim_bits"]),
    **family("SGD", SGD, ["optim_bits"]),
    **family("Adagrad", ADAGRAD),
    "Adagrad8bit": {**ADAGRAD, "optim_bits": 8},
    "PytorchLARS": {**MOMENTUM, "lr": 0.01, "max_unorm": 0.02},
}


def until_49(name, signature):
    """With what 0.50 removed."""
    if "args" not in signature:  # AdEMAMix is younger than these arguments
        return signature
    removed = dict(percentile_clipping=100, block_wise=not name.startswith("LAMB"))
    return {**signature, **(without(removed, "block_wise") if name.startswith("LARS") else removed)}


V49 = {name: until_49(name, signature) for name, signature in V50.items()}
V43 = {name: signature for name, signature in V49.items() if "AdEMAMix" not in name}
#: The bases, after `optimizer_name` and `params`.
OF_BASE = dict(
    eps=1e-8,
    weight_decay=0.0,
    **ARGS,
    max_unorm=0.0,
    skip_zeros=False,
    is_paged=False,
)
BASES_50 = {
    "Optimizer1State": dict(lr=1e-3, betas=(0.9, 0.0), **OF_BASE),
    "Optimizer2State": dict(lr=1e-3, betas=(0.9, 0.999), **OF_BASE, alpha=0.0, t_alpha=None, t_beta3=None),
}
ALL = {name: V49[name] | V50[name] for name in V50}  # 0.43's are among 0.49's
NAMES = list(ALL)
#: How many arguments after `params` have kept their places since 0.43 and may be given by position.
POSITIONAL = {
    "Adam": "lr betas eps weight_decay",
    "AdEMAMix": "lr betas alpha t_alpha t_beta3 eps weight_decay",
    "LAMB": "lr bias_correction betas eps weight_decay",
    "LARS": "lr momentum dampening weight_decay nesterov",
    "SGD": "lr momentum dampening weight_decay nesterov",
    "Lion": "lr betas weight_decay",
    "RMSprop": "lr alpha eps weight_decay momentum centered",
    "Adagrad": "lr lr_decay weight_decay initial_accumulator_value eps",
    "PytorchLARS": "lr momentum dampening weight_decay nesterov max_unorm",
}


def kind_of(name):
    """The family's name: `PagedAdamW8bit` is an Adam."""
    name = name.removeprefix("Paged").removesuffix("8bit").removesuffix("32bit")
    return "Adam" if name == "AdamW" else name


def bits_of(name):
    return 8 if name.endswith("8bit") else 32 if name.endswith("32bit") or name == "PytorchLARS" else None


@pytest.fixture(scope="module")
def bnb():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("bitsandbytes")
        import bitsandbytes.optim.optimizer
    return bitsandbytes


def test_the_table_is_that_of_the_installed_bitsandbytes(bnb):
    theirs = {name: c for name, c in vars(bnb.optim).items() if isinstance(c, type)}
    del theirs["GlobalOptimManager"]
    assert set(theirs) == set(V50)
    bases = {name: getattr(bnb.optim.optimizer, name) for name in BASES_50}
    for name, cls in {**theirs, **bases}.items():
        parameters = inspect.signature(cls).parameters
        signature = {k: p.default for k, p in parameters.items() if k not in ("params", "optimizer_name")}
        assert signature == {**V50, **BASES_50}[name], name
        assert list(signature) == list({**V50, **BASES_50}[name]), name


def test_every_class_of_bitsandbytes_is_here():
    for name in (*NAMES, *BASES_50, "Optimizer8bit", "GlobalOptimManager"):
        assert hasattr(optim, name), name


# -- a few steps, and what they leave ------------------------------------------------------------

SHAPES = [(70, 65), (300,)]  # 8 bits; below min_8bit_size


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def train(optimizer, params, steps=5):
    """Gradients of uneven sizes, zero in places, so that clipping, AMSGrad and skip_zeros have an effect."""
    generator = torch.Generator().manual_seed(1)
    for scale in torch.tensor([0.01, 0.05, 0.02, 0.1, 0.03])[:steps]:
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * scale
            param.grad = torch.where(torch.rand(param.shape, generator=generator) < 0.3, 0.0, grad)
        optimizer.step()


def results(optimizer, params):
    """Parameters and states, apart from what only says that an option is on."""
    states = [
        {k: (v.dtype, v.tolist()) for k, v in optimizer.state[p].items() if k.startswith(("state", "absmax"))}
        for p in params
    ]
    return [p.tolist() for p in params], states


pytestmark = pytest.mark.usefixtures("one_thread")  # for small tensors more threads cost more than they do


@pytest.fixture(autouse=True)
def quietly():
    """Paged states warn once in a process that they are ordinary ones; that has a test of its own."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "paged optimizer states")
        yield


def construct(name, params, *positional, **arguments):
    if name != "PytorchLARS":
        arguments.setdefault("compile", False)
    return getattr(optim, name)(params, *positional, **arguments)


def base_arguments(name):
    """With which every other argument has something to act on."""
    chosen = {"LARS": dict(momentum=0.9), "SGD": dict(momentum=0.9), "PytorchLARS": dict(momentum=0.9)}
    arguments = dict(lr=1e-2, weight_decay=0.05, **chosen.get(kind_of(name), {}))
    if "optim_bits" in ALL[name] and bits_of(name) is None:
        arguments["optim_bits"] = 8
    return arguments


def run(name, **arguments):
    params = parameters()
    optimizer = construct(name, params, **arguments)
    train(optimizer, params)
    return results(optimizer, params)


FLIPPED = dict(
    lr=0.5,
    betas=(0.5, 0.9),
    eps=0.1,
    weight_decay=0.2,
    amsgrad=True,
    min_8bit_size=100,
    percentile_clipping=5,
    block_wise=False,
    bias_correction=False,
    adam_w_mode=False,
    max_unorm=1e-3,
    skip_zeros=True,
    momentum=0.5,
    dampening=0.5,
    nesterov=True,
    alpha=0.5,
    t_alpha=3,
    t_beta3=3,
    centered=True,
    lr_decay=0.5,
    initial_accumulator_value=0.1,
)


def without_effect(name, key):
    # Paging is tested below. 32-bit states have neither a smallest size nor blocks.
    return key == "is_paged" or (bits_of(name) == 32 and key in ("min_8bit_size", "block_wise"))


@pytest.mark.parametrize(
    "name, key", [(name, key) for name in NAMES for key in ALL[name] if not without_effect(name, key)]
)
def test_every_argument_acts(name, key):
    arguments, bits = base_arguments(name), bits_of(name)
    if key == "optim_bits":
        if bits == 32:
            with pytest.raises(ValueError, match="optim_bits=8, must be 32"):
                run(name, **arguments, optim_bits=8)
            return
        state = run(name, **{**arguments, "optim_bits": 8})[1][0]["state1"]
        assert state[0] == torch.uint8
        wide = run(name, **{**arguments, "optim_bits": 32})[1][0]["state1"]
        assert wide[0] == (torch.uint8 if bits == 8 else torch.float32)  # 32 is the default there
        return
    if key == "args":
        options = dict(min_8bit_size=4096, max_unorm=1e-3, skip_zeros=False)
        flipped = SimpleNamespace(optim_bits=bits or 8, **options)
    else:
        flipped = (*FLIPPED["betas"], 0.99) if key == "betas" and "AdEMAMix" in name else FLIPPED[key]
    assert run(name, **{**arguments, key: flipped}) != run(name, **arguments)


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_at_its_default_is_as_if_it_was_not_given(name):
    arguments = base_arguments(name)
    expected = run(name, **arguments)
    for key, default in {**V49[name], **V50[name]}.items():
        if key in arguments or default is REQUIRED:
            continue
        if key == "is_paged" and name.startswith("Paged"):
            with pytest.raises(ValueError, match="is_paged=False, must be True"):
                construct(name, parameters(), **arguments, is_paged=False)
        elif not (key == "block_wise" and name.startswith("LAMB")):  # there it was False until 0.49
            assert run(name, **arguments, **{key: default}) == expected, key


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_those_of_bitsandbytes(name):
    expected = {"lr": 0.1, **{key: d for key, d in V50[name].items() if d is not REQUIRED}}
    optimizer = construct(name, parameters(), **({"lr": 0.1} if V50[name]["lr"] is REQUIRED else {}))
    betas = {
        "LARS": ("momentum", "dampening"),
        "PytorchLARS": ("momentum", "dampening"),
        "SGD": ("momentum", "dampening"),
        "RMSprop": ("alpha", "momentum"),
    }
    if kind_of(name) in betas:
        expected["betas"] = tuple(expected.pop(key) for key in betas[kind_of(name)])
    group, args = optimizer.param_groups[0], vars(optimizer.args)
    for key, default in expected.items():
        if key in ("args", "is_paged"):
            continue
        if key == "optim_bits" or key in args:
            assert args[key] == (bits_of(name) or default if key == "optim_bits" else default), key
        else:
            assert group[key] == default, key
    assert optimizer.is_paged == name.startswith("Paged")
    assert args["optim_bits"] == (bits_of(name) or 32)
    off = dict(min_8bit_size=4096, skip_zeros=False, percentile_clipping=100, block_wise=True)
    assert {key: args[key] for key in off} == off
    assert args["max_unorm"] == {"LAMB": 1.0, "LARS": 0.02, "PytorchLARS": 0.02}.get(kind_of(name), 0.0)


def test_defaults_are_those_of_the_installed_bitsandbytes(bnb):
    for name in NAMES:
        required = {"LARS": dict(lr=0.1, momentum=0.9), "SGD": dict(lr=0.1, momentum=0.9)}
        arguments = required.get(kind_of(name), {})
        theirs = getattr(bnb.optim, name)(parameters(), **arguments)
        ours = construct(name, parameters(), **arguments)
        if name == "PytorchLARS":  # no optimizer of bitsandbytes' kind
            continue
        # Every group of theirs has AdEMAMix's hyperparameters.
        known = set(theirs.defaults) & set(ours.defaults)
        assert known >= {"lr", "eps", "weight_decay"}
        # Schedules of momentum look there for what they can change.
        assert ("betas" in known) == (kind_of(name) not in ("Adagrad", "RMSprop")), name
        assert {k: theirs.defaults[k] for k in known} == {k: ours.defaults[k] for k in known}, name
        assert vars(theirs.args).items() <= vars(ours.args).items(), name


# -- by position ---------------------------------------------------------------------------------

GIVEN = dict(
    lr=0.25,
    betas=(0.5, 0.75),
    eps=1e-3,
    weight_decay=0.125,
    alpha=0.5,
    t_alpha=10,
    t_beta3=20,
    momentum=0.75,
    dampening=0.0,
    nesterov=True,
    bias_correction=False,
    centered=True,
    lr_decay=0.1,
    initial_accumulator_value=0.2,
    max_unorm=0.3,
)


@pytest.mark.parametrize("name", NAMES)
def test_by_position_are_arguments_that_have_never_moved_and_no_others(name):
    keys = POSITIONAL[kind_of(name)].split()
    for signature in (V43.get(name, V50[name]), V49[name], V50[name]):
        assert list(signature)[: len(keys)] == keys
    given = {**GIVEN, "betas": (0.5, 0.75, 0.99)} if "AdEMAMix" in name else GIVEN
    by_position = construct(name, parameters(), *(given[key] for key in keys))
    by_keyword = construct(name, parameters(), **{key: given[key] for key in keys})
    assert by_position.defaults == by_keyword.defaults and by_position.args == by_keyword.args
    # The next ones have: an argument was removed before them in 0.50.
    with pytest.raises(TypeError, match="positional"):
        construct(name, parameters(), *(given[key] for key in keys), False)


# -- values --------------------------------------------------------------------------------------

STRINGS = [
    ("Adam", dict(lr="0.01", betas="(0.8, 0.95)", eps="1e-6", weight_decay="0.1", amsgrad="true")),
    ("Adam", dict(betas="0.8, 0.95")),
    ("AdamW", dict(betas=("0.8", "0.95"))),
    ("Adam", dict(optim_bits="8", min_8bit_size="100", max_unorm="0.5", percentile_clipping="5")),
    ("Adam", dict(optim_bits="8", skip_zeros="True", block_wise="False", is_paged="0")),
    ("AdEMAMix", dict(alpha="3", t_alpha="10", t_beta3="None", betas="(0.9, 0.99, 0.999)")),
    ("LAMB", dict(bias_correction="False", adam_w_mode="0", max_unorm="0.25")),
    ("LARS", dict(lr="0.1", momentum="0.9", dampening="0.5")),
    ("SGD", dict(lr="0.1", momentum="0.9", nesterov="True")),
    ("Lion", dict(lr="1e-4", betas="(0.9, 0.98)")),
    ("RMSprop", dict(alpha="0.95", eps="1e-6", momentum="0.5", centered="1")),
    ("Adagrad", dict(lr_decay="0.1", initial_accumulator_value="0.25")),
]


def value(text):
    if isinstance(text, tuple):
        return tuple(map(value, text))
    return eval(text.capitalize() if text == "true" else text)


@pytest.mark.parametrize("name, arguments", STRINGS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_numeric_strings_are_numbers(name, arguments):
    """The Trainer of transformers passes `optim_args` as they were written on the command line."""
    numbers = {key: value(text) for key, text in arguments.items()}
    expected, given = construct(name, parameters(), **numbers), construct(name, parameters(), **arguments)
    assert given.param_groups[0]["betas"] == expected.param_groups[0]["betas"]
    for key, number in expected.defaults.items():
        if key in expected.family.betas:
            continue
        got = given.param_groups[0][key]
        assert got == number and not isinstance(got, str), key
    assert given.args == expected.args
    assert run(name, **{"lr": 0.1, **arguments}) == run(name, **{"lr": 0.1, **numbers})


def test_strings_in_groups_are_numbers():
    params = parameters()
    groups = [dict(params=params[:1], lr="0.5", betas="(0.5, 0.75)"), dict(params=params[1:])]
    optimizer = construct("Adam", groups)
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["betas"] == (0.5, 0.75)
    optimizer.add_param_group(dict(params=parameters(), eps="0.1"))
    assert optimizer.param_groups[2]["eps"] == 0.1


NAN = math.nan
#: Keys of a group: what is wrong, and what the message must say besides.
INVALID_HYPER = [
    ("Adam", dict(lr=-0.5), r"learning rate: -0.5.*\[0, inf\)"),
    ("Adam", dict(lr=NAN), "learning rate: nan"),
    ("Adam", dict(lr=math.inf), "learning rate: inf"),
    ("Adam", dict(lr="fast"), "learning rate: 'fast'.*number"),
    ("Adam", dict(lr=torch.tensor(-1.0)), "learning rate: -1"),
    ("Adam", dict(eps=-1e-8), r"epsilon value: -1e-08.*\[0, inf\)"),
    ("Adam", dict(eps=NAN), "epsilon value: nan"),
    ("Adam", dict(betas=(1.0, 0.999)), r"beta parameter at index 0: 1.0.*\[0, 1.0\)"),
    ("Adam", dict(betas=(0.9, -0.1)), "beta parameter at index 1: -0.1"),
    ("Adam", dict(betas=(0.9, NAN)), "beta parameter at index 1: nan"),
    ("Adam", dict(betas=(0.9, "x")), "beta parameter at index 1: 'x'"),
    ("Adam", dict(betas=(0.9,)), r"betas: \(0.9,\).*2"),
    ("Adam", dict(betas=(0.9, 0.99, 0.999)), "betas: .*2"),
    ("Adam", dict(weight_decay=-0.1), r"weight_decay value: -0.1.*\[0, inf\)"),
    ("Adam", dict(amsgrad="perhaps"), "amsgrad: 'perhaps'.*True or False"),
    ("AdEMAMix", dict(betas=(0.9, 0.999)), "betas: .*3"),
    ("AdEMAMix", dict(alpha=-1), "alpha: -1"),
    ("AdEMAMix", dict(t_alpha=-1), "t_alpha: -1"),
    ("AdEMAMix", dict(t_beta3="x"), "t_beta3: 'x'"),
    ("AdEMAMix", dict(betas=(0.0, 0.9, 0.99), t_beta3=10), "betas: .*t_beta3=10"),
    ("LAMB", dict(bias_correction=2), "bias_correction: 2.*True or False"),
    ("LAMB", dict(adam_w_mode="x"), "adam_w_mode: 'x'"),
    ("Lion", dict(betas=(0.9, 1.0)), "index 1: 1.0"),
    ("Adagrad", dict(lr_decay=-1), "lr_decay: -1"),
    ("Adagrad", dict(initial_accumulator_value=-1), "initial_accumulator_value: -1"),
    ("RMSprop", dict(centered="x"), "centered: 'x'"),
]
#: Only the constructor has these.
INVALID_OPTIONS = [
    ("Adam", dict(optim_bits=5), "optim_bits: 5.*4, 8 or 32"),
    ("Adam", dict(optim_bits=8.5), "optim_bits: 8.5"),
    ("Adam", dict(optim_bits="many"), "optim_bits: 'many'"),
    ("Adam", dict(optim_bits=None), "optim_bits: None"),
    ("Adam8bit", dict(optim_bits=16), "optim_bits: 16"),
    ("Adam32bit", dict(optim_bits=8), "Adam32bit: optim_bits=8, must be 32"),
    ("Adam", dict(min_8bit_size=1.5), "min_8bit_size: 1.5.*whole number"),
    ("Adam", dict(min_8bit_size=NAN), "min_8bit_size: nan"),
    ("Adam", dict(percentile_clipping=0), r"percentile_clipping: 0.*\[1, 100\]"),
    ("Adam", dict(percentile_clipping=101), "percentile_clipping: 101"),
    ("Adam", dict(percentile_clipping=5.5), "percentile_clipping: 5.5"),
    ("Adam", dict(block_wise="x"), "block_wise: 'x'"),
    ("Adam", dict(max_unorm=-1.0), "max_unorm: -1.0"),
    ("Adam", dict(max_unorm=NAN), "max_unorm: nan"),
    ("Adam", dict(skip_zeros=None), "skip_zeros: None"),
    ("Adam", dict(is_paged="x"), "is_paged: 'x'"),
    ("Adam", dict(compile="x"), "compile: 'x'"),
    ("Adam", dict(max_grad_norm=-1), "max_grad_norm: -1"),
    ("Adam", dict(max_grad_norm="x"), "max_grad_norm: 'x'"),
    ("Adam", dict(amp_fused="x"), "amp_fused: 'x'"),
    ("PagedAdam", dict(is_paged=False), "PagedAdam: is_paged=False, must be True"),
    ("Adam", dict(args=SimpleNamespace(optim_bits=5)), "optim_bits: 5"),
    ("Adam", dict(args=SimpleNamespace(percentile_clipping=-5)), "percentile_clipping: -5"),
    ("LARS", dict(lr=0.1, momentum=1.0), "index 0: 1.0"),
    ("LARS", dict(lr=0.1, nesterov=True), "Nesterov.*momentum=0"),
    ("SGD", dict(lr=0.1, momentum=-0.1), "index 0: -0.1"),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=1.0), "index 1: 1.0"),
    ("SGD", dict(lr=0.1, nesterov=True), "Nesterov.*momentum=0"),
    ("SGD", dict(lr=0.1, momentum=0.9, dampening=0.5, nesterov=True), "Nesterov.*dampening=0.5"),
    ("PytorchLARS", dict(momentum=0.9, nesterov=True, dampening=0.1), "Nesterov.*dampening=0.1"),
    ("RMSprop", dict(alpha=1.0), "index 0: 1.0"),
    ("RMSprop", dict(momentum=1.0), "index 1: 1.0"),
]


def named(cases):
    return pytest.mark.parametrize(
        "name, arguments, says", cases, ids=[f"{name} {arguments}" for name, arguments, _ in cases]
    )


@named([*INVALID_HYPER, *INVALID_OPTIONS])
def test_an_invalid_value_raises_in_the_constructor(name, arguments, says):
    with pytest.raises(ValueError, match=says):
        construct(name, parameters(), **arguments)


#: Of a wrong type altogether.
NO_NUMBERS = [
    dict(lr=None),
    dict(lr=1j),
    dict(lr=[0.1]),
    dict(lr=torch.tensor([0.1, 0.2])),
    dict(eps=None),
    dict(weight_decay=None),
    dict(betas=0.9),
    dict(betas=None),
    dict(betas="0.9"),
    dict(betas="slow"),
    dict(betas=(0.9, None)),
    dict(max_unorm=None),
]


@pytest.mark.parametrize("arguments", NO_NUMBERS, ids=str)
def test_what_is_no_number_raises_and_says_the_value(arguments):
    ((_, wrong),) = arguments.items()
    wrong = wrong[-1] if isinstance(wrong, tuple) else wrong
    with pytest.raises(ValueError) as raised:
        construct("Adam", parameters(), **arguments)
    assert str(wrong) in str(raised.value) and "must be" in str(raised.value)


@named(INVALID_HYPER)
def test_an_invalid_group_is_not_added(name, arguments, says):
    params = parameters()
    optimizer = construct(name, params)
    train(optimizer, params, 2)
    before = copy.deepcopy((optimizer.state_dict(), optimizer.defaults))
    with pytest.raises(ValueError, match=says):
        optimizer.add_param_group(dict(params=parameters(), **arguments))
    assert str((optimizer.state_dict(), optimizer.defaults)) == str(before)
    train(optimizer, params, 1)
    assert len(optimizer.state) == len(params)


def test_a_group_with_what_cannot_be_a_parameter_is_not_added():
    params = parameters()
    optimizer = construct("Adam", params)
    for wrong, error in (
        (nn.Parameter(torch.zeros(3, dtype=torch.float64)), TypeError),
        (torch.zeros(3, requires_grad=True) * 1, ValueError),  # no leaf
        (params[0], ValueError),
        ("text", TypeError),
    ):
        with pytest.raises(error):
            optimizer.add_param_group(dict(params=[wrong]))
        assert len(optimizer.param_groups) == 1
    with pytest.raises(TypeError, match="lr"):
        optim.SGD(params)


@pytest.mark.parametrize("name", ["Adam8bit", "SGD", "LAMB", "Lion32bit", "PytorchLARS"])
def test_an_unknown_argument_raises(name):
    with pytest.raises(TypeError, match="decoupled"):
        construct(name, parameters(), lr=0.1, decoupled=True)


@pytest.mark.parametrize("option", [dict(optim_bits=32), dict(min_8bit_size=10**6), dict(max_unorm=1e-3)])
def test_an_option_in_a_group_acts_or_raises(option):
    params = parameters()
    try:
        optimizer = construct("Adam8bit", [dict(params=params, **option)])
    except (TypeError, ValueError):
        return
    train(optimizer, params)
    assert results(optimizer, params) != run("Adam8bit")


@pytest.mark.parametrize(
    "name, by_name, argument",
    [
        ("Optimizer1State", "lion", dict(eps=0.5)),
        ("Optimizer1State", "momentum", dict(eps=0.5)),
        ("Optimizer1State", "adagrad", dict(betas=(0.5, 0.5))),
    ],
)
def test_what_an_algorithm_by_name_does_not_have_raises(name, by_name, argument):
    with pytest.raises(ValueError):
        getattr(optim, name)(by_name, parameters(), **argument)


# -- args ----------------------------------------------------------------------------------------


def test_an_object_replaces_the_options():
    args = SimpleNamespace(
        optim_bits=8,
        min_8bit_size=100,
        max_unorm=0.5,
        skip_zeros=True,
        percentile_clipping=50,
        block_wise=False,
        comment="ignored",
    )
    optimizer = construct("Adam", parameters(), args=args, optim_bits=32, min_8bit_size=5, max_unorm=3.0)
    assert vars(optimizer.args) == {**without(vars(args), "comment"), "states": None}
    options = vars(optimizer.args)
    assert run("Adam", args=args) == run("Adam", **options)
    assert args.comment == "ignored" and args.optim_bits == 8  # not written to
    # What it does not have comes from the arguments: objects made for 0.50 lack what that removed.
    partial = construct("Adam", parameters(), args=SimpleNamespace(optim_bits=8), percentile_clipping=5)
    assert (partial.args.optim_bits, partial.args.percentile_clipping) == (8, 5)


def test_the_args_of_bitsandbytes_are_read(bnb):
    theirs = bnb.optim.Adam8bit(parameters(), min_8bit_size=100)
    ours = construct("Adam", parameters(), args=theirs.args)
    assert ours.args.optim_bits == 8 and ours.args.min_8bit_size == 100


# -- by name -------------------------------------------------------------------------------------

BY_NAME = [
    ("Adam", "Optimizer2State", "adam", {}, {}),
    ("Adam", "Optimizer2State", "adam", dict(amsgrad=True), dict(amsgrad=True)),
    ("LAMB", "Optimizer2State", "lamb", {}, dict(max_unorm=1.0)),
    (
        "AdEMAMix",
        "Optimizer2State",
        "ademamix",
        dict(t_alpha=5),
        dict(betas=(0.9, 0.999, 0.9999), alpha=5.0, t_alpha=5),
    ),
    ("Lion", "Optimizer1State", "lion", {}, dict(betas=(0.9, 0.99))),
    ("SGD", "Optimizer1State", "momentum", dict(momentum=0.9), {}),
    ("LARS", "Optimizer1State", "lars", dict(momentum=0.9), dict(max_unorm=0.02)),
    ("RMSprop", "Optimizer1State", "rmsprop", dict(momentum=0.5), dict(betas=(0.99, 0.5))),
    ("Adagrad", "Optimizer1State", "adagrad", dict(eps=1e-8), {}),
]


@pytest.mark.parametrize("name, base, by_name, of_class, of_base", BY_NAME, ids=[c[2] for c in BY_NAME])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_base_by_name_is_the_class(name, base, by_name, of_class, of_base, bits):
    shared = dict(lr=1e-2, weight_decay=0.1, optim_bits=bits, compile=False)
    params = parameters()
    optimizer = getattr(optim, base)(by_name, params, **shared, **of_base)
    train(optimizer, params)
    assert results(optimizer, params) == run(name, **shared, **of_class)
    assert isinstance(construct(name, parameters(), lr=0.1), getattr(optim, base))


@pytest.mark.parametrize("key, flipped", [("max_unorm", 1e-3), ("skip_zeros", True), ("min_8bit_size", 100)])
def test_options_of_the_bases_act(key, flipped):
    def by_name(**options):
        params = parameters()
        optimizer = optim.Optimizer2State("adam", params, optim_bits=8, compile=False, **options)
        train(optimizer, params)
        return results(optimizer, params)

    assert by_name(**{key: BASES_50["Optimizer2State"][key]}) == by_name() != by_name(**{key: flipped})


@pytest.mark.parametrize(
    "base, by_name",
    [
        ("Optimizer2State", "lion"),
        ("Optimizer1State", "adam"),
        ("Optimizer2State", "sophia"),
        ("Optimizer1State", ""),
    ],
)
def test_an_unknown_name_raises_with_the_names_there_are(base, by_name):
    some = "adam.*lamb" if base == "Optimizer2State" else "lion.*momentum"
    with pytest.raises(ValueError, match=f"name: {by_name}.*{some}"):
        getattr(optim, base)(by_name, parameters())


def test_the_base_of_all_cannot_be_constructed():
    with pytest.raises(TypeError, match="Optimizer1State, Optimizer2State"):
        optim.Optimizer8bit(parameters(), dict(lr=0.1))


@pytest.mark.parametrize("position", [4, 5])
def test_the_bases_take_no_options_by_position(position):
    values = (1e-3, (0.9, 0.99), 1e-8, 0.0, 8)[:position]
    if position == 4:
        assert optim.Optimizer2State("adam", parameters(), *values).defaults["betas"] == (0.9, 0.99)
    else:
        with pytest.raises(TypeError, match="positional"):
            optim.Optimizer2State("adam", parameters(), *values)


class MyAdam(optim.Optimizer2State):
    """As users derive from bitsandbytes' base."""

    def __init__(self, params, lr=1e-3, scale=2.0):
        super().__init__("adam", params, lr * scale, (0.9, 0.99), 1e-6, 0.1, optim_bits=8, compile=False)
        self.scale = scale

    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        return super().step(closure)


def test_a_subclass_of_a_user_works():
    params = parameters()
    optimizer = MyAdam(params, lr=5e-3)
    train(optimizer, params)
    expected = run("Adam8bit", lr=1e-2, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
    assert results(optimizer, params) == expected and optimizer.steps == 5
    loaded = MyAdam(parameters())
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["lr"] == 1e-2
    copied_params, copied = pickle.loads(pickle.dumps((params, optimizer)))
    assert results(copied, copied_params) == expected and type(copied) is MyAdam


# -- paged states, without a GPU -----------------------------------------------------------------

PAGED = [name for name in NAMES if name.startswith("Paged")]


@pytest.mark.parametrize("name", PAGED)
def test_paged_classes_are_ordinary_ones_on_a_cpu(name):
    shapes = [(400, 300), (300,)]  # above 100,000 elements, which would be paged

    def outcome(name, **arguments):
        params = parameters(shapes)
        optimizer = construct(name, params, lr=1e-2, **arguments)
        train(optimizer, params, 2)
        return optimizer, results(optimizer, params)

    ordinary = name.removeprefix("Paged")
    paged, numbers = outcome(name)
    assert paged.is_paged and numbers == outcome(ordinary)[1] == outcome(ordinary, is_paged=True)[1]
    assert outcome(ordinary, is_paged=True)[0].is_paged
    fresh = construct(ordinary, parameters(shapes))
    fresh.load_state_dict(paged.state_dict())
    assert results(fresh, fresh.param_groups[0]["params"])[1] == numbers[1]


def test_paged_states_on_a_cpu_warn_once_in_a_process():
    paging.available.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("Adam8bit", "AdamW", "Lion"):
            for _ in range(2):
                params = parameters([(400, 300), (300,), ()])
                optimizer = construct(name, params, is_paged=True)
                train(optimizer, params, 2)
                optimizer.load_state_dict(optimizer.state_dict())
        run("PagedAdEMAMix")
    (warning,) = caught
    assert warning.category is UserWarning
    assert "paged" in str(warning.message) and "cpu has no CUDA managed memory" in str(warning.message)


def test_ordinary_states_do_not_warn_about_paging():
    paging.available.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("Adam8bit")
        run("Adam8bit", is_paged=False)


# -- precision -----------------------------------------------------------------------------------


def test_the_number_of_elements_alone_decides_on_the_precision():
    """Neither divisibility nor the shape: a part of a block is quantised too."""
    shapes = [(4095,), (4096,), (4097,), (1, 4111), (64, 64), (63, 65), (4099, 1, 1), (7, 11, 59), (1,), (0,)]
    model = nn.ParameterList(parameters(shapes))
    optimizer = construct("Adam8bit", model.named_parameters())
    train(optimizer, model, 1)
    report = optimizer.precision_report()
    for (name, param), entry, shape in zip(model.named_parameters(), report, shapes):
        bits = 8 if param.numel() >= 4096 else 32
        state = optimizer.state[param]
        assert state["state1"].dtype == (torch.uint8 if bits == 8 else torch.float32)
        assert (entry["name"], entry["shape"], entry["numel"]) == (name, shape, param.numel())
        assert entry["bits"] == bits
        assert ("at least" if bits == 8 else "fewer than") + " min_8bit_size=4096" in entry["reason"]
        if param.numel() > 1000:
            assert entry["bytes_per_param"] == pytest.approx(2.03 if bits == 8 else 8, rel=0.01)


@pytest.mark.parametrize("name", ["Adam", "Lion", "AdEMAMix", "Adagrad", "LAMB"])
@pytest.mark.parametrize("bits", [8, 32])
def test_a_report_counts_the_bytes_that_there_are(name, bits):
    params = parameters([(70, 65), (256 * 40,)])
    optimizer = construct(name, params, optim_bits=bits)
    expected = [entry["bytes_per_param"] * entry["numel"] for entry in optimizer.precision_report()]
    train(optimizer, params, 1)
    for param, size in zip(params, expected):
        own = {k: v for k, v in optimizer.state[param].items() if k.startswith(("state", "absmax"))}
        held = sum(v.numel() * v.itemsize for v in own.values())
        assert size == pytest.approx(held)


def test_a_report_of_other_reasons():
    shapes = [(5000,)]
    assert construct("SGD8bit", parameters(shapes), lr=0.1).precision_report()[0]["bits"] is None
    (entry,) = construct("Adam", parameters(shapes)).precision_report()
    assert (entry["name"], entry["bits"], entry["reason"]) == (0, 32, "optim_bits=32")
    (entry,) = construct("Adam", parameters(shapes), optim_bits=8, min_8bit_size=6000).precision_report()
    assert entry["bits"] == 32 and "6000" in entry["reason"]
    groups = [dict(params=parameters(shapes)), dict(params=parameters([(3,), (4,)]))]
    report = construct("Adam8bit", groups).precision_report()
    assert [(entry["name"], entry["bits"]) for entry in report] == [(0, 8), (1, 32), (2, 32)]


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("Paged")])
def test_odd_sizes_step(name):
    params = parameters([(), (0,), (1,), (255,), (257,), (4097,), (0, 3)])
    optimizer = construct(name, params, **{**base_arguments(name), "lr": 1e-2})
    before = [p.detach().clone() for p in params]
    train(optimizer, params, 2)
    for param, start in zip(params, before):
        assert param.isfinite().all() and (param.numel() < 200 or not torch.equal(param, start))


# -- the compiled path ---------------------------------------------------------------------------


def test_compile_decides_what_runs_the_step():
    """One class stands for all: other tests compare the kernels."""
    params, others = parameters(), parameters()
    compiled = optim.AdamW8bit(params, lr=1e-2)
    eager = optim.AdamW8bit(others, lr=1e-2, compile=False)
    for optimizer, mine in ((compiled, params), (eager, others)):
        train(optimizer, mine)
    for param, other in zip(params, others):
        torch.testing.assert_close(param, other, rtol=1e-4, atol=1e-5)
    assert all(bucket._launcher is not None for bucket in compiled.structure.buckets)
    assert all(bucket._launcher is None for bucket in eager.structure.buckets)
