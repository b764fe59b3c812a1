"""Published hypernetworks of others, converted to a safe format and run by our own model code.

Doc-to-LoRA (arXiv 2602.15902) makes an adapter of a document, Text-to-LoRA (arXiv 2506.06105) of a task description.
Both are published as pickles. `convert` turns them into a folder with `model.safetensors` and `config.json`; nothing
else here reads a pickle.
"""
