"""A headless Chromium that sees a page and nothing else.

Run by itself, as it needs a browser: `python -m pytest tests/browser`, with
`pip install selenium` and Debian's packages chromium and chromium-driver.
CHROMIUM and CHROMEDRIVER name other programs; SCREENSHOTS a folder that keeps
the pictures.
"""

import os
import pathlib

import pytest
from selenium import webdriver
from selenium.webdriver.chrome import service

_FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  "--hide-scrollbars",
)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
  """Returns a browser that is closed at the end."""
  profile = tmp_path_factory.mktemp("profile")
  options = webdriver.ChromeOptions()
  options.binary_location = os.environ.get("CHROMIUM", "/usr/bin/chromium")
  for flag in (*_FLAGS, f"--user-data-dir={profile}"):
    options.add_argument(flag)
  wanted = {"browser": "ALL", "performance": "ALL"}
  options.set_capability("goog:loggingPrefs", wanted)
  path = os.environ.get("CHROMEDRIVER", "/usr/bin/chromedriver")
  made = webdriver.Chrome(options=options, service=service.Service(path))
  yield made
  made.quit()


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
  """Returns the folder that screenshots are written to."""
  folder = os.environ.get("SCREENSHOTS")
  if not folder:
    return tmp_path_factory.mktemp("screenshots")
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  return folder
