"""Output folders that appear whole or not at all, and are replaced only where they are our own."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynrank_ds.errors import RunError
from dynrank_ds.files import read_json, sync

RECORD = "dynrank.json"


@contextmanager
def staged_folder(output: Path, record: dict[str, object]) -> Iterator[Path]:
    """A folder to fill, which takes the name `output` once the `with` block ends without an error.

    `record` (where the files come from) is written beside them as dynrank.json, together with the names of
    the files: a later call replaces the folder if it holds nothing but those.

    Raises:
        RunError: if `output` is a file, or a folder with files that were not written through here.
    """
    output = output.resolve()
    _refuse_foreign(output)
    staging, replaced = (output.with_name(f".{output.name}.{end}") for end in ("tmp", "old"))
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        files = sorted([path.name for path in staging.iterdir()] + [RECORD])
        (staging / RECORD).write_text(json.dumps(record | {"files": files}, indent=2) + "\n")
        for path in [*staging.iterdir(), staging]:
            sync(path)
        # Aside first: a folder half removed would be refused as foreign by the next call.
        shutil.rmtree(replaced, ignore_errors=True)
        if output.exists():
            output.rename(replaced)
        staging.rename(output)
        sync(output.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_foreign(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise RunError(f"The output {output} is a file: name a folder that is new or empty")
    present = {path.name for path in output.iterdir()} if output.is_dir() else set()
    record = output / RECORD
    ours = set(read_json(record)["files"]) if record.is_file() else set()
    if foreign := sorted(present - ours):
        raise RunError(
            f"The output folder {output} holds {foreign[0]}, which this command did not write: "
            "name a folder that is new or empty"
        )
