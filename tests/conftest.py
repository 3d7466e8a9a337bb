from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch._inductor.utils import fresh_cache


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep-kernels", metavar="DIR", help="find what earlier runs compiled, by its text")


@pytest.fixture(autouse=True, scope="session")
def inductor_cache(pytestconfig: pytest.Config) -> Iterator[None]:
    """Nothing compiled by an earlier run of the tests is found, unless that is wanted."""
    folder = pytestconfig.getoption("--keep-kernels")
    if folder is None:
        with fresh_cache():
            yield
        return
    with mock.patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=os.path.abspath(folder)):
        yield


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests of small tensors, which threads make slower, or whose sums must have one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element nobody wrote is noticed.

    For tests of eager code only: under deterministic algorithms Inductor emits other code.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills, as torch.utils.deterministic says by default
    yield
    torch.use_deterministic_algorithms(before)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
