import os

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: more threads, or processes that compile, would only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
# For planted_defects.py: whether a test fails, not the smallest case in which it does.
settings.register_profile("planted", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "local"))


LONGEST = "test_models_families.py"


def pytest_collection_modifyitems(items):
    """The longest file begins first, so that the others run beside it and a short one ends last."""
    items.sort(key=lambda item: item.path.name != LONGEST)


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_before():
    """A second shape makes torch compile for any shape, which takes far longer: a module has its own shapes."""
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def short_rows_are_long(nothing_compiled_before):
    """For budget="scaled_threshold": rows of more than two blocks tell what long prompts do."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("rr_flex.selection", "oracle"):
            patch.setattr(f"{module}.LONG_ROW", 2)
        yield


@pytest.fixture(scope="module")
def one_graph_a_shape(nothing_compiled_before):
    """For modules of several shapes: a graph for any shape takes as long as seven for one. test_models.py has such a
    graph, test_mask_mods.py has another."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield
