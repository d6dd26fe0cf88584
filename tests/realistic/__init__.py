"""A LLaVA whose language model has real weights, and what precisions lose on it; nothing of it is shipped."""
