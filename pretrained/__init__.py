"""Pretrained models of the Llama family: Hugging Face folders in and out, and frozen layers.

    hub.py        model.init -> a folder, its digest, its JSON files
    weights.py    config.json -> model.Shape; model.safetensors -> a model
    tokenizer.py  tokenizer.json -> tokenizer.Tokenizer, and back
    export.py     a model and its tokenizer -> a Hugging Face folder
    frozen.py     the lowest blocks of a pretrained model, shared by all models built on top of them
"""
