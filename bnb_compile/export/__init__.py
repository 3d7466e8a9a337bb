"""An optimizer step, or a whole training step, as an artefact that runs without Python.

`OptimizerStep` and `TrainStep` are modules whose buffers are the optimizer's own tensors. They go through
``torch.export``, and `package` compiles them with AOTInductor into a file that `load` runs from Python and
any program from C++ (examples/export has one).

    step = TrainStep(model, loss_fn, optimizer)
    package(step, "train.pt2", x, y)
    run = load("train.pt2", step)           # or in C++: torch::inductor::AOTIModelPackageLoader
    loss = run(step.hyper(), x, y)          # updates the parameters and the states of `step`

`hyper` is a float64 tensor with a row for each param group, its columns named by `hyper_names`, so a schedule
is fed from outside. What the artefact is for, names, shapes and dtypes, is in its metadata and checked.
"""

from .package import Package as Package
from .package import load as load
from .package import package as package
from .steps import OptimizerStep as OptimizerStep
from .steps import TrainStep as TrainStep
