import os

import pytest
import torch
from hypothesis import Phase, settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
# For planted_defects.py: whether a test fails, not the smallest case in which it does.
settings.register_profile("planted", settings.get_profile("ci"), phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "local"))


@pytest.fixture(autouse=True, scope="module")
def nothing_compiled_before():
    """A second shape makes torch compile for any shape, which takes far longer: a module has its own shapes."""
    torch._dynamo.reset()
