"""Tests that need google-tunix, which `make test-clients` installs; else none is collected."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("tunix") else ["*.py"]
