"""What a hub id looks like: one rule for models and data sets, in training and evaluation."""

import re

_HUB_ID = re.compile(r"[\w-][\w.-]*(?:/[\w-][\w.-]*)?")


def is_hub_id(text: str) -> bool:
    """Return whether `text` may be the id of a model or data set on the hub: `name` or `owner/name`."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text
