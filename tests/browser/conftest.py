"""A Chromium for the tests here, installed with apt if it is missing."""

from __future__ import annotations

import pytest
from debian_packages import Unfit, install
from headless_chromium import chromium, find_chromium

# A font too: without one, texts have no width
PACKAGES = {"chromium": "chromium", "/usr/share/fonts/truetype/*/*.ttf": "fonts-dejavu-core"}


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """One browser for all tests of a process: it takes seconds to start."""
    if not find_chromium():
        try:
            install(PACKAGES)
        except Unfit as unfit:
            pytest.skip(str(unfit))
    with chromium(find_chromium(), tmp_path_factory.mktemp("profile")) as browser:
        yield browser
