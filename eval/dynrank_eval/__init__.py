"""The evaluator: generates with any Hugging Face model, scores anyone's completions.

selection = Selection(["gsm8k"], limit=100)
results = evaluate(selection, generating=GenerationSettings("model"), output_dir=Path("scores"))
results.score("gsm8k")
"""

from dynrank_eval.evaluate import Results, evaluate
from dynrank_eval.generation import GenerationSettings
from dynrank_eval.jobs import Selection

__all__ = ["GenerationSettings", "Results", "Selection", "evaluate"]
