"""Loading models.

model     `load_model`, for a model and its tokenizer
source    the files of a model: on the hub, in a folder, or in a .gguf file
adapters  PEFT adapters and their base models
"""
