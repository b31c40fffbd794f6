"""The evaluator: generates with any Hugging Face model, scores anyone's completions."""
