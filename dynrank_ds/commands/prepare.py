"""`dynrank prepare`: fetch the model and tokenise the data, for machines without internet."""

from __future__ import annotations

from dynrank_ds.data import store
from dynrank_ds.recipe import Recipe
from dynrank_ds.training.model import adapt, fetch_model, model_without_weights
from dynrank_ds.training.samples import described, prepare_data, split_held_out


def prepare(recipe: Recipe) -> str:
    """Fetch the model and tokenise the data, so that a run with HF_HUB_OFFLINE=1 finds both; return a summary.

    Raises:
        DataError, ModelError, RecipeError: what is missing or malformed.
    """
    # What cannot be trained is refused before its weights are fetched.
    adapt(model_without_weights(recipe.model.path), recipe)
    model = fetch_model(recipe.model.path)
    dataset, _ = prepare_data(recipe)
    split_held_out(dataset, recipe)  # refused here, not on the machine without internet
    return "\n".join([f"model       {model}", described(dataset), f"cache       {store.cache_folder()}"])
