"""What holds for every test: no network, and no deadline per example, since machines differ."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub

settings.register_profile("consa", deadline=None, print_blob=True)
settings.load_profile("consa")
