"""Which samples a step computes: each once an epoch, by seed and step alone; stored or streamed, padded or packed.

Samples are known by the tokens that the model is given, so that whatever lies between a file and the model is in it.
"""

import numpy as np
import pytest

from dynrank_ds.data.batching import GlobalBatches
from dynrank_ds.data.collating import Collator, PackedCollator, PaddedCollator
from dynrank_ds.data.tokenising import TokenisedDataset
from dynrank_ds.recipe import check_recipe
from dynrank_ds.training.samples import prepare_data, split_held_out
from tests.support.tiny import WORDS, write_model

N_ROWS, N_HELD_OUT, BATCH, MICRO_BATCH, SEED = 31, 5, 12, 2, 3
EPOCHS = 6  # in 13 steps: 26 samples are no multiple of a batch
SIZES = (1, 2, 3)
Tokens = tuple[int, ...]


@pytest.fixture(scope="module", params=[False, True], ids=["stored", "streamed"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TokenisedDataset:
    """The samples to train on, of rows that differ in their first word and, by far, in length."""
    pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("order")
    write_model(folder / "model")
    (folder / "set").mkdir()
    rows = "".join(f"{WORDS[i]},{' w1' * (1 + i * i % 40)}\n" for i in range(N_ROWS))
    (folder / "set" / "train.csv").write_text("query,response\n" + rows)
    recipe = check_recipe(
        {
            "model": {"path": str(folder / "model")},
            "data": {
                "source": str(folder / "set"),
                "streaming": request.param,
                "held_out": N_HELD_OUT,
                "max_length": 200,
            },
            "method": {"name": "lora"},
            "train": {"epochs": EPOCHS, "global_batch_size": BATCH, "learning_rate": 1e-3, "seed": SEED},
            "output": {"dir": "nowhere"},
        },
        "recipe",
    )
    whole = prepare_data(recipe)[0]
    trained, held_out = split_held_out(whole, recipe)
    assert (len(whole), len(trained), len(held_out)) == (N_ROWS, N_ROWS - N_HELD_OUT, N_HELD_OUT)
    assert samples(trained) | samples(held_out) == samples(whole) and len(samples(whole)) == N_ROWS
    return trained


def samples(dataset: TokenisedDataset) -> set[Tokens]:
    return {tuple(dataset.sample(i).ids.tolist()) for i in range(len(dataset))}


def computed(dataset: TokenisedDataset, collator: Collator, step: int, world_size: int) -> list[Tokens]:
    """The samples that the model is given in a step, in all processes, sorted; a run that begins here knows no more."""
    indices = GlobalBatches(len(dataset), BATCH, SEED).indices(step)
    given: list[Tokens] = []
    for rank in range(world_size):
        for chosen in collator.micro_batches(indices, dataset.lengths, rank, world_size, MICRO_BATCH):
            batch = collator.collate(dataset, chosen)
            inputs = batch.inputs()
            if batch.packed:
                starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()[1:]
                rows = np.split(batch.input_ids[0].numpy(), starts)
            else:
                rows = [
                    ids[mask == 1].numpy()
                    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
                ]
            given += [tuple(row.tolist()) for row in rows]
    return sorted(given)


@pytest.fixture(params=[PaddedCollator(2), PackedCollator()], ids=["padded", "packed"])
def collator(request: pytest.FixtureRequest) -> Collator:
    return request.param


def test_global_batches_are_the_same_at_every_world_size(
    dataset: TokenisedDataset, collator: Collator
) -> None:
    steps = range(EPOCHS * len(dataset) // BATCH)
    alone, two, three = ([computed(dataset, collator, step, size) for step in steps] for size in SIZES)
    assert alone == two == three
    assert all(len(step) == BATCH for step in alone)


def test_every_sample_is_computed_once_an_epoch_also_after_a_resume_at_another_world_size(
    dataset: TokenisedDataset, collator: Collator
) -> None:
    steps = EPOCHS * len(dataset) // BATCH
    assert steps * BATCH == EPOCHS * len(dataset)
    everything = sorted(tuple(dataset.sample(i).ids.tolist()) for i in range(len(dataset)))
    whole = [computed(dataset, collator, step, 2) for step in range(steps)]
    resumed = whole[:5] + [computed(dataset, collator, step, 3) for step in range(5, steps)]
    assert sorted(sample for step in resumed for sample in step) == sorted(everything * EPOCHS)
    # An epoch's end cuts a batch: what stands in it of each epoch follows from the batches before.
    in_order = [
        tuple(dataset.sample(int(i)).ids.tolist())
        for step in range(steps)
        for i in GlobalBatches(len(dataset), BATCH, SEED).indices(step)
    ]
    for epoch in range(EPOCHS):
        assert sorted(in_order[epoch * len(dataset) : (epoch + 1) * len(dataset)]) == everything
    assert [sorted(in_order[s * BATCH : (s + 1) * BATCH]) for s in range(steps)] == resumed
